"""What is wrong with the name of an encoder or a model, as far as no weights are read.

Nothing here imports torch, so that a command can look before it does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe, load_recipe, run_recipe
from pipeline.errors import UserError


def check_source(
    source: str | os.PathLike[str],
    arch: str | None = None,
    options: Mapping[str, Any] | None = None,
    ema: bool = False,
) -> None:
    """UserError where the words of `load_encoder` name no encoder."""
    name, path = str(source), Path(source)
    size = (options or {}).get("img_size", 1)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{name}: img_size {size!r} is no multiple of a patch's side in pixels")
    hub = name.startswith("timm:")
    if ema and (name == "random" or hub or (path / "config.json").is_file()):
        raise UserError(f"--ema: {name} is no checkpoint file that keeps an average of its weights")
    if name == "random":
        need_arch(arch, name)
    elif hub:
        if arch and arch != name.removeprefix("timm:"):
            raise UserError(f"--arch {arch}: {name} says itself what it is; leave --arch out")
    elif not path.is_file() and not (path / "config.json").is_file():
        read_info(path)


def need_arch(arch: str | None, source: object) -> str:
    """The architecture that files of others and a random encoder need. UserError where none is."""
    if not arch:
        raise UserError(
            f"{source} does not say its architecture: give it with --arch (arch=), the name of a "
            "vision transformer of timm such as vit_base_patch16_224"
        )
    return arch


def read_info(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The encoder/ folder of a run (or itself), and its encoder.json, which has arch and options.

    UserError where there is none.
    """
    path = Path(folder)
    if (path / "encoder").is_dir():
        path = path / "encoder"
    try:
        info = json.loads((path / "encoder.json").read_text(encoding="utf-8"))
        _ = info["arch"], info["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not Path(folder).exists():
            raise UserError(f"{folder}: no such file or folder") from None
        raise no_encoder(folder, error) from None
    return path, info


def no_encoder(folder: str | os.PathLike[str], error: Exception) -> UserError:
    """What a folder without a readable encoder is."""
    return UserError(
        f"{folder}: no exported encoder there; give a run, an export or a file of weights"
        + ("" if isinstance(error, FileNotFoundError) else f" ({error})")
    )


def recipe_of_model(path: str | Path, recipe: str = "", set_: Sequence[str] = ()) -> Recipe:
    """The recipe of a model with its decoder: of a run's folder its own, of a FILE the one that is
    named and changed by set_. UserError where it cannot be read."""
    if not Path(path).is_file():
        return run_recipe(path)
    if not recipe:
        raise UserError(
            f"{path}: a checkpoint file needs --recipe, such as pipeline/recipes/mae.yaml"
        )
    return load_recipe(recipe, list(set_))

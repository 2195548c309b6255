"""Check what an encoder or a model is loaded from, without reading weights.

Nothing here imports torch, so that a command can check its input before that import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe, load_recipe, run_recipe
from pipeline.config.schema import EncoderRecipe
from pipeline.config.timm_names import check_arch, check_hub
from pipeline.errors import UserError, not_there, reason
from pipeline.method.checks import check_objective
from pipeline.weights.header import (
    FULL_WEIGHTS,
    METADATA,
    ZERO_PARTS,
    check_file,
    check_statistic,
    facts,
    written_info,
)

TEACHER, CLASSIFIER = "teacher.safetensors", "classifier.json"


def check_source(
    source: str | os.PathLike[str],
    arch: str | None = None,
    options: Mapping[str, Any] | None = None,
    ema: bool = False,
    random: bool = False,
) -> int | None:
    """UserError where the words of `load_encoder` name no encoder; the side of its images in
    pixels, None where that is not known yet."""
    name, path = str(source), Path(source)
    size = (options or {}).get("img_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(
            f"{name}: img_size {size!r}: must be a whole number from 1 up, as images are square"
        )
    check_overlay((options or {}).get("pretrained_cfg_overlay", {}))
    hub = name.startswith("timm:")
    if ema and (random or name == "random"):
        raise UserError("--ema: a random encoder has no average of its weights; leave --ema out")
    if ema and (hub or (path / "config.json").is_file()):
        raise UserError(
            f"--ema: {name} is not a checkpoint file that keeps an average of its weights"
        )
    if arch:
        check_arch(arch.split(".")[0], f"--arch {arch}")
    if name == "random":
        check_random(need_arch(arch, name), options or {})
    elif hub:
        check_hub(name.removeprefix("timm:"), name)
        if arch and arch != name.removeprefix("timm:"):
            raise UserError(f"--arch {arch}: {name} says itself what it is; leave --arch out")
    elif path.is_file():
        return _check_weights(path, arch, options or {})
    elif (path / "config.json").is_file():
        read_config(path)
        check_file(path / "model.safetensors")
    else:
        folder, info = read_info(path)
        check_file(folder / "encoder.safetensors")
        size = other_size(path, info, arch, options or {})
        if size != info["options"].get("img_size"):
            check_divisible(size, patch_of(info["arch"], info["options"]), path)
        if ema:
            teacher_of(path)
        return int(size)
    return (options or {}).get("img_size")


def check_overlay(overlay: Any) -> None:
    """UserError where the mean or std of the pixels that options say are none."""
    try:
        for key in {"mean", "std"} & dict(overlay).keys():
            check_statistic(key, overlay[key])
    except (TypeError, ValueError) as error:
        raise UserError(f"--options {{pretrained_cfg_overlay: {overlay}}}: {error}") from None


def check_random(arch: str, options: Mapping[str, Any]) -> None:
    """UserError where timm would build a random encoder that takes no image, or a part of each."""
    for key in ("patch_size", "embed_dim", "depth", "num_heads"):
        value = options.get(key, 1)
        if isinstance(value, bool | float) or (isinstance(value, int) and value < 1):
            raise UserError(f"--options {{{key}: {value}}}: must be a whole number from 1 up")
    if "img_size" in options and isinstance(options.get("patch_size", 1), int):
        check_divisible(options["img_size"], patch_of(arch, options), "random")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a ViT of transformers. UserError where it is none."""
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: not a ViTModel or ViTMAE of transformers ({error!r})") from None
    if config.get("model_type") not in ("vit", "vit_mae"):
        raise UserError(
            f"{folder}/config.json: model_type {config.get('model_type')!r} is neither vit nor "
            "vit_mae; for another ViT give a file of its weights under timm's names, with --arch"
        )
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{folder}: has no model.safetensors; open the folder with transformers and write "
            "it with save_pretrained(…, max_shard_size='20GB')"
        )
    return config


def _check_weights(path: Path, arch: str | None, options: Mapping[str, Any]) -> int | None:
    """UserError where a file is none of weights, or does not say what it must; the image size."""
    info = written_info(path, check_file(path).get(METADATA))
    if info:
        return int(other_size(path, info, arch, options))
    if path.suffix == ".safetensors":  # others may say it among their tensors
        need_arch(arch, path)
    return options.get("img_size")


def teacher_of(path: Path) -> Path:
    """The file of a run's EMA teacher: of its newest checkpoint, or of the one that is named."""
    run = path.parent if path.name == "encoder" else path
    newest = run
    try:
        if not (run / TEACHER).is_file():
            newest = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
        check_file(newest / TEACHER)
    except (OSError, UserError):
        raise UserError(f"--ema: {path} has no checkpoint with an EMA teacher") from None
    return newest / TEACHER


def check_start(weights: str, ema: bool = False) -> None:
    """UserError where no pretraining can start from there (weights/start.py), as far as no weights
    are read."""
    path = Path(weights)
    folder = (path / "config.json").is_file()
    if ema and (weights.startswith("timm:") or folder):
        raise UserError(f"init.ema: {weights} keeps no average of its weights")
    if weights.startswith("timm:"):
        check_hub(weights.removeprefix("timm:"), weights)
    elif path.is_file() or folder:
        if folder:
            read_config(path)
        check_file(path / "model.safetensors" if folder else path)
    elif (path / "recipe.yaml").is_file() and (path / "model.safetensors").is_file():
        run_recipe(path)
        check_file(path / "model.safetensors")
    else:
        check_file(read_info(path)[0] / "encoder.safetensors")


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
        text = (path / "encoder.json").read_text(encoding="utf-8")
        return path, facts(text, "encoder.json")
    except (OSError, ValueError) as error:
        if not Path(folder).exists():
            raise UserError(not_there(folder)) from None
        raise no_encoder(folder, error) from None


def no_encoder(folder: str | os.PathLike[str], error: Exception) -> UserError:
    """What a folder without a readable encoder is."""
    if (Path(folder) / CLASSIFIER).is_file() and isinstance(error, FileNotFoundError):
        return UserError(
            f"{folder}: is a classifier of eval/finetune.py; write its encoder with "
            f"pipeline/export.py {folder} --format run OUT, and give --encoder OUT"
        )
    return UserError(
        f"{folder}: no exported encoder there; give {_meant(Path(folder))}"
        + ("" if isinstance(error, FileNotFoundError) else f" ({reason(error)})")
    )


def _meant(folder: Path) -> str:
    """What to give instead of a folder without an encoder; checkpoints are told by their names."""
    path = folder.absolute()
    for inner in (path, path.parent):
        if inner.name == "checkpoints" and (inner.parent / "recipe.yaml").is_file():
            return f"{inner.parent}, the run of these checkpoints, or another export"
    if any(path.glob(f"*{ZERO_PARTS}")) or any(path.glob(f"*/*{ZERO_PARTS}")):
        return FULL_WEIGHTS
    if runs := sorted(path.glob("*/encoder/encoder.json")):
        return f"one of the runs in it, such as {folder / runs[0].parts[-3]}"
    return "a run, an export or a file of weights"


def read_classifier_info(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The classifier.json that eval/finetune.py wrote: arch, options, mean, std, classes (their
    names). UserError."""
    try:
        text = (Path(folder) / CLASSIFIER).read_text(encoding="utf-8")
        info = facts(text, CLASSIFIER)
        if not (isinstance(info.get("classes"), list) and info["classes"]):
            raise ValueError(f"{CLASSIFIER}: classes is not a list of names")
    except (OSError, ValueError) as error:
        raise no_classifier(folder, error) from None
    return info


def no_classifier(folder: str | os.PathLike[str], error: Exception) -> UserError:
    """What to say of a folder that no classifier can be read from."""
    why = " ".join(reason(error).split())[:200]
    if isinstance(error, FileNotFoundError):
        why = f"it has no {Path(error.filename or CLASSIFIER).name}"
    return UserError(f"{folder}: no classifier of eval/finetune.py there ({why})")


def other_size(
    path: Path, info: Mapping[str, Any], arch: str | None, options: Mapping[str, Any]
) -> Any:
    """The image size that options ask of a source that says its architecture itself.

    UserError for another architecture and for every other option that is not the source's.
    """
    own = {"img_size": None, **info["options"]}
    if arch and arch != info["arch"]:
        raise UserError(f"--arch {arch}: {path} says itself that it is {info['arch']}")
    for key, value in options.items():
        if key != "img_size" and (key not in own or own[key] != value):
            has = f"{key} {own[key]!r}" if key in own else f"no {key}"
            raise UserError(
                f"--options {{{key}: {value}}}: {path} says itself how it is built, with {has}; "
                "only img_size may differ"
            )
    return options.get("img_size", own["img_size"])


def patch_of(arch: str, options: Mapping[str, Any]) -> int | None:
    """Side of a patch in pixels where the options or the name of an architecture say it."""
    return EncoderRecipe.model_construct(arch=arch, options=dict(options)).patch_size


def check_divisible(size: Any, patch: int | None, path: object) -> None:
    """UserError for an image size that is not a multiple of the patch."""
    if patch and (not isinstance(size, int) or size < patch or size % patch):
        near = patch * max(1, round(size / patch)) if isinstance(size, int) else patch * 16
        raise UserError(
            f"{path}: img_size {size} is not a multiple of the patch size {patch}; take one such "
            f"as {near}"
        )


def check_reconstructor(path: str | Path, recipe: str = "", set_: Sequence[str] = ()) -> Recipe:
    """`recipe_of_model`. UserError also where there are no weights, or no decoder to them."""
    found, path = recipe_of_model(path, recipe, set_), Path(path)
    need_decoder(found, path)
    check_objective(found)
    check_file(path if path.is_file() else path / "model.safetensors")
    return found


def need_decoder(recipe: Recipe, source: object) -> None:
    """UserError where a model does not reconstruct."""
    if not recipe.measure.reconstructs:
        kind = recipe.measure.kind
        raise UserError(f"{source}: its measure is {kind}: no decoder, so no reconstructions")


def recipe_of_model(path: str | Path, recipe: str = "", set_: Sequence[str] = ()) -> Recipe:
    """The recipe of a model with its decoder: of a run's folder its own, of a FILE the one that is
    named and changed by set_. UserError where it cannot be read."""
    if not Path(path).is_file():
        found = run_recipe(path)
        if recipe or set_:
            flag = f"--recipe {recipe}" if recipe else f"--set {set_[0]}"
            raise UserError(f"{flag}: {path} is a run, which has a recipe of its own; leave it out")
        return found
    if not recipe:
        raise UserError(
            f"{path}: a checkpoint file needs --recipe, such as pipeline/recipes/mae.yaml"
        )
    return load_recipe(recipe, list(set_))

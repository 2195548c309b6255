"""A run's own weights, as its folder has them (runtime/run_folder.py): what is written, and read.

encoder/encoder.safetensors under timm's names, with encoder.json; model.safetensors, all of an
objective; teacher.safetensors, the EMA teacher of a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.config.recipe import Recipe, run_recipe
from pipeline.errors import UserError
from pipeline.method.checks import vit_options
from pipeline.method.encoder import Encoder
from pipeline.method.objective import Objective, build_objective
from pipeline.method.vit import build_vit
from pipeline.weights.files import refuse_integers
from pipeline.weights.header import unreadable
from pipeline.weights.positions import resize_positions
from pipeline.weights.source import no_encoder, read_info, teacher_of


def encoder_state(weights: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """An encoder's weights (its full state dict) under timm's names: no mask token, positions
    from the exact table, fp32 on the CPU.
    """
    state = {k: v.detach().float().cpu().contiguous() for k, v in weights.items()}
    state.pop("mask_token", None)
    state["pos_embed"] = encoder.position_table()[None]
    return state


def encoder_info(recipe: Recipe, step: int | None = None) -> dict[str, Any]:
    """What a reader needs beside the weights: the content of encoder.json."""
    info: dict[str, Any] = {
        "arch": recipe.encoder.arch,
        "options": vit_options(recipe.encoder),
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "recipe": recipe.name,
        "method": recipe.name,
    }
    return info if step is None else info | {"step": step}


def read_encoder(
    folder: str | os.PathLike[str], image_size: int | None = None
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of a run as a timm ViT (fp32, eval mode, no head) and its encoder.json.

    folder: a run folder or its encoder/ folder. image_size: another than it was trained at; its
    sin-cos positions are recomputed for it. Raises UserError.
    """
    path, info = read_info(folder)
    try:
        if image_size is not None:
            info["options"] = info["options"] | {"img_size": image_size}
        vit = build_vit(info["arch"], info["options"])
        state = load_file(path / "encoder.safetensors")
        if image_size is not None and "pos_embed" in state:
            grid = vit.patch_embed.grid_size
            state["pos_embed"] = resize_positions(state["pos_embed"], 1, grid, "exact")
        vit.load_state_dict(state)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise no_encoder(folder, error) from None
    except RuntimeError as error:
        raise UserError(
            f"{path}: the weights do not fit {info['arch']}: {' '.join(str(error).split())[:200]}"
        ) from None
    refuse_integers(vit, state, path / "encoder.safetensors")
    return vit.eval(), info


def load_run(run: Path) -> Objective:
    """The objective of a run folder with its newest weights, or of a checkpoint; fp32, on the CPU.

    Raises UserError where the folder is no run or the weights do not fit.
    """
    objective, _ = build_objective(run_recipe(run))
    path = run / "model.safetensors"
    # The position tables are exact in the new objective, rounded in a bf16 run.
    state = {k: v for k, v in full_weights(run).items() if not k.endswith("pos_embed")}
    problem = None
    try:
        missing, unexpected = objective.load_state_dict(state, strict=False)
        left = [k for k in (*missing, *unexpected) if not k.endswith("pos_embed")]
        problem = f"weight {left[0]} is in only one of them" if left else None
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
    if problem:
        raise UserError(f"{path}: does not fit the run's recipe: {problem}")
    refuse_integers(objective, state, path)
    return objective.eval()


def full_weights(run: Path) -> dict[str, Tensor]:
    """model.safetensors of a run or of a checkpoint. UserError where it cannot be read."""
    path = run / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def encoder_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights of an objective's or a teacher's."""
    return {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}


def teacher_weights(path: Path) -> dict[str, Tensor]:
    """The encoder of a run's EMA teacher, but its fixed positions; of its newest checkpoint, or of
    the one that is named.
    """
    file = teacher_of(path)
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise unreadable(file, error) from None
    left_out = ("pos_embed", "mask_token")
    return {k: v for k, v in encoder_part(state).items() if k not in left_out}

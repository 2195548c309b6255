"""The folder of a pretraining run: its lock, what it resumes from and its exported encoder.

runs/<name>/
  recipe.yaml  ds_config.json  versions.json   what ran
  log.txt  metrics.jsonl  tensorboard/  pictures/   how it went
  checkpoints/step-00001000/  checkpoints/latest   what it resumes from (checkpoint.py)
  encoder/encoder.safetensors  encoder.json   timm weights, what eval reads
  model.safetensors   encoder and decoder (or heads), unsharded and fp32
  failure.txt   why the previous run failed, if it did
  lock   held while the run is alive
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.method.objective import Objective
from pipeline.method.teacher import Teacher
from pipeline.runtime.checkpoint import CheckpointStore, read_state, write_on_first_rank
from pipeline.runtime.engine import Engine
from pipeline.runtime.optimizer_state import load_consolidated, save_consolidated
from pipeline.weights.run import encoder_info, encoder_part, encoder_state
from pipeline.weights.source import TEACHER
from shard_tools.atomic import write_together


def default_output(recipe: Recipe) -> Path:
    """runs/<recipe>-<date and time>."""
    return Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def save_checkpoint(
    store: CheckpointStore, engine: Engine, teacher: Teacher | None, recipe_text: str,
    state: dict[str, Any],
) -> Path:  # fmt: skip
    """Write the checkpoint of step state["step"] (collective); SaveError on every rank."""

    def write(folder: Path) -> str:
        problem = save_consolidated(engine, folder)
        if engine.rank == 0 and not problem:
            try:
                if teacher is not None:
                    save_file(_contiguous(teacher.state_dict()), folder / TEACHER)
                (folder / "recipe.yaml").write_text(recipe_text)
            except (OSError, SafetensorError) as error:
                problem = str(error)
        return problem

    return store.save(state["step"], write, state)


def load_checkpoint(checkpoint: Path, engine: Engine, teacher: Teacher | None) -> dict[str, Any]:
    """Restore weights, optimizer and teacher (collective) and return the saved state.

    The ranks and the ZeRO stage may be others than those that saved; the precision may not.
    """
    state = read_state(checkpoint)
    if state["precision"] != engine.plan.precision:
        raise UserError(
            f"{checkpoint}: written with precision {state['precision']}, this run has "
            f"{engine.plan.precision}; resume with the same precision: in the ds_config "
            '"bf16": {"enabled": true} is bf16, "torch_autocast": {"enabled": true} autocast, '
            "neither fp32"
        )
    load_consolidated(engine, checkpoint)
    if teacher is not None:
        teacher.load_state_dict(load_file(checkpoint / TEACHER))
    return state


def export(output: Path, checkpoint: Path, objective: Objective, recipe: Recipe, step: int) -> None:
    """Write encoder/ (timm names) and model.safetensors from a checkpoint (collective).

    Raises SaveError on every rank where they cannot be written.
    """

    def write() -> None:
        full = load_file(checkpoint / "model.safetensors")
        weights = encoder_state(encoder_part(full), objective.encoder)
        info = json.dumps(encoder_info(recipe, step), indent=2, allow_nan=False) + "\n"
        # encoder.json last: whoever finds its step there finds the weights of that step.
        write_together({
            output / "encoder" / "encoder.safetensors": save(weights),
            output / "model.safetensors": save(full),
            output / "encoder" / "encoder.json": info,
        })  # fmt: skip

    write_on_first_rank(output / "encoder", checkpoint.name, write)


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def versions() -> dict[str, str]:
    """The versions that a run records."""
    packages = ("torch", "deepspeed", "timm")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}

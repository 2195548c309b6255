"""The settings of a pretraining's command line, and its number of steps. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.recipe import Recipe
from pipeline.data.order import steps_per_epoch
from pipeline.errors import UserError


@dataclass(frozen=True)
class Settings:
    """The command line of pretrain.py. ds_config, recipe: a path or the name of a bundled file."""

    ds_config: str | Path
    recipe: str | Path
    overrides: tuple[str, ...] = ()
    data: str = "data/shards/train"
    output: str | None = None
    resume: str = "auto"
    resume_changed: bool = False
    lock: bool = True
    max_steps: int | None = None
    peak_tflops: float | None = None
    verbose: bool = False


def epoch_steps(data: str, samples: int, recipe: Recipe) -> int:
    """Steps of an epoch on `samples` samples of the folder `data`. UserError if there are none."""
    epoch = recipe.data.samples_per_epoch or samples
    steps = steps_per_epoch(epoch, recipe.batch_size, recipe.data.partitions)
    if steps == 0:
        raise UserError(
            f"{data}: {epoch} samples are fewer than one batch of {recipe.batch_size}; "
            "set batch_size (and data.partitions) lower, or data.samples_per_epoch"
        )
    return steps


def total_steps(data: str, samples: int, recipe: Recipe) -> int:
    """Steps of a pretraining on `samples` samples of the folder `data`. UserError if there are
    none."""
    steps, epochs = epoch_steps(data, samples, recipe), recipe.optimizer.epochs
    total = round(epochs * steps)
    if total == 0:
        raise UserError(
            f"optimizer.epochs {epochs:g}: epochs of {steps} steps on {data}, too few for one step"
        )
    return total

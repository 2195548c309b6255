"""What the command line of pretraining says. Imports nothing heavy, as it is read first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.recipe import Recipe
from pipeline.data.order import steps_per_epoch
from pipeline.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What the command line says; a path or a bundled name for ds_config and recipe."""

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
    """Steps of an epoch on `samples` samples of a folder. UserError where there are none."""
    epoch = recipe.data.samples_per_epoch or samples
    steps = steps_per_epoch(epoch, recipe.batch_size, recipe.data.partitions)
    if steps == 0:
        raise UserError(
            f"{data}: {epoch} samples are fewer than one batch of {recipe.batch_size}; "
            "set batch_size (and data.partitions) lower, or data.samples_per_epoch"
        )
    return steps


def total_steps(data: str, samples: int, recipe: Recipe) -> int:
    """Steps of a whole pretraining on `samples` samples of a folder. UserError where there are
    none."""
    return whole_steps(epoch_steps(data, samples, recipe), data, recipe)


def whole_steps(steps: int, data: str, recipe: Recipe) -> int:
    """Steps of a whole pretraining whose epochs have `steps`. UserError where there are none."""
    epochs = recipe.optimizer.epochs
    total = round(epochs * steps)
    if total == 0:
        raise UserError(
            f"optimizer.epochs {epochs:g}: epochs of {steps} steps on {data}, too few for one step"
        )
    return total

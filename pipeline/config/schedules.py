"""What changes from step to step: learning rate, teacher's momentum, size of the images."""

from __future__ import annotations

import math
from itertools import pairwise

from pipeline.config.recipe import Recipe
from pipeline.errors import UserError


def warmup_cosine(
    step: float, *, peak: float, total: float, warmup: float, low: float = 0.0
) -> float:
    """The learning rate of step `step` (0-based) of `total`, of which `warmup` warm up.

    Linear from 0 to `peak`, then low + (peak - low) (1 + cos(pi t)) / 2 with t from 0 to 1 over
    the rest, and `low` past the end. Steps may be fractions (2.5 epochs of warm-up).
    Source: facebookresearch/mae, `util/lr_sched.py`, there in fractional epochs.
    """
    if step < warmup:
        return peak * step / warmup
    t = min(1.0, (step - warmup) / max(total - warmup, 1e-9))
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * t))


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a pretraining's optimizer step `step` (0-based), per step (SPEC §4)."""
    o = recipe.optimizer
    return warmup_cosine(
        step,
        peak=recipe.lr,
        total=o.epochs * steps_per_epoch,
        warmup=o.warmup_epochs * steps_per_epoch,
        low=o.min_lr,
    )


def size_steps(recipe: Recipe, total: int) -> tuple[tuple[int, int], ...]:
    """data.sizes in optimizer steps: (step before which a phase ends, side of its crops), of a run
    of `total` steps; the steps below round(share total) that no earlier phase has.

    UserError where a phase has no step.
    """
    found = tuple((round(share * total), side) for share, side in recipe.data.sizes)
    for (before, _), (until, side) in pairwise(((0, 0), *found)):
        if until == before:
            raise UserError(
                f"data.sizes: the images of {side} pixels have none of the {total} steps of the "
                "run: give them a larger share, or leave them out"
            )
    return found


def ema_momentum(recipe: Recipe, step: int, total_steps: int) -> float:
    """The teacher's momentum m at a step: constant, or 1 - (1 - m) (1 + cos(pi s / S)) / 2."""
    m = recipe.ema.momentum
    if recipe.ema.schedule == "constant":
        return m
    return 1.0 - (1.0 - m) * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))

"""What changes from step to step: the learning rate and the teacher's momentum."""

from __future__ import annotations

import math

from pipeline.config.recipe import Recipe


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


def ema_momentum(recipe: Recipe, step: int, total_steps: int) -> float:
    """The teacher's momentum m at a step: constant, or 1 - (1 - m) (1 + cos(pi s / S)) / 2."""
    m = recipe.ema.momentum
    if recipe.ema.schedule == "constant":
        return m
    return 1.0 - (1.0 - m) * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))

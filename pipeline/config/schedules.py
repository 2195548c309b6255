"""What changes from step to step: learning rate, teacher's momentum, size of the images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

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


def learning_rate(
    recipe: Recipe, step: int, steps_per_epoch: int, group: Mapping[str, Any] = MappingProxyType({})
) -> float:
    """The learning rate of a pretraining's optimizer step `step` (0-based).

    group: of parameters, with the `lr_scale` c and `anneal` a of its layer (1 where it has none).
    Its rate is

        c (warm-up from 0 to peak / a, then low + (peak / a - low) (1 + cos(pi t / a)) / 2)

    with t from 0 to 1 over the steps after the warm-up, and c low once t is past a. Layer l of
    0 … n + 1 (embeddings, n blocks, all behind them) has c = layer_decay^(n + 1 - l) and
    a = layer_anneal + (1 - layer_anneal) l / (n + 1). A rate that ends after the share a and is
    1 / a as high sums up to the same over the run, but for the warm-up and low: early layers learn
    early (Brock et al. 2017, FreezeOut, arXiv:1706.04983; in masked image modelling Topcuoglu &
    Akagunduz 2023, arXiv:2312.02194, who stop to compute the layers' gradients too; here the
    layers stay, at the lowest rate). layer_decay is that of finetuning (Bao et al. 2022, BEiT).
    """
    o, anneal = recipe.optimizer, group.get("anneal", 1.0)
    total, warmup = o.epochs * steps_per_epoch, o.warmup_epochs * steps_per_epoch
    rate = warmup_cosine(
        step,
        peak=recipe.lr / anneal,
        total=total if anneal == 1.0 else warmup + anneal * (total - warmup),
        warmup=warmup,
        low=o.min_lr,
    )
    return group.get("lr_scale", 1.0) * rate


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

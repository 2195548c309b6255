"""What the recipe's optimizer keeps, sends, computes and launches in a step, beside DeepSpeed."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.planning import plan_recipe
from pipeline.cost.launches import GROUP_LAUNCHES, OPTIMIZER_LAUNCHES, LaunchCounter
from pipeline.method.objective import Objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.optimizers import OPTIMIZERS


class Stepping:
    """The optimizer of an objective's recipe.

    sizes: of the parameters of each of its groups, which it may cut finer than the recipe's;
    moments: how many it keeps per parameter of each; gathered: elements of Muon's matrices, which
    every rank needs whole.
    """

    def __init__(self, objective: Objective) -> None:
        recipe, groups = objective.recipe, parameter_groups(objective)
        kind = OPTIMIZERS[recipe.optimizer.kind]
        self._client = kind.build(objective, groups, plan_recipe({}, recipe, 1))
        own: list[dict[str, Any]] = self._client.param_groups if self._client else groups
        self.sizes = [[p.numel() for p in group["params"]] for group in own]
        self.moments = [len(kind.moments(group)) for group in own]
        self.gathered = sum(
            p.numel() for group in own if "shapes" in group for p in group["params"]
        )

    @cached_property
    def _own_step(self) -> tuple[int, int]:
        """FLOPs and launches of its step on all parameters, which must be on the meta device; none
        where a kernel of DeepSpeed's takes it."""
        if not self._client:
            return 0, 0
        for group in self._client.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        self._client.step()  # the first makes the moments
        with FlopCounterMode(display=False) as work, LaunchCounter() as launches:
            self._client.step()
        self._client.zero_grad()
        return work.get_total_flops(), launches.count

    def flops(self, stage: int, ranks: int) -> float:
        """On a rank: from stage 1 on they share the matrices."""
        return self._own_step[0] / (ranks if stage else 1)

    def launches(self, stage: int, ranks: int) -> int:
        """On a rank, about: those of the joined gradients and their norm, and its own."""
        joined = OPTIMIZER_LAUNCHES + GROUP_LAUNCHES * (len(self.sizes) - 2)
        return joined + math.ceil(self._own_step[1] / (ranks if stage else 1))

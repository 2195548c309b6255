"""Compiled transformer blocks and, where they are asked for, their CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.ds_config import RunPlan
from pipeline.errors import UserError
from pipeline.runtime.gradients import takes_flat

# All blocks of an encoder or decoder are one function to torch, which compiles it once for each
# shape and way of calling it (views of two lengths, the decoder's first and last block, probes and
# pictures without gradients) and silently runs it uncompiled past its own limit, 8.
RECOMPILES = 64


def compile_blocks(objective: nn.Module, plan: RunPlan) -> None:
    """Let the blocks compile at their first call. With CUDA graphs, each is then replayed whole.

    Raises UserError where CUDA graphs cannot be.
    """
    if plan.cuda_graphs:
        _check_graphs(plan)
    torch._dynamo.config.recompile_limit = RECOMPILES
    mode = "reduce-overhead" if plan.cuda_graphs else None
    for part in objective.modules():
        for block in getattr(part, "blocks", ()):
            block.compile(dynamic=False, mode=mode)


def _check_graphs(plan: RunPlan) -> None:
    if not torch.cuda.is_available():
        raise UserError("cuda_graphs of the ds_config needs a CUDA device: leave it out")
    if plan.accumulation > 1 and not takes_flat(plan):
        raise UserError(
            f"cuda_graphs of the ds_config with {plan.accumulation} accumulation steps needs "
            "zero_optimization.stage 1: a graph's gradients do not outlive the next micro-batch"
        )


class SameShapes:
    """Lets micro-batches of one shape through: a graph is of one, and more of them fill memory."""

    def __init__(self) -> None:
        self._first: list[tuple[int, ...]] | None = None

    def check(self, inputs: tuple[Any, ...]) -> None:
        """UserError where the tensors of a micro-batch have not the shapes of the first one's."""
        shapes = [tuple(t.shape) for t in inputs if isinstance(t, Tensor)]
        if self._first is None:
            self._first = shapes
        if shapes != self._first:
            raise UserError(
                f"cuda_graphs of the ds_config: a micro-batch has shapes {shapes}, the first had "
                f"{self._first}; they must not vary: leave cuda_graphs out"
            )

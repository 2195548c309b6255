"""The teacher: a moving average of the online encoder and projector."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.method.heads import choose_tokens
from pipeline.method.views import View

# A context with the fp32 values of the given parameters, whole (engine.Engine.masters); None: they
# are whole and fp32 themselves.
Masters = Callable[[list[nn.Parameter]], AbstractContextManager[list[Tensor]]] | None
SLICE = 24  # parameters, two blocks of a ViT


class Online(Protocol):
    """What a teacher follows: an Objective."""

    encoder: Any
    measure: Any


class Teacher(nn.Module):
    """(f', p'): the exponential moving average of the online encoder and projector, in fp32.

    It is outside the DeepSpeed module: not cast, not partitioned, not optimised. A measure
    without a projector gets the tokens of f'.
    """

    def __init__(self, objective: Online) -> None:
        super().__init__()
        settings = objective.measure.recipe
        if not settings.needs_teacher:
            raise UserError(f"measure {settings.kind} has no teacher")
        self.tokens: str = getattr(settings, "tokens", "patch+cls")
        self.encoder = copy.deepcopy(objective.encoder).float()
        projector = getattr(objective.measure, "projector", None)
        self.projector = None if projector is None else copy.deepcopy(projector).float()
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, view: View) -> Tensor:
        """A view → keys p'(f'(view)), fp32 [B, T, C], without gradient."""
        tokens = choose_tokens(self.encoder(*view), self.tokens)
        keys = tokens if self.projector is None else self.projector(tokens)
        return keys.float()  # under autocast they are bf16

    @torch.no_grad()
    def update(self, objective: Online, momentum: float, masters: Masters = None) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · online, in fp32.

        masters: gives the online weights, slice by slice. Of a bf16 model they are the fp32 master
        weights: at small learning rates the rounding to bf16 is as large as the teacher's distance.
        """
        for mine, online in self.pairs(objective):
            with masters(online) if masters else contextlib.nullcontext(online) as values:
                torch._foreach_lerp_(mine, [v.detach().float() for v in values], 1.0 - momentum)

    @torch.no_grad()
    def distance(self, objective: Online, masters: Masters = None) -> float:
        """||online - teacher|| / ||teacher|| over all weights of f and p (reads the device)."""
        apart: list[Tensor] = []
        size: list[Tensor] = []
        for mine, online in self.pairs(objective):
            with masters(online) if masters else contextlib.nullcontext(online) as values:
                change = torch._foreach_sub([v.detach().float() for v in values], mine)
                apart += torch._foreach_norm(change)
            size += torch._foreach_norm(mine)
        return float(torch.stack(apart).norm() / torch.stack(size).norm())

    def pairs(self, objective: Online) -> list[tuple[list[Tensor], list[nn.Parameter]]]:
        """(mine, online) parameters in slices of about a block: few are gathered at once."""
        mine: list[Tensor] = [*self.encoder.parameters()]
        online = [*objective.encoder.parameters()]
        if self.projector is not None:
            mine += self.projector.parameters()
            online += objective.measure.projector.parameters()
        cuts = range(0, len(mine), SLICE)
        return [(mine[c : c + SLICE], online[c : c + SLICE]) for c in cuts]

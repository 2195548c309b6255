"""The teacher: a moving average of the online encoder and projector."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.method.heads import choose_tokens
from pipeline.method.views import View

# A context with the unsharded fp32 values of the given parameters (engine.Engine.masters); None:
# they are unsharded and fp32 themselves.
Masters = Callable[[list[nn.Parameter]], AbstractContextManager[list[Tensor]]] | None
SLICE = 24  # parameters, two blocks of a ViT


class Online(Protocol):
    """What a teacher follows: an Objective."""

    encoder: Any
    measure: Any


class Teacher(nn.Module):
    """(f', p'): the exponential moving average of the online encoder and projector, in fp32.

    It is outside the DeepSpeed module: not cast, not partitioned, not optimised. A measure
    without a projector gets the tokens of f'. For a 16-bit student the teacher also keeps its
    linears' weights in 16 bits, cast once per update instead of in every forward pass. That copy
    shares all other tensors with the fp32 state and is in no checkpoint; its blocks are compiled
    if the teacher's are.
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
        self._copy: _Copy | None = None

    @torch.no_grad()
    def forward(
        self, view: View, second: View | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A view → keys p'(f'(view)), [B, T, C] without gradient; of two views the keys of each.

        dtype: of the queries, and so of the keys; if it is 16-bit, also of the matrix products, as
        under autocast.
        """
        if dtype == torch.float32:
            return self._keys(self.encoder, self.projector, view, second, dtype)
        if self._copy is None or self._copy.dtype != dtype:
            self._copy = _Copy(self.encoder, self.projector, dtype)
        with torch.autocast(self.encoder.pos_embed.device.type, dtype):
            return self._keys(*self._copy.networks(), view, second, dtype)

    def refresh(self) -> None:
        """Bring the 16-bit copy up to date with the fp32 weights, as `forward` does, but not the
        replay of a captured CUDA graph."""
        if self._copy is not None:
            self._copy.networks()

    def _keys(
        self, encoder: nn.Module, projector: nn.Module | None, view: View, second: View | None,
        dtype: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        def keys(z: Tensor) -> Tensor:
            tokens = choose_tokens(z, self.tokens)
            return (tokens if projector is None else projector(tokens)).to(dtype)

        if second is None:
            return keys(encoder(*view))
        first, other = encoder(*view, second=second)
        return keys(first), keys(other)

    def _apply(self, *args: Any, **keywords: Any) -> Teacher:
        self._copy = None  # it refers to tensors that are moved or replaced here
        return super()._apply(*args, **keywords)

    @torch.no_grad()
    def update(self, objective: Online, momentum: float, masters: Masters = None) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · online, in fp32.

        masters: a context with the online weights of a slice. For a bf16 model they are the fp32
        master weights: at small learning rates rounding to bf16 is as large as the teacher's
        distance.
        """
        for mine, online in self._weights(objective, masters):
            torch._foreach_lerp_(mine, online, 1.0 - momentum)

    @torch.no_grad()
    def distance(self, objective: Online, masters: Masters = None) -> float:
        """||online - teacher|| / ||teacher|| over all weights of f and p (waits for the device)."""
        apart: list[Tensor] = []
        size: list[Tensor] = []
        for mine, online in self._weights(objective, masters):
            apart += torch._foreach_norm(torch._foreach_sub(online, mine))
            size += torch._foreach_norm(mine)
        return float(torch.stack(apart).norm() / torch.stack(size).norm())

    def _weights(
        self, objective: Online, masters: Masters
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The slices of `pairs`, of the online ones their fp32 values."""
        for mine, online in self.pairs(objective):
            with masters(online) if masters else contextlib.nullcontext(online) as values:
                yield mine, [value.detach().float() for value in values]

    def pairs(self, objective: Online) -> list[tuple[list[Tensor], list[nn.Parameter]]]:
        """(mine, online) parameters in slices of two blocks, so that few are gathered at once."""
        mine: list[Tensor] = [*self.encoder.parameters()]
        online = [*objective.encoder.parameters()]
        if self.projector is not None:
            mine += self.projector.parameters()
            online += objective.measure.projector.parameters()
        cuts = range(0, len(mine), SLICE)
        return [(mine[c : c + SLICE], online[c : c + SLICE]) for c in cuts]


class _Copy:
    """f' and p' with 16-bit weights in their linears; all other tensors are the originals."""

    def __init__(self, encoder: nn.Module, projector: nn.Module | None, dtype: torch.dtype) -> None:
        both = nn.ModuleList([encoder] if projector is None else [encoder, projector])
        held: list[Tensor] = [*both.parameters(), *both.buffers()]
        self._both = copy.deepcopy(both, {id(tensor): tensor for tensor in held})
        for mine, theirs in zip(self._both.modules(), both.modules(), strict=True):
            if theirs._compiled_call_impl is not None:  # which a deep copy does not have
                mine.compile(dynamic=False)
        self.dtype = dtype
        self._wide: list[Tensor] = [*linear_weights(both)]
        self._narrow: list[Tensor] = []
        for module in _linears(self._both):
            for name, weight in list(module.named_parameters(recurse=False)):
                narrow = nn.Parameter(weight.to(dtype), requires_grad=False)
                setattr(module, name, narrow)
                self._narrow.append(narrow)
        self._rounded = self._versions()

    def _versions(self) -> list[int]:
        return [weight._version for weight in self._wide]

    @torch.no_grad()
    def networks(self) -> tuple[nn.Module, nn.Module | None]:
        """f' and p', rounded again if the fp32 weights have been written since."""
        versions = self._versions()
        if versions != self._rounded:
            torch._foreach_copy_(self._narrow, self._wide)
            self._rounded = versions
        return self._both[0], self._both[1] if len(self._both) > 1 else None


def _linears(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def linear_weights(module: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the linears of a module: what a teacher copies in 16 bits."""
    return [w for part in _linears(module) for w in part.parameters(recurse=False)]

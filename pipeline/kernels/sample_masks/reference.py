"""`sample_masks` in PyTorch: the CPU path, and what the kernel is tested against."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels import philox
from pipeline.kernels.philox import Epoch
from pipeline.kernels.select_visible.reference import select_visible_reference
from pipeline.kernels.streams import Stream

Drawn = tuple[Tensor, Tensor, Tensor]  # (visible, hidden, inverse) of one view, int32
POLICIES = ("random", "complement", "independent", "none")


class Masks(NamedTuple):
    """Positions of the two views; int32. Of T2 there is nothing (None) under policy `random`."""

    visible1: Tensor  # [B,K1]
    inverse1: Tensor  # [B,L]
    visible2: Tensor | None  # [B,K2]
    inverse2: Tensor | None  # [B,L]
    hidden1: Tensor  # [B,L-K1]


def sample_masks_reference(
    sample: Tensor, *, seed: int, epoch: Epoch, length: int, visible: tuple[int, int], policy: str
) -> Masks:
    """`sample_masks` in PyTorch; sizes already checked."""

    def draw(view: int) -> Drawn:
        stream = Stream.MASK + view
        noise = philox.words(sample, seed=seed, epoch=epoch, stream=stream, count=length)
        return select_visible_reference(noise, visible[view])

    return masks_from(draw, policy)


def masks_from(draw: Callable[[int], Drawn], policy: str) -> Masks:
    """The masks of T1, which is draw(0), and of T2, which is draw(1) under `independent` only."""
    visible, hidden, inverse = draw(0)
    if policy == "random":
        return Masks(visible, inverse, None, None, hidden)
    if policy == "complement":
        shown, masked = visible.shape[1], hidden.shape[1]
        inverse2 = torch.where(inverse < shown, inverse + masked, inverse - shown)
        return Masks(visible, inverse, hidden, inverse2, hidden)
    if policy == "independent":
        visible2, _, inverse2 = draw(1)
        return Masks(visible, inverse, visible2, inverse2, hidden)
    everything = torch.arange(inverse.shape[1], dtype=torch.int32, device=inverse.device)
    everything = everything.repeat(len(inverse), 1)
    return Masks(visible, inverse, everything, everything, hidden)

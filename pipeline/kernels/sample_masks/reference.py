"""`sample_masks` in PyTorch: the CPU path, and what the kernel is tested against."""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels import philox
from pipeline.kernels.philox import Epoch
from pipeline.kernels.select_visible.reference import select_visible_reference
from pipeline.kernels.streams import Stream

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
    first, second = visible
    shown1, hidden1, inverse1 = _draw(sample, seed, epoch, 0, length, first)
    if policy == "random":
        return Masks(shown1, inverse1, None, None, hidden1)
    if policy == "complement":
        return Masks(shown1, inverse1, hidden1, complement(inverse1, first), hidden1)
    if policy == "independent":
        shown2, _, inverse2 = _draw(sample, seed, epoch, 1, length, second)
        return Masks(shown1, inverse1, shown2, inverse2, hidden1)
    everything = torch.arange(length, dtype=torch.int32, device=sample.device)
    everything = everything.repeat(len(sample), 1)
    return Masks(shown1, inverse1, everything, everything, hidden1)


def complement(inverse: Tensor, visible: int) -> Tensor:
    """The inverse of the view that shows what a view with `visible` patches hides: int32 [B,L]."""
    hidden = inverse.shape[1] - visible
    return torch.where(inverse < visible, inverse + hidden, inverse - visible)


def _draw(
    sample: Tensor, seed: int, epoch: Epoch, view: int, length: int, visible: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(visible, hidden, inverse) of one view, int32."""
    noise = philox.words(sample, seed=seed, epoch=epoch, stream=Stream.MASK + view, count=length)
    return select_visible_reference(noise, visible)

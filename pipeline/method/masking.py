"""Which patches a view masks: the policies of `views.mask`.

A policy gives every patch a priority; the patches of smallest priority stay visible, as many as
the mask ratio says, the same number for every sample. A priority is a pure function of (seed,
epoch, sample number, view): the same on any device, for any rank count and batch.

A new policy is a function here and its entry in POLICIES; `views.mask` in a recipe then names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.kernels import philox
from pipeline.kernels.philox import Epoch
from pipeline.kernels.streams import Stream


@dataclass(frozen=True)
class Draw:
    """What the masks of a batch are drawn from.

    sample: int64 [B], sample numbers; view: 0 for T1, 1 for T2; grid: rows and columns of patches;
    masked: how many of the L patches will be masked, 0 … L - 1.
    """

    sample: Tensor
    seed: int
    epoch: Epoch
    view: int
    grid: tuple[int, int]
    masked: int

    @property
    def length(self) -> int:
        """L, the number of patches."""
        return self.grid[0] * self.grid[1]

    def words(self, count: int) -> Tensor:
        """Uniform 32-bit words: int64 [B, count]."""
        stream = Stream.MASK + self.view
        return philox.words(
            self.sample, seed=self.seed, epoch=self.epoch, stream=stream, count=count
        )


def random(draw: Draw) -> Tensor:
    """Patches one by one, each equally likely (MAE)."""
    return draw.words(draw.length)


BLOCKS = 32  # drawn for each sample; few of them are needed
SMALLEST = 16 / 196  # area of the smallest block over that of the image (BEiT)
# Height over width, log-uniform in 0.3 … 1 / 0.3 (BEiT). A table, since exp is not the same on
# every device.
ASPECTS = torch.tensor([0.3 ** (1 - 2 * (i + 0.5) / 256) for i in range(256)], dtype=torch.float64)


@functools.cache
def aspects_on(device: torch.device) -> Tensor:
    """ASPECTS on a GPU, copied there once: a CUDA graph cannot copy from the host."""
    return ASPECTS.to(device)


def block(draw: Draw) -> Tensor:
    """Rectangles one after another until enough patches are masked (BEiT, Bao et al. 2022).

    A block's area is uniform between SMALLEST of the image and all that is to be masked, its
    aspect ratio one of ASPECTS, its place uniform. Patches are masked in the order of the first
    block that covers them, inside a block from the last row up, so the last block is cut short
    to the exact number. Should all blocks not suffice, single patches drawn as by `random` follow.
    """
    rows, columns = draw.grid
    words = draw.words(draw.length + 4 * BLOCKS)
    word = words[:, draw.length :].view(-1, BLOCKS, 4)
    most = max(draw.masked, 1)
    least = min(max(round(SMALLEST * draw.length), 1), most)
    area = least + (word[..., 0] * (most - least + 1) >> 32)
    aspects = ASPECTS if word.device.type == "cpu" else aspects_on(word.device)
    aspect = aspects[word[..., 1] >> 24]
    # Products, quotients and roots of float64 are rounded alike on every device.
    height = (area * aspect).sqrt().round().long().clamp(1, rows)
    width = (area / aspect).sqrt().round().long().clamp(1, columns)
    top = word[..., 2] * (rows - height + 1) >> 32
    left = word[..., 3] * (columns - width + 1) >> 32

    position = torch.arange(draw.length, device=word.device)
    row, column = position // columns, position % columns
    covered = (row >= top[..., None]) & (row < (top + height)[..., None])
    covered &= (column >= left[..., None]) & (column < (left + width)[..., None])
    number = torch.arange(BLOCKS, device=word.device)[:, None]
    first = torch.where(covered, number, BLOCKS).amin(1)
    return torch.where(first < BLOCKS, (BLOCKS - first) << 32, words[:, : draw.length])


Policy = Callable[[Draw], Tensor]  # → priorities, int64 [B, L] in 0 … 2**46 - 1
POLICIES: dict[str, Policy] = {"random": random, "block": block}


def select(policy: str, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """(visible int32 [B, K], masked int32 [B, L - K], inverse int32 [B, L]) under a policy."""
    return kernels.select_visible(POLICIES[policy](draw), draw.length - draw.masked)

"""Calls of `embed_visible` for the report, the benches and the tests; bytes from index ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import kernels
from pipeline.kernels.cases import (
    IMAGENET,
    Book,
    Bytes,
    Case,
    Sizes,
    Traffic,
    launch,
    normalised_planes,
    patch_bytes,
    size,
)
from pipeline.kernels.sample_masks.cases import traffic as masks_traffic

PHASE = "embed"


def _inputs(s: Sizes) -> Callable[[], Any]:
    image, visible = s.image(), s.positions(0, s.keep)
    weight, bias = s.leaf(s.width, 3, s.patch, s.patch), s.leaf(s.width)
    position = s.leaf(s.length, s.width).detach()
    return lambda: kernels.embed_visible(image, visible, weight, bias, position, **IMAGENET)


CASES = (
    Case(
        "embed_visible",
        _inputs,
        kernels=("embed_visible", "embed_visible_backward"),
        gradient=True,
        wide=("embed_visible",),
        rounds=True,
    ),
)


def mae_embed(s: Sizes) -> None:
    """Normalise, embed every patch, add positions, shuffle, keep."""
    weight, bias = s.empty(s.width, 3, s.patch, s.patch), s.empty(s.width)
    position = s.empty(1, s.length, s.width)
    planes = normalised_planes(s.meta_image()).to(s.dtype)
    tokens = F.conv2d(planes, weight, bias, stride=s.patch).flatten(2).transpose(1, 2)
    tokens = tokens + position
    noise = torch.rand(s.batch, s.length, device="meta")
    shuffle = torch.argsort(noise, dim=1)
    restore = torch.argsort(shuffle, dim=1)
    kept = shuffle[:, : s.keep].unsqueeze(-1).repeat(1, 1, s.width)
    torch.gather(tokens, 1, kept)
    hidden = torch.ones(s.batch, s.length, device="meta")
    hidden[:, : s.keep] = 0
    torch.gather(hidden, 1, restore)


def reference_embed(s: Sizes) -> None:
    """Draw the masks, embed what they show."""
    sample = torch.empty(s.batch, dtype=torch.int64, device="meta")
    masks = kernels.sample_masks(sample, seed=0, epoch=0, length=s.length, visible=(s.keep, 0),
                                 policy="random")  # fmt: skip
    weight, bias = s.empty(s.width, 3, s.patch, s.patch), s.empty(s.width)
    kernels.embed_visible(s.meta_image(), masks.visible1, weight, bias, s.empty(s.length, s.width),
                          **IMAGENET)  # fmt: skip


def traffic(s: Sizes, image: Tensor, visible: Tensor) -> Traffic:
    """Forward of embed_visible with positions."""
    from pipeline.kernels.embed_visible.triton import BLOCKS

    m, n, *_ = BLOCKS[s.dtype]
    rows = visible.numel()
    in_m, in_n = -(-rows // m), -(-s.width // n)
    weight, bias = s.width * s.values * s.element, s.width * s.element
    out, index = rows * s.width * s.element, rows * 4
    pixels, moved = rows * s.values, patch_bytes(image, visible, s.patch)
    row = s.width * s.element
    position = torch.unique(visible).numel() * row
    # Rows of a tile that stand at one position read its embedding together.
    read = sum(torch.unique(tile).numel() for tile in visible.flatten().split(m)) * row
    return Traffic(
        (pixels + 2 * index) * in_n + (weight + bias) * in_m + read + out,
        moved + index + weight + bias + position + out,
        pixels + index + weight + bias + position + out,
        around=2 * weight,  # [D,3,p,p] -> [D,p*p*3]
    )


BYTES = {
    "embed_visible": Bytes(
        mae_embed,
        reference_embed,
        lambda s, image, masks: [masks_traffic(s), traffic(s, image, masks.visible1)],
    ),
}


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch forward and one backward, of one matrix product."""

    def run(
        image: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, position: Any, **_: Any
    ) -> Tensor:
        rows, values = visible.numel(), weight[0].numel()
        out = torch.empty(*visible.shape, len(weight), dtype=weight.dtype)
        flops, pixels = 2 * rows * values * len(weight), rows * values
        moved = pixels + size(visible, weight, bias, out)
        cost = (flops, moved + (0 if position is None else size(position)))
        return launch(book, out, [weight, bias], cost, (flops, moved))

    return run

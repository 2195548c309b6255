"""Calls of `patch_loss` for the report, the benches and the tests; bytes from index ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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

PHASE = "loss"


def _inputs(relaxed: bool) -> Callable[[Sizes], Callable[[], Any]]:
    def build(s: Sizes) -> Callable[[], Any]:
        image, region = s.image(), s.positions(s.keep, s.length)
        prediction = s.leaf(*region.shape, s.values)
        other = s.leaf(*region.shape, s.values) if relaxed else None
        weight = torch.ones(region.shape, device=s.device) if relaxed else None
        return lambda: kernels.patch_loss(
            prediction, image, region, patch=s.patch, other=other, weight=weight, **IMAGENET
        )

    return build


_KERNELS = ("patch_loss", "patch_loss_backward")
CASES = tuple(
    Case(name, _inputs(relaxed), kernels=_KERNELS, gradient=True, wide=("patch_loss_backward",))
    for name, relaxed in (("patch_loss", False), ("patch_loss relaxed", True))
)


def mae_loss(s: Sizes) -> None:
    """Patchify, mean, variance, normalise, squared error of every patch, masked mean; backward."""
    prediction = s.empty(s.batch, s.length, s.values, grad=True)
    hidden = torch.empty(s.batch, s.length, device="meta")
    planes = normalised_planes(s.meta_image())
    side = s.side // s.patch
    grid = planes.reshape(s.batch, 3, side, s.patch, side, s.patch)
    target = torch.einsum("nchpwq->nhwpqc", grid).reshape(s.batch, s.length, s.values)
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    loss = ((prediction - target) ** 2).mean(-1)
    ((loss * hidden).sum() / hidden.sum()).backward()


def reference_loss(s: Sizes) -> None:
    """The loss on the masked patches; backward."""
    region = torch.empty(s.batch, s.length - s.keep, dtype=torch.int32, device="meta")
    prediction = s.empty(*region.shape, s.values, grad=True)
    loss = kernels.patch_loss(prediction, s.meta_image(), region, patch=s.patch, **IMAGENET)
    loss.sum().backward()


def traffic(s: Sizes, image: Tensor, region: Tensor, relaxed: bool = False) -> dict[str, Traffic]:
    """Forward and backward of patch_loss, without weights."""
    from pipeline.kernels.patch_loss import triton as launched

    forward = launched.TILE_OF_TWO if relaxed else launched.TILE
    backward = launched.GRAD_TILE_OF_TWO if relaxed else launched.GRAD_TILE
    rows = region.numel()
    predictions = rows * s.values * s.element * (2 if relaxed else 1)
    pixels, moved = rows * s.values, patch_bytes(image, region, s.patch)
    partial = -(-rows // forward[0]) * 8
    read = predictions + rows * 4
    upstream = -(-rows // backward[0]) * (8 if relaxed else 4)
    return {
        "forward": Traffic(
            read + pixels + partial, read + moved + partial, read + pixels + 8, around=partial + 8
        ),
        "backward": Traffic(
            read + pixels + upstream + predictions,
            read + moved + 8 + predictions,
            read + pixels + 8 + predictions,
        ),
    }


BYTES = {
    "patch_loss": Bytes(
        mae_loss,
        reference_loss,
        lambda s, image, masks: list(traffic(s, image, masks.hidden1).values()),
    ),
}


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch forward and one backward."""

    def run(
        prediction: Tensor, image: Tensor, region: Tensor, *, other: Any = None, **_: Any
    ) -> Tensor:
        read = size(prediction, other, region) + region.numel() * prediction.shape[2]
        given = [prediction] if other is None else [prediction, other]
        back = (0, read + size(prediction, other))
        return launch(book, torch.empty(2), given, (0, read), back)

    return run

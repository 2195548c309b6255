"""Triton kernels of `patch_loss`: target and errors of a patch live in registers only.

Rows are (sample, patch of the region). Forward: program i writes the sums of coefficient x error
over its rows to partial[:, i]; the few partial sums are added afterwards in a fixed order. Backward
builds the target again:

    d prediction = coefficient (2 / values) (g1 (prediction - target) - g2 (other - prediction))
    d other      = coefficient (2 / values)  g2 (other - prediction)

coefficient[b,r] = weight[b,r] / (B max(sum_r weight[b,r], 1)), or 1 / (B R) without weights; a
program adds up the weights of its rows' samples itself, which the cache holds.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.patch_loss.reference import EPSILON
from pipeline.kernels.patches import channel_scale
from pipeline.kernels.patches_triton import (
    as_list,
    image_strides,
    normalised,
    patch_start,
    value_offset,
)

# (rows of a program, its warps), the fastest on an H100: of a prediction alone, and of two.
TILE, TILE_OF_TWO = (8, 4), (2, 1)
GRAD_TILE, GRAD_TILE_OF_TWO = (4, 4), (1, 1)
_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _target(
    image_ptr, region_ptr, row, inside, j, per_image, columns, image_stride, row_stride,
    PATCH: tl.constexpr, PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, NORM_PIX: tl.constexpr,
):  # fmt: skip
    """The target of rows: fp32 [ROWS, J]."""
    VALUES: tl.constexpr = 3 * PATCH * PATCH
    start = patch_start(row, inside, region_ptr, per_image, columns, image_stride, row_stride,
                        PATCH, PIXEL_STRIDE)  # fmt: skip
    offset = value_offset(j, row_stride, PATCH, PIXEL_STRIDE, CHANNEL_STRIDE)
    read = inside[:, None] & (j < VALUES)[None, :]
    pixels = tl.load(image_ptr + start[:, None] + offset[None, :], mask=read, other=0)
    y = normalised(pixels, j[None, :], SCALE, SHIFT)
    if NORM_PIX:
        y = tl.where(read, y, 0.0)
        y = tl.where(read, y - (tl.sum(y, 1) / VALUES)[:, None], 0.0)
        y *= tl.rsqrt(tl.sum(y * y, 1) / (VALUES - 1) + _EPSILON)[:, None]
    return y


@triton.jit
def _coefficient(weight_ptr, row, inside, per_image, constant, WEIGHTED: tl.constexpr):
    """The share of rows in the mean, 0 beyond the last. constant: 1 / B, or 1 / (B R) for all."""
    if WEIGHTED:
        start = row // per_image * per_image
        total = tl.zeros(row.shape, tl.float32)
        for first in range(0, per_image, 256):
            r = first + tl.arange(0, 256)
            read = inside[:, None] & (r < per_image)[None, :]
            weights = tl.load(weight_ptr + start[:, None] + r[None, :], mask=read, other=0)
            total += tl.sum(weights, 1)
        weight = tl.load(weight_ptr + row, mask=inside, other=0)
        return weight / tl.maximum(total, 1.0) * constant
    else:
        return tl.where(inside, constant, 0.0)


@triton.jit
def patch_loss_kernel(
    prediction_ptr, other_ptr, image_ptr, region_ptr, weight_ptr, partial_ptr, rows, constant,
    per_image, columns, image_stride, row_stride,
    PATCH: tl.constexpr, PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, NORM_PIX: tl.constexpr, WEIGHTED: tl.constexpr,
    OTHER: tl.constexpr, ROWS: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    VALUES: tl.constexpr = 3 * PATCH * PATCH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, J)
    inside = row < rows
    tile = inside[:, None] & (j < VALUES)[None, :]
    at = row.to(tl.int64)[:, None] * VALUES + j[None, :]
    # Asked for before the target waits for its pixels.
    prediction = tl.load(prediction_ptr + at, mask=tile, other=0)
    if OTHER:
        other = tl.load(other_ptr + at, mask=tile, other=0)
    target = _target(image_ptr, region_ptr, row, inside, j, per_image, columns, image_stride,
                     row_stride, PATCH, PIXEL_STRIDE, CHANNEL_STRIDE, SCALE, SHIFT,
                     NORM_PIX)  # fmt: skip
    prediction = prediction.to(tl.float32)
    share = _coefficient(weight_ptr, row, inside, per_image, constant, WEIGHTED)
    difference = tl.where(tile, prediction - target, 0.0)
    error = tl.sum(difference * difference, 1) / VALUES
    tl.store(partial_ptr + tl.program_id(0), tl.sum(error * share, 0))
    error = tl.zeros((ROWS,), tl.float32)
    if OTHER:
        difference = other.to(tl.float32) - prediction
        error = tl.sum(difference * difference, 1) / VALUES
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(error * share, 0))


@triton.jit
def patch_loss_backward_kernel(
    prediction_ptr, other_ptr, image_ptr, region_ptr, weight_ptr, grad_ptr,
    prediction_grad_ptr, other_grad_ptr, rows, constant,
    per_image, columns, image_stride, row_stride,
    PATCH: tl.constexpr, PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, NORM_PIX: tl.constexpr, WEIGHTED: tl.constexpr,
    OTHER: tl.constexpr, ROWS: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    VALUES: tl.constexpr = 3 * PATCH * PATCH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, J)
    inside = row < rows
    tile = inside[:, None] & (j < VALUES)[None, :]
    target = _target(image_ptr, region_ptr, row, inside, j, per_image, columns, image_stride,
                     row_stride, PATCH, PIXEL_STRIDE, CHANNEL_STRIDE, SCALE, SHIFT,
                     NORM_PIX)  # fmt: skip
    at = row.to(tl.int64)[:, None] * VALUES + j[None, :]
    prediction = tl.load(prediction_ptr + at, mask=tile, other=0).to(tl.float32)
    factor = _coefficient(weight_ptr, row, inside, per_image, constant, WEIGHTED) * (2.0 / VALUES)
    grad = (factor * tl.load(grad_ptr))[:, None] * (prediction - target)
    if OTHER:
        difference = tl.load(other_ptr + at, mask=tile, other=0).to(tl.float32) - prediction
        pull = (factor * tl.load(grad_ptr + 1))[:, None] * difference
        tl.store(other_grad_ptr + at, pull.to(other_grad_ptr.dtype.element_ty), mask=tile)
        grad -= pull
    tl.store(prediction_grad_ptr + at, grad.to(prediction_grad_ptr.dtype.element_ty), mask=tile)


def _settings(
    image: Tensor,
    region: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
    weighted: bool,
    other: bool,
) -> dict[str, Any]:
    """The arguments both kernels share."""
    scale, shift = channel_scale(mean, std)
    rows = region.numel()
    return {
        "rows": rows,
        "constant": 1.0 / (len(region) if weighted else rows),
        "per_image": region.shape[1],
        "columns": image.shape[2] // patch,
        "PATCH": patch,
        "SCALE": tuple(scale),
        "SHIFT": tuple(shift),
        "NORM_PIX": norm_pix,
        "WEIGHTED": weighted,
        "OTHER": other,
        "J": triton.next_power_of_2(3 * patch * patch),
        **image_strides(image),
    }


@torch.library.custom_op("relaxmim::patch_loss", mutates_args=())
def _patch_loss(
    prediction: Tensor,
    other: Tensor | None,
    image: Tensor,
    region: Tensor,
    weight: Tensor | None,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    settings = _settings(
        image, region, patch, mean, std, norm_pix, weight is not None, other is not None
    )
    tile_rows, warps = TILE if other is None else TILE_OF_TWO
    programs = triton.cdiv(region.numel(), tile_rows)
    partial = image.new_empty(2, programs, dtype=torch.float32)
    patch_loss_kernel[(programs,)](
        prediction.contiguous(), None if other is None else other.contiguous(), image,
        region.contiguous(), None if weight is None else weight.contiguous(), partial,
        ROWS=tile_rows, num_warps=warps, **settings,
    )  # fmt: skip
    return partial.sum(1)


@_patch_loss.register_fake
def _(
    prediction: Tensor,
    other: Tensor | None,
    image: Tensor,
    region: Tensor,
    weight: Tensor | None,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    return prediction.new_empty(2, dtype=torch.float32)


@torch.library.custom_op("relaxmim::patch_loss_backward", mutates_args=())
def _patch_loss_backward(
    grad: Tensor,
    prediction: Tensor,
    other: Tensor | None,
    image: Tensor,
    region: Tensor,
    weight: Tensor | None,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> tuple[Tensor, Tensor]:
    settings = _settings(
        image, region, patch, mean, std, norm_pix, weight is not None, other is not None
    )
    prediction_grad = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    if other is None:
        other_grad = prediction.new_empty(0)
    else:
        other_grad = torch.empty_like(other, memory_format=torch.contiguous_format)
    tile_rows, warps = GRAD_TILE if other is None else GRAD_TILE_OF_TWO
    patch_loss_backward_kernel[(triton.cdiv(region.numel(), tile_rows),)](
        prediction.contiguous(), None if other is None else other.contiguous(), image,
        region.contiguous(), None if weight is None else weight.contiguous(), grad.contiguous(),
        prediction_grad, other_grad, ROWS=tile_rows, num_warps=warps, **settings,
    )  # fmt: skip
    return prediction_grad, other_grad


@_patch_loss_backward.register_fake
def _(
    grad: Tensor,
    prediction: Tensor,
    other: Tensor | None,
    image: Tensor,
    region: Tensor,
    weight: Tensor | None,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> tuple[Tensor, Tensor]:
    first = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    if other is None:
        return first, prediction.new_empty(0)
    return first, torch.empty_like(other, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prediction, other, image, region, weight, *ctx.settings = inputs
    ctx.save_for_backward(prediction, other, image, region, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    prediction, other, image, region, weight = ctx.saved_tensors
    first, second = _patch_loss_backward(
        grad, prediction, other, image, region, weight, *ctx.settings
    )
    return first, None if other is None else second, *(None,) * 7


_patch_loss.register_autograd(_backward, setup_context=_setup)


def patch_loss_triton(
    prediction: Tensor,
    image: Tensor,
    region: Tensor,
    *,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
    other: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """`patch_loss` by the kernel; arguments already checked."""
    settings = (patch, as_list(mean), as_list(std), norm_pix)
    return _patch_loss(prediction, other, image, region, weight, *settings)

"""Triton kernels of `embed_visible`: an implicit GEMM over the visible patches.

Forward: program (m, n) computes out[rows m, channels n]; the left operand is read from the uint8
image and normalised in registers, bias and position are the epilogue.
Backward: d weight[n, j] = sum over rows of grad[row, n] x[row, j], with the same x read again;
rows are split over programs into partial sums that are added afterwards, so the result does not
depend on the order of execution. d bias comes from the same pass over grad.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels import backend
from pipeline.kernels.dot_triton import dot
from pipeline.kernels.patches import channel_scale
from pipeline.kernels.patches_triton import (
    as_list,
    image_strides,
    normalised,
    patch_start,
    value_offset,
)

BLOCKS = {  # of what is multiplied: (rows, channels, values) of a program's tile, warps; forward
    torch.bfloat16: (64, 128, 64, 4),
    torch.float16: (64, 128, 64, 4),
    torch.float32: (64, 64, 32, 8),
}
GRAD_BLOCKS = {  # (channels, values, rows) of a program's tile, stages; backward
    torch.bfloat16: (64, 128, 128, 2),
    torch.float16: (64, 128, 128, 2),
    torch.float32: (64, 64, 32, 3),
}
_TL_DTYPE = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
SPLIT_ROWS = 2048  # rows of a program of the backward


@triton.jit
def embed_visible_kernel(
    image_ptr, visible_ptr, weight_ptr, bias_ptr, position_ptr, out_ptr,
    rows, per_image, columns, image_stride, row_stride,
    WIDTH: tl.constexpr, PATCH: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    HAS_POSITION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """out[row, d] = sum_j x[row, j] weight[d, j] + bias[d] + position[visible[row], d]."""
    VALUES: tl.constexpr = 3 * PATCH * PATCH
    # Neighbouring programs share the rows, so a patch stays in the L2 cache between them.
    row = tl.program_id(0) // tl.cdiv(WIDTH, N) * M + tl.arange(0, M)
    d = tl.program_id(0) % tl.cdiv(WIDTH, N) * N + tl.arange(0, N)
    inside = row < rows
    start = patch_start(row, inside, visible_ptr, per_image, columns, image_stride, row_stride,
                        PATCH, PIXEL_STRIDE)  # fmt: skip
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, VALUES, J):
        j = first + tl.arange(0, J)
        offset = value_offset(j, row_stride, PATCH, PIXEL_STRIDE, CHANNEL_STRIDE)
        read = inside[:, None] & (j < VALUES)[None, :]
        pixels = tl.load(image_ptr + start[:, None] + offset[None, :], mask=read, other=0)
        x = normalised(pixels, j[None, :], SCALE, SHIFT).to(weight_ptr.dtype.element_ty)
        read = (d < WIDTH)[None, :] & (j < VALUES)[:, None]
        w = tl.load(weight_ptr + d[None, :] * VALUES + j[:, None], mask=read, other=0)
        total = dot(x, w, total)
    total += tl.load(bias_ptr + d, mask=d < WIDTH, other=0).to(tl.float32)[None, :]
    written = inside[:, None] & (d < WIDTH)[None, :]
    if HAS_POSITION:
        at = tl.load(visible_ptr + row, mask=inside, other=0)
        place = position_ptr + at[:, None] * WIDTH + d[None, :]
        total += tl.load(place, mask=written, other=0).to(tl.float32)
    out = out_ptr + row.to(tl.int64)[:, None] * WIDTH + d[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit
def embed_visible_backward_kernel(
    image_ptr, visible_ptr, grad_ptr, weight_grad_ptr, bias_grad_ptr,
    rows, per_image, columns, image_stride, row_stride,
    WIDTH: tl.constexpr, PATCH: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    SPLIT: tl.constexpr, FACTORS: tl.constexpr, N: tl.constexpr, J: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Partial sums of split s: weight_grad[s, d, j] and bias_grad[s, d], fp32."""
    VALUES: tl.constexpr = 3 * PATCH * PATCH
    split = tl.program_id(2)
    d = tl.program_id(1) * N + tl.arange(0, N)
    j = tl.program_id(0) * J + tl.arange(0, J)
    offset = value_offset(j, row_stride, PATCH, PIXEL_STRIDE, CHANNEL_STRIDE)
    total = tl.zeros((N, J), tl.float32)
    bias = tl.zeros((N,), tl.float32)
    for first in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, rows), M):
        row = first + tl.arange(0, M)
        inside = row < rows
        start = patch_start(row, inside, visible_ptr, per_image, columns, image_stride,
                            row_stride, PATCH, PIXEL_STRIDE)  # fmt: skip
        read = inside[:, None] & (j < VALUES)[None, :]
        pixels = tl.load(image_ptr + start[:, None] + offset[None, :], mask=read, other=0)
        x = normalised(pixels, j[None, :], SCALE, SHIFT).to(FACTORS)
        read = inside[None, :] & (d < WIDTH)[:, None]
        where = row.to(tl.int64)[None, :] * WIDTH + d[:, None]
        grad = tl.load(grad_ptr + where, mask=read, other=0)
        total = dot(grad.to(FACTORS), x, total)
        bias += tl.sum(grad.to(tl.float32), 1)
    written = (d < WIDTH)[:, None] & (j < VALUES)[None, :]
    at = (split * WIDTH + d)[:, None] * VALUES + j[None, :]
    tl.store(weight_grad_ptr + at, total, mask=written)
    if tl.program_id(0) == 0:
        tl.store(bias_grad_ptr + split * WIDTH + d, bias, mask=d < WIDTH)


def _shared(image: Tensor, visible: Tensor, patch: int, mean: list[float], std: list[float]) -> Any:
    scale, shift = channel_scale(mean, std)
    return {
        "rows": visible.numel(),
        "per_image": visible.shape[1],
        "columns": image.shape[2] // patch,
        "PATCH": patch,
        "SCALE": tuple(scale),
        "SHIFT": tuple(shift),
        **image_strides(image),
    }


@torch.library.custom_op("relaxmim::embed_visible", mutates_args=())
def _embed_visible(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    factors: torch.dtype,
) -> Tensor:
    width, patch = weight.shape[0], weight.shape[-1]
    out = weight.new_empty(*visible.shape, width)
    m, n, j, warps = BLOCKS[factors]
    grid = (triton.cdiv(visible.numel(), m) * triton.cdiv(width, n),)
    embed_visible_kernel[grid](
        image, visible.contiguous(), _by_value(weight, factors), bias.contiguous(),
        None if position is None else position.contiguous(), out,
        **_shared(image, visible, patch, list(mean), list(std)),
        WIDTH=width, HAS_POSITION=position is not None, M=m, N=n, J=j, num_warps=warps,
    )  # fmt: skip
    return out


def _grad_tile(grad: Tensor, values: int, factors: torch.dtype) -> dict[str, int]:
    """Tile, warps and stages of the backward. An H100 takes 213 us for forward and backward
    of 12544 patches of ViT-B/16 where it took 271 with half the rows in three stages (238 and 317
    under autocast, whose gradient is fp32), for which other GPUs have the registers.
    """
    n, j, m, stages = GRAD_BLOCKS[factors]
    known, narrow = backend.capability(grad.device), grad.element_size() == 2
    large = known >= 90 if narrow else 90 <= known < 100
    if m > 64 and not large:
        m, stages = 64, 3
    # Four warps are faster on an H100; values cut off, or an fp32 gradient elsewhere, they have to
    # spill for.
    warps = 4 if values % j == 0 and (narrow or large) else 8
    return {"N": n, "J": j, "M": m, "num_warps": warps, "num_stages": stages}


def _by_value(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[D,3,p,p] -> dtype [D,p*p*3], contiguous: the order in which a line of the image is read."""
    by_value = weight.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format)
    return by_value.reshape(len(weight), -1)


@_embed_visible.register_fake
def _(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    factors: torch.dtype,
) -> Tensor:
    return weight.new_empty(*visible.shape, weight.shape[0])


@torch.library.custom_op("relaxmim::embed_visible_backward", mutates_args=())
def _embed_visible_backward(
    grad: Tensor,
    image: Tensor,
    visible: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    factors: torch.dtype,
) -> tuple[Tensor, Tensor]:
    width, values, rows = grad.shape[-1], 3 * patch * patch, visible.numel()
    splits = triton.cdiv(rows, SPLIT_ROWS)
    weight_grad = grad.new_empty(splits, width, values, dtype=torch.float32)
    bias_grad = grad.new_empty(splits, width, dtype=torch.float32)
    tile = _grad_tile(grad, values, factors)
    n, j = tile["N"], tile["J"]
    embed_visible_backward_kernel[(triton.cdiv(values, j), triton.cdiv(width, n), splits)](
        image, visible.contiguous(), grad.contiguous(), weight_grad, bias_grad,
        **_shared(image, visible, patch, list(mean), list(std)),
        WIDTH=width, SPLIT=SPLIT_ROWS, FACTORS=_TL_DTYPE[factors], **tile,
    )  # fmt: skip
    by_value = weight_grad.sum(0).view(width, patch, patch, 3)
    return by_value.permute(0, 3, 1, 2).to(grad.dtype), bias_grad.sum(0).to(grad.dtype)


@_embed_visible_backward.register_fake
def _(
    grad: Tensor,
    image: Tensor,
    visible: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    factors: torch.dtype,
) -> tuple[Tensor, Tensor]:
    width = grad.shape[-1]
    by_value = grad.new_empty(width, patch, patch, 3)
    return by_value.permute(0, 3, 1, 2), grad.new_empty(width)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, visible, weight, bias, position, *settings = inputs
    ctx.save_for_backward(image, visible)
    ctx.settings = weight.shape[-1], *settings
    ctx.bias_dtype = bias.dtype
    ctx.position = None if position is None else (position.shape, position.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image, visible = ctx.saved_tensors
    weight_grad, bias_grad = _embed_visible_backward(grad, image, visible, *ctx.settings)
    position_grad = None
    if ctx.position is not None and ctx.needs_input_grad[4]:
        # A learned position: rare, so it is left to PyTorch.
        shape, dtype = ctx.position
        total = grad.new_zeros(shape, dtype=torch.float32)
        flat = grad.reshape(-1, shape[1]).to(torch.float32)
        position_grad = total.index_add(0, visible.flatten(), flat).to(dtype)
    return None, None, weight_grad, bias_grad.to(ctx.bias_dtype), position_grad, None, None, None


_embed_visible.register_autograd(_backward, setup_context=_setup)


def embed_visible_triton(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    factors: torch.dtype,
) -> Tensor:
    """`embed_visible` by the kernel; arguments already checked. factors: dtype to multiply in."""
    return _embed_visible(
        image, visible, weight, bias, position, as_list(mean), as_list(std), factors
    )

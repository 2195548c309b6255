"""Triton kernel of `color_jitter`: one program per image, parameters and order read at run time.

Contrast needs the mean of grey over the picture after the steps before it, so the program walks
its image twice: once summing grey, once jittering and writing. The second read finds the image
(150 KB at 224 x 224) in the L2 cache. Whole numbers 0 .. 255 are kept in fp32 between steps, with
correctly rounded divisions and no fused multiply-add, so the bytes equal the reference's.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.color_jitter.reference import ORDERS

BLOCK = 512  # pixels at a time


@triton.jit
def _grey(red, green, blue):
    return tl.floor(0.2989 * red + 0.587 * green + 0.114 * blue)


@triton.jit
def _blend(x, towards, factor):
    mixed = factor * x + (1.0 - factor) * towards
    return tl.floor(tl.minimum(tl.maximum(mixed, 0.0), 255.0))


@triton.jit
def _level(x):
    """Unit interval to a whole number 0 .. 255."""
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 1.0) * 255.999)


@triton.jit
def _hue(red, green, blue, factor):
    red, green, blue = (tl.div_rn(red, 255.0), tl.div_rn(green, 255.0), tl.div_rn(blue, 255.0))
    value = tl.maximum(tl.maximum(red, green), blue)
    spread = value - tl.minimum(tl.minimum(red, green), blue)
    grey = spread == 0.0
    saturation = tl.div_rn(spread, tl.where(grey, 1.0, value))
    safe = tl.where(grey, 1.0, spread)
    to_red = tl.div_rn(value - red, safe)
    to_green = tl.div_rn(value - green, safe)
    to_blue = tl.div_rn(value - blue, safe)
    sector = tl.where(value == green, 2.0 + to_red - to_blue, 4.0 + to_green - to_red)
    sector = tl.where(value == red, to_blue - to_green, sector)
    turn = tl.div_rn(sector, 6.0) + 1.0
    turn = turn - tl.floor(turn) + factor
    turn = (turn - tl.floor(turn)) * 6.0
    sector = tl.floor(turn)
    part = turn - sector
    sector = sector.to(tl.int32) % 6
    value_level = _level(value)
    p = _level(value * (1.0 - saturation))
    q = _level(value * (1.0 - saturation * part))
    t = _level(value * (1.0 - saturation * (1.0 - part)))
    red = tl.where((sector == 0) | (sector == 5), value_level,
                   tl.where(sector == 1, q, tl.where(sector == 4, t, p)))  # fmt: skip
    green = tl.where((sector == 1) | (sector == 2), value_level,
                     tl.where(sector == 0, t, tl.where(sector == 3, q, p)))  # fmt: skip
    blue = tl.where((sector == 3) | (sector == 4), value_level,
                    tl.where(sector == 2, t, tl.where(sector == 5, q, p)))  # fmt: skip
    return red, green, blue


@triton.jit
def _steps(red, green, blue, factors_ptr, steps, count, mean):
    """The first `count` of the four steps; two bits of `steps` name each operation."""
    for step in range(count):
        operation = (steps >> (2 * step)) & 3
        factor = tl.load(factors_ptr + operation)
        if operation == 3:
            red, green, blue = _hue(red, green, blue, factor)
        else:
            towards = tl.zeros_like(red)
            if operation == 1:
                towards += mean
            if operation == 2:
                towards += _grey(red, green, blue)
            red = _blend(red, towards, factor)
            green = _blend(green, towards, factor)
            blue = _blend(blue, towards, factor)
    return red, green, blue


@triton.jit
def _pixels(n, columns, WIDTH: tl.constexpr, PATCH: tl.constexpr, VISIBLE: tl.constexpr):
    """(y, x, patch number) of pixel n; patch after patch where patches can be hidden."""
    if VISIBLE:
        patch = n // (PATCH * PATCH)
        y = patch // columns * PATCH + n % (PATCH * PATCH) // PATCH
        return y, patch % columns * PATCH + n % PATCH, patch
    else:
        return n // WIDTH, n % WIDTH, n


@triton.jit
def _load(image_ptr, shown_ptr, n, pixels, columns, row_stride, WIDTH: tl.constexpr,
          PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, PATCH: tl.constexpr,
          VISIBLE: tl.constexpr):  # fmt: skip
    """(red, green, blue as fp32, whether the pixel is shown, its offset in the output)."""
    y, x, patch = _pixels(n, columns, WIDTH, PATCH, VISIBLE)
    shown = n < pixels
    if VISIBLE:
        shown = shown & (tl.load(shown_ptr + patch, mask=shown, other=0) != 0)
    source = image_ptr + y * row_stride + x * PIXEL_STRIDE
    red = tl.load(source, mask=shown, other=0).to(tl.float32)
    green = tl.load(source + CHANNEL_STRIDE, mask=shown, other=0).to(tl.float32)
    blue = tl.load(source + 2 * CHANNEL_STRIDE, mask=shown, other=0).to(tl.float32)
    return red, green, blue, shown, (y * WIDTH + x) * 3


@triton.jit
def color_jitter_kernel(
    image_ptr, out_ptr, factors_ptr, steps_ptr, before_ptr, apply_ptr, gray_ptr, shown_ptr,
    pixels, shown_pixels, columns, image_stride, row_stride,
    WIDTH: tl.constexpr, PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    PATCH: tl.constexpr, VISIBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    image_ptr += b.to(tl.int64) * image_stride
    out_ptr += b.to(tl.int64) * pixels * 3
    factors_ptr += b * 4
    if VISIBLE:
        shown_ptr += b * (pixels // (PATCH * PATCH))
    steps, before = tl.load(steps_ptr + b), tl.load(before_ptr + b)
    count = tl.where(tl.load(apply_ptr + b) != 0, 4, 0)
    gray = tl.load(gray_ptr + b) != 0

    total = tl.zeros((BLOCK,), tl.int32)
    if count > 0:
        for first in range(0, pixels, BLOCK):
            n = first + tl.arange(0, BLOCK)
            red, green, blue, shown, _ = _load(
                image_ptr, shown_ptr, n, pixels, columns, row_stride, WIDTH, PIXEL_STRIDE,
                CHANNEL_STRIDE, PATCH, VISIBLE,
            )  # fmt: skip
            red, green, blue = _steps(red, green, blue, factors_ptr, steps, before, 0.0)
            total += tl.where(shown, _grey(red, green, blue), 0.0).to(tl.int32)
    mean = (tl.sum(total, 0).to(tl.float64) / shown_pixels).to(tl.float32)

    for first in range(0, pixels, BLOCK):
        n = first + tl.arange(0, BLOCK)
        red, green, blue, shown, at = _load(
            image_ptr, shown_ptr, n, pixels, columns, row_stride, WIDTH, PIXEL_STRIDE,
            CHANNEL_STRIDE, PATCH, VISIBLE,
        )  # fmt: skip
        red, green, blue = _steps(red, green, blue, factors_ptr, steps, count, mean)
        if gray:
            red = _grey(red, green, blue)
            green, blue = red, red
        inside = n < pixels
        tl.store(out_ptr + at, tl.where(shown, red, 0.0).to(tl.uint8), mask=inside)
        tl.store(out_ptr + at + 1, tl.where(shown, green, 0.0).to(tl.uint8), mask=inside)
        tl.store(out_ptr + at + 2, tl.where(shown, blue, 0.0).to(tl.uint8), mask=inside)


@functools.lru_cache(maxsize=8)
def _order_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Per order number: the operations packed two bits each, and how many precede contrast."""
    packed = [sum(op << (2 * i) for i, op in enumerate(order)) for order in ORDERS]
    before = [order.index(1) for order in ORDERS]
    return (
        torch.tensor(packed, dtype=torch.int32, device=device),
        torch.tensor(before, dtype=torch.int32, device=device),
    )


@torch.library.custom_op("relaxmim::color_jitter", mutates_args=())
def _color_jitter(
    image: Tensor,
    factors: Tensor,
    order: Tensor,
    apply: Tensor,
    gray: Tensor,
    visible: Tensor | None,
    patch: int,
) -> Tensor:
    batch, height, width, _ = image.shape
    out = image.new_empty(image.shape)
    packed, before = (table[order] for table in _order_tables(image.device))
    shown, shown_pixels = None, height * width
    if visible is not None:
        shown = image.new_zeros(batch, height * width // patch**2)
        shown.scatter_(1, visible.to(torch.int64), 1)
        shown_pixels = visible.shape[1] * patch**2
    image_stride, row_stride, pixel_stride, channel_stride = image.stride()
    flags: Any = (apply.contiguous().view(torch.uint8), gray.contiguous().view(torch.uint8))
    color_jitter_kernel[(batch,)](
        image, out, factors.contiguous(), packed, before, *flags, shown,
        height * width, shown_pixels, width // patch, image_stride, row_stride,
        WIDTH=width, PIXEL_STRIDE=pixel_stride, CHANNEL_STRIDE=channel_stride, PATCH=patch,
        VISIBLE=visible is not None, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@_color_jitter.register_fake
def _(
    image: Tensor,
    factors: Tensor,
    order: Tensor,
    apply: Tensor,
    gray: Tensor,
    visible: Tensor | None,
    patch: int,
) -> Tensor:
    return image.new_empty(image.shape)


def color_jitter_triton(
    image: Tensor,
    factors: Tensor,
    order: Tensor,
    apply: Tensor,
    gray: Tensor,
    *,
    visible: Tensor | None,
    patch: int | None,
) -> Tensor:
    """`color_jitter` by the kernel; arguments already checked."""
    return _color_jitter(image, factors, order, apply, gray, visible, patch or 1)

"""Triton kernels of `color_jitter` and `jitter_parameters`.

Several programs share an image, parameters and order are read at run time. Contrast needs the mean
of grey over the picture after the steps before it, so there are two launches: one sums grey, one
jitters and writes; the second finds the image (150 KB at 224 x 224) in the L2 cache. Only visible
patches are read. Whole numbers 0 .. 255 are kept in fp32 between steps, with correctly rounded
divisions and no fused multiply-add, so the bytes equal the reference's.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.color_jitter.reference import ORDERS
from pipeline.kernels.philox import Epoch, on_device
from pipeline.kernels.philox_triton import uniforms

BLOCK = 512  # pixels of a program
_ORDERS = tl.constexpr(len(ORDERS))
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
    return tl.floor(x * 255.999)


@triton.jit
def _divided(x, BY: tl.constexpr):
    """x / BY, correctly rounded: a product by the reciprocal, and what it lacks (Markstein 1990).

    The interpreter's fma rounds twice.
    """
    if _INTERPRETED:
        return tl.div_rn(x, BY)
    else:
        RECIPROCAL: tl.constexpr = 1.0 / BY
        quotient = x * RECIPROCAL
        return tl.fma(tl.fma(quotient, -BY, x), RECIPROCAL, quotient)


@triton.jit
def _distance(x, high, mid, part):
    """(high - x) / (high - low) of one channel, where that of the middle one is part."""
    return tl.where(x == high, 0.0, tl.where(x == mid, part, 1.0))


@triton.jit
def _hue(red, green, blue, factor):
    """Two divisions at run time, as of the three distances of HSV one is 0 and one is 1."""
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    mid = tl.maximum(tl.minimum(red, green), tl.minimum(tl.maximum(red, green), blue))
    value = _divided(high, 255.0)
    spread = value - _divided(low, 255.0)
    grey = high == low
    saturation = tl.div_rn(spread, tl.where(grey, 1.0, value))
    part = tl.div_rn(value - _divided(mid, 255.0), tl.where(grey, 1.0, spread))
    to_red = _distance(red, high, mid, part)
    to_green = _distance(green, high, mid, part)
    to_blue = _distance(blue, high, mid, part)
    sector = tl.where(green == high, 2.0 + to_red - to_blue, 4.0 + to_green - to_red)
    sector = tl.where(red == high, to_blue - to_green, sector)
    turn = _divided(sector, 6.0) + 1.0
    turn = turn - tl.floor(turn) + factor
    turn = (turn - tl.floor(turn)) * 6.0
    sector = tl.floor(turn)
    part = turn - sector
    sector = tl.where(sector == 6.0, 0.0, sector).to(tl.int32)
    # value / 255 is no less than what is taken off it: all stay in the unit interval.
    low = _level(value * (1.0 - saturation))
    mid = _level(value * (1.0 - saturation * tl.where(sector % 2 == 0, 1.0 - part, part)))
    red = tl.where((sector == 0) | (sector == 5), high,
                   tl.where((sector == 1) | (sector == 4), mid, low))  # fmt: skip
    green = tl.where((sector == 1) | (sector == 2), high,
                     tl.where((sector == 0) | (sector == 3), mid, low))  # fmt: skip
    blue = tl.where((sector == 3) | (sector == 4), high,
                    tl.where((sector == 2) | (sector == 5), mid, low))  # fmt: skip
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
def _load(image_ptr, visible_ptr, n, pixels, columns, row_stride, WIDTH: tl.constexpr,
          PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, PATCH: tl.constexpr,
          VISIBLE: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """Pixel n of the picture, patch after patch where it is its visible patches: (red, green, blue
    as fp32, its offset in the output)."""
    inside = n < pixels
    if VISIBLE:
        patch = tl.load(visible_ptr + n // (PATCH * PATCH), mask=inside, other=0)
        y = patch // columns * PATCH + n % (PATCH * PATCH) // PATCH
        x = patch % columns * PATCH + n % PATCH
    else:
        y, x = n // WIDTH, n % WIDTH
    at = (y * WIDTH + x) * 3 if VISIBLE else n * 3
    source = image_ptr + (at if DENSE else y * row_stride + x * PIXEL_STRIDE)
    red = tl.load(source, mask=inside, other=0).to(tl.float32)
    green = tl.load(source + CHANNEL_STRIDE, mask=inside, other=0).to(tl.float32)
    blue = tl.load(source + 2 * CHANNEL_STRIDE, mask=inside, other=0).to(tl.float32)
    return red, green, blue, at


@triton.jit
def color_jitter_sum_kernel(
    image_ptr, sums_ptr, factors_ptr, order_ptr, steps_ptr, before_ptr, apply_ptr, visible_ptr,
    pixels, columns, image_stride, row_stride, WIDTH: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr, PATCH: tl.constexpr, VISIBLE: tl.constexpr, DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, i): the sum of grey over block i of image b, after the steps before contrast."""
    b, block = tl.program_id(0), tl.program_id(1)
    total = 0
    if tl.load(apply_ptr + b) != 0:
        order = tl.load(order_ptr + b)
        n = block * BLOCK + tl.arange(0, BLOCK)
        red, green, blue, _ = _load(
            image_ptr + b.to(tl.int64) * image_stride,
            visible_ptr + b * (pixels // (PATCH * PATCH)), n,
            pixels, columns, row_stride, WIDTH, PIXEL_STRIDE, CHANNEL_STRIDE, PATCH, VISIBLE, DENSE,
        )  # fmt: skip
        red, green, blue = _steps(
            red, green, blue, factors_ptr + b * 4, tl.load(steps_ptr + order),
            tl.load(before_ptr + order), 0.0,
        )  # fmt: skip
        total = tl.sum(tl.where(n < pixels, _grey(red, green, blue), 0.0).to(tl.int32), 0)
    tl.store(sums_ptr + b * tl.num_programs(1) + block, total)


@triton.jit
def color_jitter_kernel(
    image_ptr, out_ptr, sums_ptr, factors_ptr, order_ptr, steps_ptr, apply_ptr, gray_ptr,
    visible_ptr, pixels, columns, image_stride, row_stride, out_stride, WIDTH: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, PATCH: tl.constexpr,
    VISIBLE: tl.constexpr, DENSE: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, i): block i of image b."""
    b, block = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(1)
    each = tl.arange(0, SUMS)
    sums = tl.load(sums_ptr + b * blocks + each, mask=each < blocks, other=0)
    mean = (tl.sum(sums.to(tl.int64), 0).to(tl.float64) / pixels).to(tl.float32)
    steps = tl.load(steps_ptr + tl.load(order_ptr + b))
    count = tl.where(tl.load(apply_ptr + b) != 0, 4, 0)

    n = block * BLOCK + tl.arange(0, BLOCK)
    red, green, blue, at = _load(
        image_ptr + b.to(tl.int64) * image_stride, visible_ptr + b * (pixels // (PATCH * PATCH)), n,
        pixels, columns, row_stride, WIDTH, PIXEL_STRIDE, CHANNEL_STRIDE, PATCH, VISIBLE, DENSE,
    )  # fmt: skip
    red, green, blue = _steps(red, green, blue, factors_ptr + b * 4, steps, count, mean)
    if tl.load(gray_ptr + b) != 0:
        red = _grey(red, green, blue)
        green, blue = red, red
    out_ptr += b.to(tl.int64) * out_stride
    inside = n < pixels
    tl.store(out_ptr + at, red.to(tl.uint8), mask=inside)
    tl.store(out_ptr + at + 1, green.to(tl.uint8), mask=inside)
    tl.store(out_ptr + at + 2, blue.to(tl.uint8), mask=inside)


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
    whole = visible is None
    pixels = height * width if visible is None else visible.shape[1] * patch**2
    blocks = triton.cdiv(pixels, BLOCK)
    out = image.new_empty(image.shape) if whole else image.new_zeros(image.shape)
    sums = image.new_empty(batch, blocks, dtype=torch.int32)
    steps, before = _order_tables(image.device)
    image_stride, row_stride, pixel_stride, channel_stride = image.stride()
    flags: Any = (apply.contiguous().view(torch.uint8), gray.contiguous().view(torch.uint8))
    factors, order = factors.contiguous(), order.contiguous()
    shown = image if visible is None else visible.contiguous()  # not read for whole images
    sizes: Any = (pixels, width // patch, image_stride, row_stride)
    dense = (row_stride, pixel_stride, channel_stride) == (width * 3, 3, 1)
    constants: Any = {
        "WIDTH": width, "PIXEL_STRIDE": pixel_stride, "CHANNEL_STRIDE": channel_stride,
        "PATCH": patch, "VISIBLE": not whole, "DENSE": dense, "BLOCK": BLOCK, "num_warps": 4,
        "enable_fp_fusion": False,
    }  # fmt: skip
    color_jitter_sum_kernel[(batch, blocks)](
        image, sums, factors, order, steps, before, flags[0], shown, *sizes, **constants
    )
    color_jitter_kernel[(batch, blocks)](
        image, out, sums, factors, order, steps, *flags, shown, *sizes, height * width * 3,
        SUMS=triton.next_power_of_2(blocks), **constants,
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


@triton.jit(do_not_specialize=["seed", "stream"])
def jitter_parameters_kernel(
    sample_ptr, factors_ptr, order_ptr, apply_ptr, gray_ptr, batch, seed, epoch_ptr, stream,
    low0, low1, low2, low3, span0, span1, span2, span3, probability, grayscale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: the parameters of BLOCK samples, from words 0 .. 6 of their stream."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < batch
    sample = tl.load(sample_ptr + b, mask=inside, other=0)
    epoch = tl.load(epoch_ptr)
    u0, u1, u2, u3 = uniforms(seed, epoch, sample, stream, 0)
    tl.store(factors_ptr + b * 4, low0 + span0 * u0, mask=inside)
    tl.store(factors_ptr + b * 4 + 1, low1 + span1 * u1, mask=inside)
    tl.store(factors_ptr + b * 4 + 2, low2 + span2 * u2, mask=inside)
    tl.store(factors_ptr + b * 4 + 3, low3 + span3 * u3, mask=inside)
    u4, u5, u6, _ = uniforms(seed, epoch, sample, stream, 1)
    tl.store(order_ptr + b, (u4 * _ORDERS).to(tl.int32), mask=inside)
    tl.store(apply_ptr + b, (u5 < probability).to(tl.uint8), mask=inside)
    tl.store(gray_ptr + b, (u6 < grayscale).to(tl.uint8), mask=inside)


@torch.library.custom_op("relaxmim::jitter_parameters", mutates_args=())
def _jitter_parameters(
    sample: Tensor,
    seed: int,
    epoch: Tensor,
    stream: int,
    low: list[float],
    span: list[float],
    probability: float,
    grayscale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, block = len(sample), 128
    factors = sample.new_empty(batch, 4, dtype=torch.float32)
    order = sample.new_empty(batch, dtype=torch.int32)
    flags = [sample.new_empty(batch, dtype=torch.bool) for _ in range(2)]
    jitter_parameters_kernel[(triton.cdiv(batch, block),)](
        sample.contiguous(), factors, order, *(flag.view(torch.uint8) for flag in flags), batch,
        seed, epoch, stream, *low, *span, probability, grayscale, BLOCK=block, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return factors, order, flags[0], flags[1]


@_jitter_parameters.register_fake
def _(
    sample: Tensor,
    seed: int,
    epoch: Tensor,
    stream: int,
    low: list[float],
    span: list[float],
    probability: float,
    grayscale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flags = [sample.new_empty(len(sample), dtype=torch.bool) for _ in range(2)]
    factors = sample.new_empty(len(sample), 4, dtype=torch.float32)
    return factors, sample.new_empty(len(sample), dtype=torch.int32), flags[0], flags[1]


def jitter_parameters_triton(
    sample: Tensor,
    *,
    seed: int,
    epoch: Epoch,
    stream: int,
    low: list[float],
    span: list[float],
    probability: float,
    grayscale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`jitter_parameters` by the kernel; arguments already checked."""
    return _jitter_parameters(
        sample, seed, on_device(epoch, sample), stream, low, span, probability, grayscale
    )

"""Triton kernel of `cutmix`: a program draws its image's box and writes some of its rows.

The draws cost a few registers, so every program of an image makes them again and nothing else is
launched.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.philox import Epoch, on_device
from pipeline.kernels.philox_triton import uniforms

BLOCK = 4096  # values of a program


@triton.jit(do_not_specialize=["seed", "stream"])
def cutmix_kernel(
    image_ptr, out_ptr, sample_ptr, probability, seed, epoch_ptr, stream, batch, step, values,
    height, image_stride, row_stride, WIDTH: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, i) writes values i BLOCK .. (i + 1) BLOCK - 1 of image b."""
    b = tl.program_id(0)
    mix, cy, cx, drawn = uniforms(seed, tl.load(epoch_ptr), tl.load(sample_ptr + b), stream, 0)
    side = tl.sqrt_rn(1.0 - mix)
    half_y, half_x = (side * height).to(tl.int32) >> 1, (side * WIDTH).to(tl.int32) >> 1
    half_y = tl.where(drawn < probability, half_y, 0)  # no box at all
    centre_y, centre_x = (cy * height).to(tl.int32), (cx * WIDTH).to(tl.int32)

    top, bottom = centre_y - half_y, centre_y + half_y
    left, right = centre_x - half_x, centre_x + half_x
    own = image_ptr + b.to(tl.int64) * image_stride
    neighbour = image_ptr + ((b + step + batch) % batch).to(tl.int64) * image_stride

    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < values
    if DENSE:
        # 16 values of a row, one wide word, are read from the images that show any of them.
        y = n // 16 * 16 // (WIDTH * 3)
        first = n // 16 * 16 - y * (WIDTH * 3)
        rows = (y >= top) & (y < bottom)
        some = rows & (first + 15 >= left * 3) & (first < right * 3)
        every = rows & (first >= left * 3) & (first + 15 < right * 3)
        value = tl.load(own + n, mask=inside & (every == 0), other=0)
        other = tl.load(neighbour + n, mask=inside & some, other=0)
        at = first + n % 16
        value = tl.where(rows & (at >= left * 3) & (at < right * 3), other, value)
    else:
        y, x = n // (WIDTH * 3), n % (WIDTH * 3) // 3
        box = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        at = y * row_stride + x * PIXEL_STRIDE + n % 3 * CHANNEL_STRIDE
        value = tl.load(tl.where(box, neighbour, own) + at, mask=inside, other=0)
    tl.store(out_ptr + b.to(tl.int64) * values + n, value, mask=inside)


@torch.library.custom_op("relaxmim::cutmix", mutates_args=())
def _cutmix(
    image: Tensor,
    sample: Tensor,
    probability: float,
    seed: int,
    epoch: Tensor,
    stream: int,
    step: int,
) -> Tensor:
    batch, height, width, _ = image.shape
    out, values = image.new_empty(image.shape), height * width * 3
    image_stride, row_stride, pixel_stride, channel_stride = image.stride()
    dense = (row_stride, pixel_stride, channel_stride) == (width * 3, 3, 1) and width % 16 == 0
    cutmix_kernel[(batch, triton.cdiv(values, BLOCK))](
        image, out, sample.contiguous(), probability, seed, epoch, stream, batch, step, values,
        height, image_stride, row_stride, WIDTH=width, PIXEL_STRIDE=pixel_stride,
        CHANNEL_STRIDE=channel_stride, DENSE=dense, BLOCK=BLOCK, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


@_cutmix.register_fake
def _(
    image: Tensor,
    sample: Tensor,
    probability: float,
    seed: int,
    epoch: Tensor,
    stream: int,
    step: int,
) -> Tensor:
    return image.new_empty(image.shape)


def cutmix_triton(
    image: Tensor,
    sample: Tensor,
    probability: float,
    *,
    seed: int,
    epoch: Epoch,
    stream: int,
    step: int,
) -> Tensor:
    """`cutmix` by the kernel; arguments already checked."""
    return _cutmix(image, sample, probability, seed, on_device(epoch, sample), stream, step)

"""What the image-reading kernels share: where a patch's values are, and their normalisation."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def patch_start(row, inside, positions_ptr, per_image, columns, image_stride, row_stride,
                PATCH: tl.constexpr, PIXEL_STRIDE: tl.constexpr):  # fmt: skip
    """Offset of the first value of patch number positions[row], row = (image, slot): int64."""
    position = tl.load(positions_ptr + row, mask=inside, other=0)
    image = (row // per_image).to(tl.int64)
    down, across = position // columns, position % columns
    return image * image_stride + down * PATCH * row_stride + across * (PATCH * PIXEL_STRIDE)


@triton.jit
def value_offset(j, row_stride, PATCH: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
                 CHANNEL_STRIDE: tl.constexpr):  # fmt: skip
    """Offset of value j = (p, q, channel) from the start of its patch."""
    line = (j // (3 * PATCH)) * row_stride
    if PIXEL_STRIDE == 3 and CHANNEL_STRIDE == 1:
        # One run of 3 * PATCH bytes a line: the compiler sees it and loads it in wide words.
        return line + j % (3 * PATCH)
    else:
        return line + (j // 3) % PATCH * PIXEL_STRIDE + j % 3 * CHANNEL_STRIDE


@triton.jit
def normalised(values, j, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """(x / 255 - mean) / std of uint8 values number j of a patch, as fp32."""
    channel = j % 3
    scale = tl.where(channel == 0, SCALE[0], tl.where(channel == 1, SCALE[1], SCALE[2]))
    shift = tl.where(channel == 0, SHIFT[0], tl.where(channel == 1, SHIFT[1], SHIFT[2]))
    return values.to(tl.float32) * scale - shift


def image_strides(image: Tensor) -> dict[str, int]:
    """The stride arguments of a kernel that reads this image, by name."""
    names = ("image_stride", "row_stride", "PIXEL_STRIDE", "CHANNEL_STRIDE")
    return dict(zip(names, image.stride(), strict=True))


def as_list(values: Sequence[float]) -> list[float]:
    """Floats for an operator's schema."""
    return [float(v) for v in values]

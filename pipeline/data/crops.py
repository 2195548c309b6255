"""Which rectangle of a picture becomes the image: random resized crops and centre crops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import UserError

Interpolation = Literal["bicubic", "bilinear"]
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)


@dataclass(frozen=True)
class Box:
    """The rectangle of the source (pixels, may be fractional) that becomes the output.

    inside: the filter sees nothing outside the rectangle (crop, then resize); otherwise it may
    (resize, then crop). An inside rectangle has whole numbers.
    """

    left: float
    top: float
    right: float
    bottom: float
    inside: bool = True


# (width, height) of the picture → the rectangle to take, and whether to mirror it.
Choose = Callable[[int, int], tuple[Box, bool]]


@dataclass(frozen=True)
class Crop:
    """RandomResizedCrop + horizontal flip: share of the area, aspect ratio, output size.

    scale (0.2, 1) is MAE's pretraining crop; (0.08, 1) is the usual one of supervised training.
    """

    image_size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    interpolation: Interpolation = "bicubic"

    UNIFORMS = 23  # random numbers that one crop takes

    def __post_init__(self) -> None:
        _check_output(self.image_size, self.interpolation)
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise UserError(
                    f"crop {name} ({low}, {high}): needs 0 < low <= high"
                    + (" <= 1" if name == "scale" else "")
                )

    def choose(self, uniform: Sequence[float]) -> Choose:
        """The crop for `uniform`, 23 numbers in [0, 1): ten tries (area, ratio), place, flip.

        The distribution is that of torchvision's RandomResizedCrop and RandomHorizontalFlip.
        """
        return lambda width, height: (
            _random_box(width, height, self, uniform),
            self.flip and uniform[22] < 0.5,
        )


def side_at(sizes: Sequence[tuple[int, int]], step: int) -> int:
    """The side of the crops of an optimizer step. sizes: (step before which a phase ends, side),
    the phases of a run in order; the last one has what comes after it too."""
    return next((side for until, side in sizes if step < until), sizes[-1][1])


def shorter_side(image_size: int) -> int:
    """Pixels of the shorter side before an evaluation's centre crop: 256 / 224 of the image size up
    to 224, rounded down, above it the image size. Source: facebookresearch/mae, `util/datasets.py`
    (crop_pct).
    """
    return image_size * 256 // 224 if image_size <= 224 else image_size


@dataclass(frozen=True)
class CentreCrop:
    """Resize the shorter side to `resize` pixels, then cut the centre `image_size` square."""

    image_size: int = 224
    resize: int = 256
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _check_output(self.image_size, self.interpolation)
        if self.resize < self.image_size:
            raise UserError(
                f"centre crop: resize {self.resize} is smaller than image_size {self.image_size}"
            )

    def __call__(self, width: int, height: int) -> tuple[Box, bool]:
        short = min(width, height)
        wide, high = self.resize * width // short, self.resize * height // short
        left, top = round((wide - self.image_size) / 2), round((high - self.image_size) / 2)
        x, y = width / wide, height / high  # source pixels per resized pixel
        right, bottom = left + self.image_size, top + self.image_size
        return Box(left * x, top * y, right * x, bottom * y, inside=False), False


def _check_output(image_size: int, interpolation: str) -> None:
    if not 1 <= image_size <= 4096:
        raise UserError(f"image_size {image_size}: must be between 1 and 4096 pixels")
    if interpolation not in INTERPOLATIONS:
        valid = ", ".join(INTERPOLATIONS)
        raise UserError(f"interpolation {interpolation!r}: must be one of {valid}")


def _random_box(width: int, height: int, crop: Crop, uniform: Sequence[float]) -> Box:
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for attempt in range(10):
        share, shape = uniform[2 * attempt : 2 * attempt + 2]
        area = width * height * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(uniform[20] * (width - w + 1))
            top = int(uniform[21] * (height - h + 1))
            return Box(left, top, left + w, top + h)
    # No try fitted: the largest centred rectangle of an allowed ratio.
    w = min(width, max(1, round(height * crop.ratio[1])))
    h = min(height, max(1, round(width / crop.ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return Box(left, top, left + w, top + h)

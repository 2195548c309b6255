"""Colour jitter with its own parameters and order per image, on uint8.

Semantics of torchvision's ColorJitter on uint8 tensors, rounding down to uint8 after each step:

    blend(x, y, f) = clamp(f x + (1 - f) y, 0, 255)        grey(x) = .2989 R + .587 G + .114 B
    0 brightness   blend(x, 0, f)
    1 contrast     blend(x, mean over pixels of grey(x), f)
    2 saturation   blend(x, grey(x), f)
    3 hue          RGB -> HSV, h = (h + f) mod 1, HSV -> RGB

Where `visible` is given, the picture is its visible patches: only they are read and jittered,
contrast's mean is taken over them, and hidden pixels are written as 0.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels import backend, philox
from pipeline.kernels.color_jitter.reference import (
    color_jitter_reference,
    jitter_parameters_reference,
)
from pipeline.kernels.patches import check_positions, grid_of
from pipeline.kernels.philox import Epoch
from pipeline.kernels.streams import Stream


def jitter_parameters(
    sample: Tensor,
    *,
    seed: int,
    epoch: Epoch,
    view: int,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 0.8,
    grayscale: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the parameters of `color_jitter`; the defaults are SimSiam's, without its grayscale.

    sample: int64 [B]; view: 0 for T1, 1 for T2, 2 for the image of both. A strength s draws from
    [max(0, 1-s), 1+s], hue from [-hue, hue] turns. Returns (factors float32 [B,4], order int32 [B],
    apply bool [B], gray bool [B]). Raises ValueError for a hue above 0.5 or a negative strength.
    """
    strengths = (brightness, contrast, saturation)
    if min(*strengths, hue) < 0 or hue > 0.5:
        raise ValueError(f"jitter strengths must be >= 0 and hue <= 0.5, not {strengths}, {hue}")
    philox.check_key(sample, seed, epoch)
    low = np.array([max(0.0, 1 - s) for s in strengths] + [-hue], np.float32)
    span = np.array([1 + s for s in strengths] + [hue], np.float32) - low
    if backend.implementation() == "triton":
        from pipeline.kernels.color_jitter.triton import jitter_parameters_triton as run
    else:
        run = jitter_parameters_reference
    return run(
        sample,
        seed=seed,
        epoch=epoch,
        stream=Stream.JITTER + view,
        low=low.tolist(),
        span=span.tolist(),
        probability=probability,
        grayscale=grayscale,
    )


def color_jitter(
    image: Tensor,
    factors: Tensor,
    order: Tensor,
    apply: Tensor,
    gray: Tensor,
    *,
    visible: Tensor | None = None,
    patch: int | None = None,
) -> Tensor:
    """Jitter each image with its own parameters.

    image: uint8 [B,H,W,3], any strides; factors: float32 [B,4], multipliers of brightness,
    contrast, saturation, and hue shift in turns; order: int32 [B], number of a permutation in
    ORDERS; apply, gray: bool [B], whether to jitter, and whether to end in grey;
    visible: int32 [B,K] with patch, or None for the whole image.
    Returns uint8 [B,H,W,3], contiguous. Raises ValueError for shapes that do not fit.
    """
    batch = len(image)
    wanted = {
        "factors": (factors, torch.float32, (batch, 4)),
        "order": (order, torch.int32, (batch,)),
        "apply": (apply, torch.bool, (batch,)),
        "gray": (gray, torch.bool, (batch,)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
            )
    if (visible is None) != (patch is None):
        raise ValueError("color_jitter takes visible and patch together, or neither")
    grid_of(image, patch or 1)
    if visible is not None:
        check_positions("visible", visible, image)
    if backend.implementation() == "triton":
        from pipeline.kernels.color_jitter.triton import color_jitter_triton as run
    else:
        run = color_jitter_reference
    return run(image, factors, order, apply, gray, visible=visible, patch=patch)

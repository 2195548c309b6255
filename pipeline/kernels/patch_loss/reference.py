"""`patch_loss` in PyTorch: the CPU path, and what the kernel is tested against."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.patches import gather_patches, normalise

EPSILON = 1e-6


def patch_target(
    image: Tensor,
    region: Tensor,
    *,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The target of `patch_loss`: dtype [B,R,p*p*3]."""
    pixels = normalise(gather_patches(image, region, patch), mean, std, dtype)
    if norm_pix:
        # Layer norm divides by n where the target divides by n - 1: the rest is a constant.
        n = pixels.shape[-1]
        unbiased = (n - 1) / n
        scale = pixels.new_full((n,), unbiased**0.5)
        pixels = F.layer_norm(pixels, (n,), weight=scale, eps=EPSILON * unbiased)
    return pixels


def patch_loss_reference(
    prediction: Tensor,
    image: Tensor,
    region: Tensor,
    *,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool = True,
    other: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`patch_loss` in PyTorch; arguments already checked."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    target = patch_target(
        image, region, patch=patch, mean=mean, std=std, norm_pix=norm_pix, dtype=exact
    )
    error = _mean_square(prediction.to(exact), target, weight)
    if other is None:
        return torch.stack([error, torch.zeros_like(error)])
    return torch.stack([error, _mean_square(other.to(exact), prediction.to(exact), weight)])


def _mean_square(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over values, then weighted mean over patches, then mean over samples."""
    if weight is None:  # every sample has as many patches: one mean over everything
        return F.mse_loss(a, b)
    difference = a - b
    error = (difference * difference).mean(-1)
    return ((error * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()

"""Patch-normalised squared error on a region, both terms of Eq. 8 of the paper in one pass.

    y[b,r,:]  = (patch number region[b,r] of image b / 255 - mean) / std
    target    = (y - mean(y)) / sqrt(var(y) + 1e-6)    over the p*p*3 values, unbiased variance
    e1[b,r]   = mean over p*p*3 of (prediction - target)^2
    e2[b,r]   = mean over p*p*3 of (other - prediction)^2
    loss_i    = mean over b of  sum_r weight[b,r] e_i[b,r] / max(sum_r weight[b,r], 1)

With prediction = d(z2) and other = d(z1), e1 is the reconstruction term and e2 the relaxed one;
the gradient goes to both, nothing is detached. MAE is e1 alone. In fp32, in the order of MAE's
patchify (p, q, channel).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels import backend
from pipeline.kernels.patches import check_positions, gather_patches, grid_of, normalise

EPSILON = 1e-6


def patch_loss(
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
    """Mean squared error of predicted patches, and between two predictions.

    prediction, other: [B,R,p*p*3]; image: uint8 [B,H,W,3], any strides; region: int32 [B,R],
    positions; weight: float32 [B,R] of 0 or 1, None meaning all 1; mean, std: in 0..1 units.
    Returns float32 [2]: (to the target, to `other` or 0). Gradients: prediction and other.
    Raises ValueError for shapes that do not fit.
    """
    grid_of(image, patch)
    check_positions("region", region, image)
    if not region.numel():
        raise ValueError("region is empty: there is no patch to take the mean over")
    shape = (*region.shape, patch * patch * 3)
    if prediction.shape != shape or (other is not None and other.shape != shape):
        found = [list(t.shape) for t in (prediction, other) if t is not None]
        raise ValueError(f"predictions must be {list(shape)}, not {found}")
    if weight is not None and (weight.dtype != torch.float32 or weight.shape != region.shape):
        raise ValueError(
            f"weight must be float32 {list(region.shape)}, not {weight.dtype} {list(weight.shape)}"
        )
    if backend.implementation() == "triton":
        from pipeline.kernels.patch_loss.triton import patch_loss_triton as run
    else:
        run = patch_loss_reference
    settings: Any = {"patch": patch, "mean": mean, "std": std, "norm_pix": norm_pix}
    return run(prediction, image, region, other=other, weight=weight, **settings)


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

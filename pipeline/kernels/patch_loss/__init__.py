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
from torch import Tensor

from pipeline.kernels import backend
from pipeline.kernels.patch_loss.reference import patch_loss_reference
from pipeline.kernels.patches import check_positions, grid_of


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

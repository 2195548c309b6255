"""Patch embedding of the visible patches, straight from the uint8 image.

    x[b,k,:]   = (patch number visible[b,k] of image b / 255 - mean) / std      (p*p*3 values)
    out[b,k,:] = weight x[b,k,:] + bias + position[visible[b,k],:]

The visible patches alone are read, and the embedding of a hidden patch is never computed.
The image has no gradient.

Under torch.autocast x, weight and, for weight's gradient, the gradient of out are rounded to
autocast's dtype before they are multiplied; the sums, bias, position and out keep theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.kernels import backend
from pipeline.kernels.embed_visible.reference import embed_visible_reference
from pipeline.kernels.patches import check_positions, grid_of


def embed_visible(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Embed the visible patches.

    image: uint8 [B,H,W,3], any strides; visible: int32 [B,K], positions below L;
    weight: [D,3,p,p]; bias: [D]; position: [L,D] or None; mean, std: per channel, in 0..1 units.
    Returns [B,K,D] in weight's dtype. Gradients: weight, bias, position.
    Raises ValueError for shapes that do not fit.
    """
    patch = weight.shape[-1]
    rows, columns = grid_of(image, patch)
    check_positions("visible", visible, image)
    if weight.shape[1:] != (3, patch, patch) or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weight must be [D,3,p,p] and bias [D], not {list(weight.shape)}, {list(bias.shape)}"
        )
    if position is not None and position.shape != (rows * columns, len(weight)):
        raise ValueError(
            f"position must be [{rows * columns},{len(weight)}], not {list(position.shape)}"
        )
    if backend.implementation() == "triton":
        from pipeline.kernels.embed_visible.triton import embed_visible_triton as run
    else:
        run = embed_visible_reference
    factors = _dtype_of_factors(weight)
    return run(image, visible, weight, bias, position, mean=mean, std=std, factors=factors)


def _dtype_of_factors(weight: Tensor) -> torch.dtype:
    """What is multiplied is rounded to this: autocast's dtype where it is on, else weight's."""
    device = weight.device.type
    follows = device != "meta" and weight.dtype != torch.float64  # neither knows autocast
    if follows and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype

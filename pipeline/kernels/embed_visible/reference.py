"""`embed_visible` in PyTorch: the CPU path, and what the kernel is tested against."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.patches import gather_patches, normalise


def embed_visible_reference(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """`embed_visible` in PyTorch; arguments already checked."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    patches = gather_patches(image, visible, weight.shape[-1])
    pixels = normalise(patches, mean, std, exact).to(weight.dtype)
    tokens = F.linear(pixels, weight.permute(0, 2, 3, 1).flatten(1), bias)
    if position is not None:
        tokens = tokens + F.embedding(visible, position)
    return tokens.to(weight.dtype)

"""What the image-reading ops share: checks, and reading patches of a uint8 image by position.

A position counts patches in rows, then columns; inside a patch the order is (p, q, channel).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_of(image: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches. ValueError unless image is uint8 [B,H,W,3] that patch tiles."""
    if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[3] != 3:
        raise ValueError(f"image must be uint8 [B,H,W,3], not {image.dtype} {list(image.shape)}")
    height, width = image.shape[1:3]
    if height % patch or width % patch:
        raise ValueError(f"patch size {patch} does not tile an image of {height} x {width} pixels")
    return height // patch, width // patch


def check_positions(name: str, positions: Tensor, image: Tensor) -> None:
    """ValueError unless positions is int32 [B,K] for the batch of image."""
    if positions.dtype != torch.int32 or positions.dim() != 2:
        raise ValueError(
            f"{name} must be int32 [B,K], not {positions.dtype} {list(positions.shape)}"
        )
    if positions.shape[0] != image.shape[0]:
        raise ValueError(
            f"{name} is for {positions.shape[0]} images, but there are {image.shape[0]}"
        )


def gather_patches(image: Tensor, positions: Tensor, patch: int) -> Tensor:
    """Read patches: image uint8 [B,H,W,3] (any strides), positions int32 [B,K] -> [B,K,p,p,3]."""
    columns = grid_of(image, patch)[1]
    grid = image.unflatten(2, (columns, patch)).unflatten(1, (-1, patch))
    batch = torch.arange(len(image), device=image.device)[:, None]
    return grid[batch, positions // columns, :, positions % columns]


def channel_scale(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """(scale, shift) per channel with (x / 255 - mean) / std = x * scale - shift."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std need three values, std > 0, not {mean} and {std}")
    pairs = list(zip(mean, std, strict=True))
    return [1 / (255 * s) for _, s in pairs], [m / s for m, s in pairs]


def normalise(
    patches: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """(x / 255 - mean) / std of uint8 [B,K,p,p,3], as dtype [B,K,p*p*3]."""
    scale, shift = channel_scale(mean, std)
    flat = patches.flatten(2).to(dtype)
    # Whole-patch vectors: broadcasting over an inner axis of three is slow on a CPU.
    factors = torch.tensor([scale, shift], dtype=dtype, device=flat.device)
    factor, less = factors.repeat(1, flat.shape[2] // 3)
    return torch.addcmul(less.neg_(), flat, factor)

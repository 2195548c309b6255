"""Position tables at another image size: recomputed, or interpolated as their project does."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from pipeline.errors import UserError
from pipeline.method.vit import sincos_position

# What rounding to bf16 may change of a sine or cosine.
_ROUNDING = 2**-8


def is_sincos(table: Tensor, grid: tuple[int, int]) -> bool | None:
    """Whether a table [L, D] is the fixed sin-cos one of a grid: True with the row first (MoCo v3),
    False with the column first (MAE), None where it is neither.
    """
    if table.shape[1] % 4:
        return None
    for row_first in (False, True):
        exact = sincos_position(grid, table.shape[1], row_first=row_first)[1:]
        if torch.allclose(table.float(), exact, rtol=0, atol=_ROUNDING):
            return row_first
    return None


def square(length: int) -> int | None:
    """The side of a square of `length` patches, or None."""
    side = math.isqrt(max(length, 0))
    return side if side and side * side == length else None


def resize_positions(table: Tensor, prefix: int, grid: tuple[int, int], how: str) -> Tensor:
    """A position table [1, prefix + L, D] for patches in `grid` rows and columns.

    how: see layouts.Layout.positions; a table that is not sin-cos is never recomputed, but
    interpolated (`bicubic`). UserError where the table is not of a square of patches.
    """
    side = square(table.shape[1] - prefix)
    if side is None:
        raise UserError(
            f"its position table has {table.shape[1]} entries, not a square of patches and "
            f"{prefix} further"
        )
    if (side, side) == tuple(grid):
        return table
    first, patches = table[:, :prefix], table[:, prefix:]
    if how == "timm":
        return resample_abs_pos_embed(
            table, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix
        )
    if how == "exact" and (row_first := is_sincos(patches[0], (side, side))) is not None:
        made = sincos_position(grid, table.shape[2], row_first=row_first)[None, 1:]
        return torch.cat([first, made.to(table.dtype)], dim=1)
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if how == "scale":
        scale = [(new + 0.1) / side for new in grid]
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([first, image.flatten(2).mT.to(table.dtype)], dim=1)

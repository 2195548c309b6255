"""Pictures of what a model sees and predicts: original | masked | prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.method.objective import Objective
from pipeline.method.views import View, every_patch, make_views

GREY = 127


def fold(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Patches [B, L, p·p·3] in the order (row, column, channel) → image [B, H, W, 3]."""
    batch = patches.shape[0]
    x = patches.view(batch, *grid, patch, patch, 3).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, grid[0] * patch, grid[1] * patch, 3)


def shown(view: View, grid: tuple[int, int], patch: int) -> Tensor:
    """The view as an encoder sees it, masked patches grey: uint8 [B, H, W, 3]."""
    return paste(view.image.new_tensor(GREY), view, grid, patch)


@torch.no_grad()
def draw(objective: Objective, image: Tensor, sample: Tensor) -> Tensor:
    """A grid for uint8 images [B, H, W, 3]: one row per image, uint8 [B·H, C·W, 3].

    Reconstruction: original | T1(x) | prediction in masked patches | full prediction; with
    norm_pix the predictions are un-normalised with the true mean and deviation of each patch.
    Contrastive: original | T1(x) | T2(x). Collective under ZeRO-3.
    """
    grid, patch, recipe = objective.encoder.grid, objective.encoder.patch, objective.recipe
    crop = image if recipe.views.second == "crop" else None
    views = make_views(image, sample, recipe=recipe, epoch=0, patch=patch, crop=crop)
    columns = [image, shown(views.first, grid, patch)]
    if objective.reconstructs:
        prediction = as_pixels(decode(objective, views.first, views.target))
        columns += [paste(prediction, views.first, grid, patch), prediction]
    elif views.second is not None:
        columns.append(shown(views.second, grid, patch))
    rows = torch.cat(columns, dim=2)
    return rows.reshape(-1, *rows.shape[2:])


def paste(prediction: Tensor, view: View, grid: tuple[int, int], patch: int) -> Tensor:
    """The prediction in masked patches, the original in visible ones: uint8 [B, H, W, 3]."""
    visible = (view.inverse < view.visible.shape[1]).view(-1, *grid)
    pixels = visible.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[..., None]
    return torch.where(pixels, view.image, prediction)


def as_pixels(values: Tensor) -> Tensor:
    """Values, clipped to 0 … 1, as uint8 of the same shape."""
    return (values * 255).round().clamp(0, 255).to(torch.uint8)


def decode(objective: Objective, view: View, target: Tensor) -> Tensor:
    """The full image as decoded from a view: float32 [B, H, W, 3], pixels 0 … 1, not clipped.

    target: uint8 [B, H, W, 3], whose true patch statistics un-normalise a norm_pix prediction.
    """
    measure, data = objective.measure, objective.recipe.data
    values = measure.reconstruct(objective.encoder(*view), view).float()
    everything = every_patch(target, measure.patch)
    pixels = kernels.patch_target(
        target, everything, patch=measure.patch, mean=data.mean, std=data.std, norm_pix=False
    )
    if measure.recipe.norm_pix:
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        values = values * (variance + 1e-6).sqrt() + mean
    image = fold(values, objective.encoder.grid, measure.patch)
    return image * image.new_tensor(data.std) + image.new_tensor(data.mean)

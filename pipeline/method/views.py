"""T: from a batch of uint8 images to the pair of views (T1(x), T2(x)).

A View carries *visible* indices, never a 0/1 mask. Every draw is a pure function of (seed, epoch,
sample number), so the views do not depend on device, rank or batch layout. One exception: which
image cutmix shows in its box is a neighbour in the micro-batch.

Which patches T1 masks is a policy of `masking`; what T2 shows is a relation to T1 (`views.second`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.config.recipe import JitterRecipe, Recipe
from pipeline.config.schema import ViewsRecipe
from pipeline.errors import UserError
from pipeline.kernels import philox
from pipeline.kernels.philox import Epoch
from pipeline.kernels.sample_masks.reference import masks_from
from pipeline.kernels.streams import Stream
from pipeline.method.checks import visible_counts
from pipeline.method.masking import Draw, select

FIRST, SECOND, BOTH = 0, 1, 2  # what a draw is for: T1, T2, or the image before both


class View(NamedTuple):
    """One transformation of a batch; `encoder(*view)` encodes it.

    image: uint8 [B, H, W, 3], jittered where the recipe says so; masked patches are never read.
    visible: int32 [B, K], positions of the visible patches.
    inverse: int32 [B, L], for each position its number among the visible (< K) or masked (>= K).
    """

    image: Tensor
    visible: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Views:
    """The pair (T1(x), T2(x)), and where a reconstruction measure takes its loss.

    second: None if T2 is the pixels of x (MAE).
    target: uint8 [B, H, W, 3], the image that the predictions are compared with.
    region: int32 [B, R], the positions of the loss: those masked by T1 (all if it masks none), or
        the share `views.predicted` of them.
    weight: float32 [B, R], 1 where T2 shows the patch and else 0; None: every position counts.
    """

    first: View
    second: View | None
    target: Tensor
    region: Tensor
    weight: Tensor | None


def make_views(
    image: Tensor,
    sample: Tensor,
    *,
    recipe: Recipe,
    epoch: Epoch,
    patch: int,
    crop: Tensor | None = None,
) -> Views:
    """Draw T1 and T2 for a batch.

    image: uint8 [B, H, W, 3]; sample: int64 [B], sample numbers; patch: side in pixels;
    crop: uint8 [B, H, W, 3], another crop of each image, for `views.second: crop` only.
    """
    if (crop is None) == (recipe.views.second == "crop"):
        raise UserError("views.second: crop needs a second crop; the others take none")
    v, seed, epoch = recipe.views, recipe.seed, philox.on_device(epoch, sample)
    grid = (image.shape[1] // patch, image.shape[2] // patch)
    masks = draw_masks(sample, v, seed=seed, epoch=epoch, grid=grid)
    jittered = partial(jitter, sample=sample, recipe=v.jitter, seed=seed, epoch=epoch)
    if v.jitter.where == "whole":  # one draw for both crops, which are parts of one image
        image = jittered(image, view=BOTH)
        crop = None if crop is None else jittered(crop, view=BOTH)

    def view(number: int, image: Tensor, visible: Tensor, inverse: Tensor) -> View:
        if v.cutmix:
            image = kernels.cutmix(image, sample, v.cutmix, seed=seed, epoch=epoch, view=number)
        if v.jitter.where == "visible":
            image = jittered(image, view=number, visible=visible, patch=patch)
        return View(image, visible, inverse)

    first = view(FIRST, image, masks.visible1, masks.inverse1)
    second = None
    if masks.visible2 is not None and masks.inverse2 is not None:
        source = image if crop is None else crop
        second = view(SECOND, source, masks.visible2, masks.inverse2)
    region = masks.hidden1 if masks.hidden1.shape[1] else masks.visible1
    if v.predicted < 1:
        region = part_of(region, v.predicted, sample, seed=seed, epoch=epoch)
    weight = None
    if v.second == "independent" and second is not None:
        slot = second.inverse.gather(1, region.long())
        weight = (slot < second.visible.shape[1]).float()
    return Views(first, second, image, region, weight)


def part_of(region: Tensor, share: float, sample: Tensor, *, seed: int, epoch: Epoch) -> Tensor:
    """A share of the positions int32 [B, R] of each sample (at least one), drawn without
    replacement: int32 [B, max(1, round(share R))]."""
    count = region.shape[1]
    kept = max(1, round(share * count))
    noise = philox.words(sample, seed=seed, epoch=epoch, stream=Stream.PREDICTED, count=count)
    chosen, _, _ = kernels.select_visible(noise, kept)
    return region.gather(1, chosen.long())


def draw_masks(
    sample: Tensor, views: ViewsRecipe, *, seed: int, epoch: Epoch, grid: tuple[int, int]
) -> kernels.Masks:
    """The visible sets of T1 and T2 for sample numbers int64 [B] on a grid of patches.

    `random` masks are drawn and sorted by one kernel; of other policies `select_visible` sorts the
    priorities. T2 shows what T1 masks, or all patches, or has its own draw of the policy.
    """
    length = grid[0] * grid[1]
    counts = visible_counts(views, length)
    policy = {"pixels": "random", "crop": "none"}.get(views.second, views.second)
    if views.mask == "random":
        return kernels.sample_masks(
            sample, seed=seed, epoch=epoch, length=length, visible=counts, policy=policy
        )

    def draw(view: int) -> tuple[Tensor, Tensor, Tensor]:
        return select(views.mask, Draw(sample, seed, epoch, view, grid, length - counts[view]))

    return masks_from(draw, policy)


def jitter(
    image: Tensor,
    sample: Tensor,
    recipe: JitterRecipe,
    *,
    seed: int,
    epoch: Epoch,
    view: int,
    visible: Tensor | None = None,
    patch: int | None = None,
) -> Tensor:
    """Colour jitter with SimSiam's operations, drawn per image and view.

    image and result: uint8 [B, H, W, 3]. With visible int32 [B, K], only those patches are
    jittered (contrast is taken about *their* mean grey, so no masked patch leaks) and the others
    are zero.
    """
    parameters = kernels.jitter_parameters(
        sample,
        seed=seed,
        epoch=epoch,
        view=view,
        brightness=recipe.brightness,
        contrast=recipe.contrast,
        saturation=recipe.saturation,
        hue=recipe.hue,
        probability=recipe.probability,
        grayscale=recipe.grayscale,
    )
    return kernels.color_jitter(image, *parameters, visible=visible, patch=patch)


def full_view(image: Tensor, patch: int) -> View:
    """The view that masks nothing, for features of full images. image: uint8 [B, H, W, 3]."""
    everything = every_patch(image, patch)
    return View(image, everything, everything)


def every_patch(image: Tensor, patch: int) -> Tensor:
    """The positions of all patches of images [B, H, W, 3]: int32 [B, L]."""
    length = (image.shape[1] // patch) * (image.shape[2] // patch)
    return torch.arange(length, dtype=torch.int32, device=image.device).repeat(len(image), 1)

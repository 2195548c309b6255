"""Check the recipe of an objective before any of it is built, without importing torch."""

from __future__ import annotations

from typing import Any

from pipeline.config.measure_schema import DecoderRecipe
from pipeline.config.recipe import Recipe
from pipeline.config.schema import EncoderRecipe, ViewsRecipe
from pipeline.config.timm_names import check_arch
from pipeline.errors import UserError


def check_objective(recipe: Recipe) -> None:
    """UserError if parts of a recipe cannot be built, or cannot work together."""
    encoder, options = recipe.encoder, vit_options(recipe.encoder)
    check_arch(encoder.arch, f"encoder.arch {encoder.arch!r}")
    width, heads = options.get("embed_dim"), options.get("num_heads")
    if width and heads and width % heads:
        raise UserError(f"encoder.options: embed_dim {width} is not divisible by num_heads {heads}")
    if encoder.patch_size:
        visible_counts(recipe.views, encoder.patches)
        check_sizes(recipe, encoder.patch_size)
    if recipe.measure.reconstructs:
        check_decoder(recipe.measure.decoder)
        check_table(recipe.measure.decoder.width)
    check_table(width)


def check_sizes(recipe: Recipe, patch: int) -> None:
    """UserError if a size of data.sizes cannot be cut into patches or masked as the recipe says."""
    for side in recipe.smaller_sides:
        if side % patch:
            raise UserError(f"data.sizes: {side} is not a multiple of the patch size {patch}")
        try:
            visible_counts(recipe.views, (side // patch) ** 2)
        except UserError as error:
            raise UserError(f"data.sizes: in images of {side} pixels {error}") from None


def check_table(width: int | None) -> None:
    """UserError if a width (None: not known) has no sin-cos position table."""
    if width and width % 4:
        raise UserError(f"a sin-cos position table needs a width divisible by 4, not {width}")


def check_decoder(decoder: DecoderRecipe) -> None:
    """UserError if the heads do not divide the width."""
    if decoder.width % decoder.heads:
        raise UserError(
            f"measure.decoder.width {decoder.width} is not divisible by its heads {decoder.heads}"
        )


def need_mae_decoder(recipe: Recipe) -> None:
    """UserError unless the decoder is one that MAE's code and transformers know."""
    if not recipe.measure.reconstructs:
        raise UserError("only a reconstruction measure has a decoder to write for MAE")
    if recipe.measure.decoder.attention != "self":
        raise UserError(
            "measure.decoder.attention cross: MAE's projects have no such decoder; the encoder "
            "alone can be exported"
        )


def vit_options(recipe: EncoderRecipe) -> dict[str, Any]:
    """The timm keywords of a recipe; refuses an image size that the patch does not divide."""
    options = {"img_size": recipe.image_size} | recipe.options
    if options["img_size"] != recipe.image_size:
        raise UserError("encoder.options.img_size: set encoder.image_size instead")
    patch = recipe.patch_size
    if patch and recipe.image_size % patch:
        raise UserError(
            f"encoder.image_size {recipe.image_size} is not divisible by the patch size {patch}"
        )
    return options


def visible_count(length: int, ratio: float, key: str = "mask_ratio") -> int:
    """int(L (1 - ratio)), the same for every sample; 49 of 196 at 0.75.

    UserError, naming the key, where that is none.
    """
    visible = int(length * (1.0 - ratio))
    if not visible:
        raise UserError(f"{key} {ratio:g} leaves none of the {length} patches visible")
    return visible


def visible_counts(views: ViewsRecipe, length: int) -> tuple[int, int]:
    """Visible patches in T1 and T2, 0 where T2 leads to pixels; UserError where there are none."""
    if length >= 2**16:  # positions are 16 bits of a key that is sorted (kernels/select_visible)
        raise UserError(f"an image has {length} patches; at most {2**16 - 1} can be masked")
    first = visible_count(length, views.mask_ratio, "views.mask_ratio")
    if views.second == "pixels":
        return first, 0
    if views.second == "independent":
        return first, visible_count(length, views.second_mask_ratio, "views.second_mask_ratio")
    if views.second == "complement" and first == length:
        raise UserError(
            f"views.mask_ratio {views.mask_ratio:g} masks none of the {length} patches, so "
            "views.second: complement has nothing to show"
        )
    return first, length - first if views.second == "complement" else length

"""Reconstruction: MAE (Eq. 3) and R-MAE (Eq. 8) with one shared decoder (phi = phi')."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pipeline import kernels
from pipeline.config.measure_schema import MeasureRecipe
from pipeline.config.recipe import Recipe, ReconstructionRecipe
from pipeline.method.cross_decoder import CrossDecoder
from pipeline.method.decoder import Decoder
from pipeline.method.encoder import Encoder
from pipeline.method.heads import spread
from pipeline.method.teacher import Teacher
from pipeline.method.views import View, Views, every_patch


class Reconstruction(nn.Module):
    """MAE:   mean ||d(z1) - x||²                            on masked(T1)
    R-MAE: mean ||d(z1) - d(z2)||² + lambda mean ||d(z2) - x||²  on masked(T1) ∩ visible(T2)

    or on a share of these patches (views.predicted). The gradient flows through both branches.
    x: pixels, normalised per patch if `norm_pix`.
    """

    settings: ClassVar[type[MeasureRecipe]] = ReconstructionRecipe

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__()
        self.recipe, self.data, self.patch = recipe.measure, recipe.data, encoder.patch
        kind = CrossDecoder if self.recipe.decoder.attention == "cross" else Decoder
        self.decoder = kind(
            self.recipe.decoder,
            width=encoder.width,
            patch=encoder.patch,
            grid=encoder.grid,
            smaller=encoder.smaller_grids,
        )

    def forward(
        self, encoder: Encoder, views: Views, teacher: Teacher | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both branches (one for MAE) → fp32 loss and its terms."""
        if views.second is None:
            z1, z2 = encoder(*views.first), None
        else:
            z1, z2 = encoder(*views.first, second=views.second)
        loss, terms = self.compare(z1, z2, views)
        return loss, terms | spread(z1)

    def compare(
        self, z1: Tensor, z2: Tensor | None, views: Views
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens [B, 1 + K, D] of both branches (z2 None for MAE) → loss and its terms."""
        if z2 is None or views.second is None:
            loss = self.distances(self.decoder(z1, views.first, views.region), None, views)[0]
            return loss, {"reconstruction": loss.detach()}
        first, second = self.decoder(z1, views.first, views.region, (z2, views.second))
        constraint, similarity = self.distances(second, first, views).unbind()
        loss = similarity + self.recipe.lambda_ * constraint
        return loss, {"similarity": similarity.detach(), "constraint": constraint.detach()}

    def distances(self, prediction: Tensor, other: Tensor | None, views: Views) -> Tensor:
        """Mean distances on the region: fp32 [1] or [2], of a prediction [B, R, p·p·3] from the
        pixels of views.target and, where given, from the other prediction.
        """
        return kernels.patch_loss(
            prediction,
            views.target,
            views.region,
            patch=self.patch,
            mean=self.data.mean,
            std=self.data.std,
            norm_pix=self.recipe.norm_pix,
            other=other,
            weight=views.weight,
        )

    def reconstruct(self, z: Tensor, view: View) -> Tensor:
        """Predictions for every patch: tokens [B, 1 + K, D] of a view → [B, L, p·p·3]."""
        return self.decoder(z, view, every_patch(view.image, self.patch))

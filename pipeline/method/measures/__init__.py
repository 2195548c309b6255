"""M: how the tokens of two views are compared. Each measure owns its decoder or its heads.

A new measure is a file here, with its settings class beside it, and its line in MEASURES;
`measure.kind` in a recipe then selects it. The settings class, against which recipes are checked,
also says what the measure needs and can do (`needs_teacher`, `needs_second_view`, `reconstructs`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from pipeline.config import measure_schema
from pipeline.config.recipe import Recipe
from pipeline.method.encoder import Encoder
from pipeline.method.measures.contrast import BYOL, InfoNCE, gather_keys, keys_as_of
from pipeline.method.measures.reconstruction import Reconstruction
from pipeline.method.teacher import Teacher
from pipeline.method.views import Views

__all__ = ["BYOL", "MEASURES", "InfoNCE", "Measure", "Reconstruction", "build_measure",
           "gather_keys", "keys_as_of"]  # fmt: skip


class Measure(Protocol):
    """What an Objective asks of M, an nn.Module.

    A measure whose settings say `needs_teacher` may have a `projector`, which the teacher then
    averages too; one that says `reconstructs` has a `decoder` and `reconstruct(z, view)`.
    """

    settings: ClassVar[type[measure_schema.MeasureRecipe]]

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None: ...

    def forward(
        self, encoder: Encoder, views: Views, teacher: Teacher | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """f, the views of a batch, and the EMA of f or None → fp32 loss and its terms."""


MEASURES: dict[str, type[Measure]] = {
    "reconstruction": Reconstruction,
    "infonce": InfoNCE,
    "byol": BYOL,
}
measure_schema.MEASURES.update({kind: measure.settings for kind, measure in MEASURES.items()})


def build_measure(recipe: Recipe, encoder: Encoder) -> nn.Module:
    """The measure of a recipe, with initial weights, for the tokens of an encoder."""
    measure: Any = MEASURES[recipe.measure.kind](recipe, encoder)
    return measure

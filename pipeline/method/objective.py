"""min E M( f(T1(x)), f(T2(x)) ): the one formula of all methods (paper, Eq. 1).

| method    | T1 masks | T2 masks               | masked patches | second branch  | M          |
|-----------|----------|------------------------|----------------|----------------|------------|
| MAE       | 75 %     | - (pixels)             | dropped        | pixels of x    | Eq. 3      |
| R-MAE     | 75 %     | the complement         | dropped        | f              | Eq. 8      |
| R-MAE†    | 75 %     | 25 %, independent      | dropped        | f              | Eq. 8      |
| R-MAE‡    | 75 %     | nothing                | dropped        | f              | Eq. 8      |
| C-MAE     | 75 %     | the complement, jitter | mask token     | EMA of f and p | Eq. 9-11   |
| C-MAE (B) | 75 %     | the complement, jitter | mask token     | EMA of f and p | BYOL       |
| MoCo v3   | nothing  | nothing, another crop  | -              | EMA of f and p | Eq. 9-11   |

The methods differ by recipe only: `views` makes (T1, T2), `encoder` is f, `measures` is M.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.recipe import Recipe
from pipeline.kernels.philox import Epoch
from pipeline.method.checks import check_sizes, visible_counts
from pipeline.method.encoder import Encoder
from pipeline.method.measures import build_measure
from pipeline.method.teacher import Teacher
from pipeline.method.views import make_views


class Objective(nn.Module):
    """M(f(T1(x)), f(T2(x))) as one module: what DeepSpeed trains."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        visible_counts(recipe.views, math.prod(self.encoder.grid))  # none visible: an error
        check_sizes(recipe, self.encoder.patch)
        self.measure: Any = build_measure(recipe, self.encoder)

    @property
    def reconstructs(self) -> bool:
        """Whether images can be reconstructed: the measure has a decoder."""
        return self.recipe.measure.reconstructs

    def forward(
        self,
        image: Tensor,
        sample: Tensor,
        epoch: Epoch,
        teacher: Teacher | None = None,
        crop: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 images [B, H, W, 3], their sample numbers int64 [B] → fp32 loss and its terms.

        crop: uint8 [B, H, W, 3], a second crop of each image, for `views.second: crop`.
        """
        views = make_views(
            image, sample, recipe=self.recipe, epoch=epoch, patch=self.encoder.patch, crop=crop
        )
        loss, terms = self.measure(self.encoder, views, teacher)
        return loss, terms


def build_objective(recipe: Recipe) -> tuple[Objective, Teacher | None]:
    """The objective with weights drawn from the recipe's seed, and its teacher if it has one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        objective = Objective(recipe)
    return objective, Teacher(objective) if recipe.teacher else None

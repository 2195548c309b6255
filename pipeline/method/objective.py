"""min E M( f(T1(x)), f(T2(x)) ): the one formula of all methods (paper, Eq. 1).

| method    | T1 hides | T2 hides               | hidden patches | second branch  | M          |
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

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pipeline.config.recipe import Recipe, ReconstructionRecipe
from pipeline.errors import UserError
from pipeline.method.encoder import Encoder
from pipeline.method.measures import Contrast, Reconstruction, Terms, choose_tokens, feature_std
from pipeline.method.views import View, Views, make_views

# A context in which the given parameters are whole (engine.Engine.gathered); None: they are.
Gathered = Callable[[list[nn.Parameter]], AbstractContextManager[object]] | None
SLICE = 24  # parameters, two blocks of a ViT


class Teacher(nn.Module):
    """(f', p'): the exponential moving average of the online encoder and projector, in fp32.

    It stands outside the DeepSpeed module: not cast, not partitioned, not optimised.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective.measure, Contrast):
            raise UserError("only contrastive measures have a teacher")
        self.tokens = objective.measure.recipe.tokens
        self.encoder = copy.deepcopy(objective.encoder).float()
        self.projector = copy.deepcopy(objective.measure.projector).float()
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, view: View) -> Tensor:
        """A view → keys p'(f'(view)), fp32 [B, T, out], without gradient."""
        return self.projector(choose_tokens(self.encoder(*view), self.tokens))

    @torch.no_grad()
    def update(self, objective: Objective, momentum: float, gathered: Gathered = None) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · online, in fp32.

        gathered: makes partitioned parameters whole for a while (ZeRO stage 3), slice by slice.
        """
        for mine, online in self.pairs(objective):
            with gathered(online) if gathered else contextlib.nullcontext():
                torch._foreach_lerp_(mine, [p.detach().float() for p in online], 1.0 - momentum)

    @torch.no_grad()
    def distance(self, objective: Objective, gathered: Gathered = None) -> float:
        """||online - teacher|| / ||teacher|| over all weights of f and p (reads the device)."""
        apart: list[Tensor] = []
        size: list[Tensor] = []
        for mine, online in self.pairs(objective):
            with gathered(online) if gathered else contextlib.nullcontext():
                change = torch._foreach_sub([p.detach().float() for p in online], mine)
                apart += torch._foreach_norm(change)
            size += torch._foreach_norm(mine)
        return float(torch.stack(apart).norm() / torch.stack(size).norm())

    def pairs(self, objective: Objective) -> list[tuple[list[Tensor], list[nn.Parameter]]]:
        """(mine, online) parameters in slices of about a block, so that few are whole at once."""
        assert isinstance(objective.measure, Contrast)
        mine: list[Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
        online = [*objective.encoder.parameters(), *objective.measure.projector.parameters()]
        cuts = range(0, len(mine), SLICE)
        return [(mine[c : c + SLICE], online[c : c + SLICE]) for c in cuts]


class Objective(nn.Module):
    """M(f(T1(x)), f(T2(x))) as one module: what DeepSpeed trains."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        self.measure: Reconstruction | Contrast
        width, patch = self.encoder.width, self.encoder.patch
        if isinstance(recipe.measure, ReconstructionRecipe):
            self.measure = Reconstruction(
                recipe.measure, recipe.data, width=width, patch=patch, grid=self.encoder.grid
            )
        else:
            self.measure = Contrast(recipe.measure, width=width)

    def forward(
        self,
        image: Tensor,
        sample: Tensor,
        epoch: int,
        teacher: Teacher | None = None,
        crop: Tensor | None = None,
    ) -> tuple[Tensor, Terms]:
        """uint8 images [B, H, W, 3], their sample numbers int64 [B] → fp32 loss and its terms.

        crop: uint8 [B, H, W, 3], a second crop of each image, for `views.second: crop`.
        """
        views = make_views(
            image, sample, recipe=self.recipe, epoch=epoch, patch=self.encoder.patch, crop=crop
        )
        if isinstance(self.measure, Reconstruction):
            return self._reconstruction(self.measure, views)
        if teacher is None:
            raise UserError(f"measure {self.recipe.measure.kind} needs a teacher")
        return self._contrast(self.measure, views, teacher)

    def _reconstruction(self, measure: Reconstruction, views: Views) -> tuple[Tensor, Terms]:
        z1 = self.encoder(*views.first)
        z2 = self.encoder(*views.second) if views.second is not None else None
        loss, terms = measure(z1, z2, views)
        return loss, terms | {"feature_std": feature_std(z1)}

    def _contrast(self, measure: Contrast, views: Views, teacher: Teacher) -> tuple[Tensor, Terms]:
        def one_side(online: View, other: View) -> tuple[Tensor, Terms]:
            z = self.encoder(*online)
            query = measure.query(z)
            # The teacher's weights are fp32; in a bf16 run its matrix products need not be.
            with torch.autocast(query.device.type, query.dtype, query.dtype != torch.float32):
                key = teacher(other)
            if self.encoder.mask_token is None and measure.recipe.tokens.startswith("patch"):
                loss, terms = measure.paired(query, key, online, other)
            else:
                loss, terms = measure(query, key)
            return loss, terms | {"feature_std": feature_std(z)}

        assert views.second is not None
        loss, terms = one_side(views.first, views.second)
        if measure.recipe.symmetric:
            loss = 0.5 * (loss + one_side(views.second, views.first)[0])
        return loss, terms


def build_objective(recipe: Recipe) -> tuple[Objective, Teacher | None]:
    """The objective with weights drawn from the recipe's seed, and its teacher if it has one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        objective = Objective(recipe)
    return objective, Teacher(objective) if recipe.teacher else None


def parameter_groups(objective: Objective) -> list[dict[str, object]]:
    """Decayed and undecayed parameters (SPEC §4): biases and 1-D parameters do not decay; class
    and mask tokens do if `weight_decay.tokens`.
    """
    decay = objective.recipe.optimizer.weight_decay
    groups: dict[str, dict[str, object]] = {
        "decay": {"name": "decay", "weight_decay": decay.value, "params": []},
        "no_decay": {"name": "no_decay", "weight_decay": 0.0, "params": []},
    }
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(("cls_token", "mask_token")):
            group = "decay" if decay.tokens else "no_decay"
        else:
            group = "no_decay" if parameter.ndim <= 1 or name.endswith(".bias") else "decay"
        groups[group]["params"].append(parameter)  # type: ignore[attr-defined]
    return [group for group in groups.values() if group["params"]]

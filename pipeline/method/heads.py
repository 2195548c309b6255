"""Heads on an encoder's tokens: projector and predictor, MoCo v3's batch norm over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.recipe import HeadsRecipe
from pipeline.method.vit import init_weights


def mlp(width: int, recipe: HeadsRecipe, layers: int) -> nn.Sequential:
    """A projector or predictor of `layers` linears, an activation between them; with batch_norm as
    MoCo v3's: no biases, a norm before each activation, one without scale at the end, weights
    U(±1 / sqrt(in)) as torch's linears have them.
    """
    relu = recipe.activation == "relu" or (recipe.activation == "auto" and recipe.batch_norm)
    widths = [width, *[recipe.hidden] * (layers - 1), recipe.out]
    parts: list[nn.Module] = []
    for number in range(layers):
        last = number == layers - 1
        parts.append(nn.Linear(widths[number], widths[number + 1], bias=not recipe.batch_norm))
        if recipe.batch_norm:
            parts.append(GlobalBatchNorm(widths[number + 1], affine=not last))
        if not last:
            parts.append(nn.ReLU() if relu else nn.GELU())
    head = nn.Sequential(*parts)
    if not recipe.batch_norm:
        init_weights(head)
    return head


class GlobalBatchNorm(nn.Module):
    """Batch norm of [B, T, C] over the B * T rows of all ranks, always by the batch's statistics.

    As torch's SyncBatchNorm in training mode, but on any device; no running statistics, which
    nothing here would read (heads serve the training only). eps 1e-5, biased variance.
    """

    def __init__(self, width: int, *, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y - _mean_of_all(y.mean((0, 1)))
        y = y * (_mean_of_all(y.square().mean((0, 1))) + 1e-5).rsqrt()
        if self.weight is not None and self.bias is not None:
            y = y * self.weight.float() + self.bias.float()
        return y.to(x.dtype)


class _SumOfAll(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _mean_of_all(x: Tensor) -> Tensor:
    """The mean over ranks (with equal batches), with its gradient."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _SumOfAll.apply(x) / dist.get_world_size()


def choose_tokens(z: Tensor, tokens: str) -> Tensor:
    """Tab. 3's choices: z [B, 1 + N, D], cls token first → [B, T, D]."""
    if tokens == "cls":
        return z[:, :1]
    if tokens == "mean_patch":
        return z[:, 1:].mean(dim=1, keepdim=True)
    return z[:, 1:] if tokens == "patch" else z


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """Standard deviation of normalised features over the batch, times sqrt(D): 1 when they spread
    evenly over the sphere, 0 when they have collapsed (Chen & He, SimSiam, Fig. 2b).

    z: [B, 1 + N, D]; the feature of an image is the mean of its patch tokens. B must exceed 1. The
    sum of squares is divided by B, so that features which are even give sqrt(1 - 1/B) at the most.
    """
    feature = nn.functional.normalize(z[:, 1:].float().mean(dim=1), dim=1)
    return feature.std(dim=0, correction=0).mean() * feature.shape[1] ** 0.5


def spread(z: Tensor) -> dict[str, Tensor]:
    """The term `feature_std` of z [B, 1 + N, D]; none of a single image, whose 0 would be taken for
    a collapse."""
    return {"feature_std": feature_std(z)} if len(z) > 1 else {}

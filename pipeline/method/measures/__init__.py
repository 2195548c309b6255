"""M: similarity measurements between the tokens of two views. Each owns its decoder or its heads.

A new measure is a class here with `forward(...) -> (loss, terms)` and a `kind` in the recipe.
Shape suffixes: B batch, K visible, L all patches, R region, D encoder width, G global batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config.recipe import (
    BYOLRecipe,
    DataRecipe,
    HeadsRecipe,
    InfoNCERecipe,
    ReconstructionRecipe,
)
from pipeline.method.decoder import Decoder, take_rows
from pipeline.method.encoder import init_weights
from pipeline.method.views import View, Views

Terms = dict[str, Tensor]


class Reconstruction(nn.Module):
    """Eq. 3 (MAE) and Eq. 8 (R-MAE) with one shared decoder (phi = phi').

    MAE:   mean ||d(z1) - x||²                            on hidden(T1)
    R-MAE: mean ||d(z1) - d(z2)||² + lambda mean ||d(z2) - x||²  on hidden(T1) ∩ visible(T2)

    The gradient flows through both branches. x: pixels, normalised per patch if `norm_pix`.
    """

    def __init__(
        self,
        recipe: ReconstructionRecipe,
        data: DataRecipe,
        *,
        width: int,
        patch: int,
        grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.recipe, self.data, self.patch = recipe, data, patch
        self.decoder = Decoder(recipe.decoder, width=width, patch=patch, grid=grid)

    def forward(self, z1: Tensor, z2: Tensor | None, views: Views) -> tuple[Tensor, Terms]:
        """Tokens of both branches (z2 None for MAE) → fp32 loss and its terms (SPEC §2)."""
        first = self.decoder(z1, views.first, views.region)
        if z2 is None or views.second is None:
            loss = self._patch_loss(first, None, views)[0]
            return loss, {"reconstruction": loss.detach()}
        second = self.decoder(z2, views.second, views.region)
        constraint, similarity = self._patch_loss(second, first, views).unbind()
        loss = similarity + self.recipe.lambda_ * constraint
        return loss, {"similarity": similarity.detach(), "constraint": constraint.detach()}

    def _patch_loss(self, prediction: Tensor, other: Tensor | None, views: Views) -> Tensor:
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


def mlp(width: int, recipe: HeadsRecipe, layers: int) -> nn.Sequential:
    """A projector or predictor of `layers` linears, GELU between them (SPEC §3.1); with
    batch_norm as MoCo v3's: no biases, norm and ReLU between, a norm without scale at the end.
    """
    widths = [width, *[recipe.hidden] * (layers - 1), recipe.out]
    parts: list[nn.Module] = []
    for number in range(layers):
        last = number == layers - 1
        parts.append(nn.Linear(widths[number], widths[number + 1], bias=not recipe.batch_norm))
        if recipe.batch_norm:
            parts.append(GlobalBatchNorm(widths[number + 1], affine=not last))
        if not last:
            parts.append(nn.ReLU() if recipe.batch_norm else nn.GELU())
    head = nn.Sequential(*parts)
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


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """Standard deviation of normalised features over the batch, times sqrt(D): 1 when they spread
    evenly over the sphere, 0 when they have collapsed (Chen & He, SimSiam, Fig. 2b).

    z: [B, 1 + N, D]; the feature of an image is the mean of its patch tokens. B must exceed 1.
    """
    feature = nn.functional.normalize(z[:, 1:].float().mean(dim=1), dim=1)
    return feature.std(dim=0, correction=0).mean() * feature.shape[1] ** 0.5


class Contrast(nn.Module):
    """Eq. 9-10 (InfoNCE) or BYOL's loss between q(p(z1)) and the teacher's keys p'(z2).

    The teacher owns p'; here are p and q of the online branch. Keys carry no gradient. With
    several ranks the keys of the global micro-batch are gathered, so the negatives of a step are
    those of all ranks (gradient accumulation does not add any).
    """

    def __init__(self, recipe: InfoNCERecipe | BYOLRecipe, *, width: int) -> None:
        super().__init__()
        self.recipe = recipe
        heads = recipe.heads
        self.projector = mlp(width, heads, heads.projector_layers)
        self.predictor = mlp(heads.out, heads, heads.predictor_layers)

    def query(self, z: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] of the online encoder → q(p(z)) [B, T, out]."""
        return self.predictor(self.projector(choose_tokens(z, self.recipe.tokens)))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Terms]:
        """query [B, T, C] online, key [B, T, C] of the teacher for the same images → fp32 loss."""
        if isinstance(self.recipe, BYOLRecipe):
            cosine = nn.functional.cosine_similarity(query.float(), key.float(), dim=-1)
            loss = (2.0 - 2.0 * cosine).mean()
            return loss, {"positive": cosine.detach().mean()}
        keys, offset = gather_keys(key)
        loss, similarity = kernels.token_infonce(
            query,
            keys,
            temperature=self.recipe.temperature,
            negatives=self.recipe.negatives,
            offset=offset,
        )
        if self.recipe.scale_2tau:
            loss = loss * (2.0 * self.recipe.temperature)
        return loss, {"positive": similarity[0], "negative": similarity[1]}

    def paired(self, query: Tensor, key: Tensor, online: View, other: View) -> tuple[Tensor, Terms]:
        """The loss where hidden patches were dropped: between the positions that both views show.

        query [B, 1? + K1, C], key [B, 1? + K2, C], of the visible tokens of two views of the same
        images (and the class token where the recipe contrasts it). Mean over the shared positions
        of an image, then over images; a negative counts only where its view shows it.
        """
        prefix = query.shape[1] - online.visible.shape[1]
        q, shown_q = at_positions(query, online, prefix)
        k, shown_k = at_positions(key, other, prefix)
        pairs = shown_q & shown_k
        share = pairs / pairs.sum(dim=1, keepdim=True).clamp(min=1) / len(pairs)
        cosine = (q * k).sum(-1)
        positive = (cosine.detach() * share).sum()
        if isinstance(self.recipe, BYOLRecipe):
            return ((2.0 - 2.0 * cosine) * share).sum(), {"positive": positive}
        keys, offset = gather_keys(k)
        shown, _ = gather_keys(shown_k.byte())
        among, there, own = _candidates(q, keys, shown.bool(), self.recipe.negatives, offset)
        # Finite, so that a row without any candidate (which has no share) has a gradient of 0.
        logits = among.masked_fill(~there, -1e4) / self.recipe.temperature
        loss = ((logits.logsumexp(-1) - cosine / self.recipe.temperature) * share).sum()
        if self.recipe.scale_2tau:
            loss = loss * (2.0 * self.recipe.temperature)
        others = there.scatter(-1, own[..., None], False) & shown_q[..., None]
        negative = (among.detach() * others).sum() / others.sum().clamp(min=1)
        return loss, {"positive": positive, "negative": negative}


def at_positions(z: Tensor, view: View, prefix: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, P + K, C] of the visible patches → normalised fp32 [B, P + L, C], each at its
    position (zero where hidden), and bool [B, P + L]: what is there.
    """
    batch = view.inverse.shape[0]
    slot = view.inverse + prefix
    first = torch.arange(prefix, device=z.device, dtype=slot.dtype).expand(batch, prefix)
    slot = torch.cat([first, slot], dim=1)
    shown = slot < z.shape[1]
    placed = take_rows(z, slot.clamp(max=z.shape[1] - 1))
    placed = nn.functional.normalize(placed.float(), dim=-1)
    return placed * shown[..., None], shown


def _candidates(
    query: Tensor, keys: Tensor, shown: Tensor, negatives: str, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What each query [B, N, C] is compared with among keys [G, N, C], shown bool [G, N].

    Returns cosines [B, N, J], which of the J candidates are shown (bool, the same shape), and the
    number of the positive among them, int64 [B, N].
    """
    batch, n, _ = query.shape
    row = torch.arange(batch, device=query.device)[:, None] + offset
    place = torch.arange(n, device=query.device)[None]
    if negatives == "position":
        cosine = torch.einsum("bnc,gnc->bng", query, keys)
        return cosine, shown.T.expand_as(cosine), row.expand(batch, n)
    if negatives == "image":
        mine = slice(offset, offset + batch)
        cosine = query @ keys[mine].mT
        return cosine, shown[mine, None].expand_as(cosine), place.expand(batch, n)
    cosine = query @ keys.flatten(0, 1).T
    return cosine, shown.flatten().expand_as(cosine), row * n + place


def choose_tokens(z: Tensor, tokens: str) -> Tensor:
    """Tab. 3's choices: z [B, 1 + N, D], class token first → [B, T, D]."""
    if tokens == "cls":
        return z[:, :1]
    if tokens == "mean_patch":
        return z[:, 1:].mean(dim=1, keepdim=True)
    return z[:, 1:] if tokens == "patch" else z


@torch.no_grad()
def gather_keys(key: Tensor) -> tuple[Tensor, int]:
    """Keys [B, T, C] of this rank → [G, T, C] of all in rank order, and this rank's offset."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return key, 0
    key = key.contiguous()
    gathered = key.new_empty(dist.get_world_size() * key.shape[0], *key.shape[1:])
    dist.all_gather_into_tensor(gathered, key)
    return gathered, dist.get_rank() * key.shape[0]


def reconstruct(measure: Reconstruction, z: Tensor, view: View) -> Tensor:
    """Predictions for every patch: tokens [B, 1 + K, D] of a view → [B, L, p·p·3]."""
    batch, length = view.inverse.shape
    everything = torch.arange(length, dtype=torch.int32, device=z.device).expand(batch, length)
    return measure.decoder(z, view, everything)

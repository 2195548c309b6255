"""M: similarity measurements between the tokens of two views. Each owns its decoder or its heads.

A new measure is a class here with `forward(...) -> (loss, terms)` and a `kind` in the recipe.
Shape suffixes: B batch, K visible, L all patches, R region, D encoder width, G global batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline import kernels
from pipeline.encoder import init_weights, sincos_position
from pipeline.recipe import (
    BYOLRecipe,
    DataRecipe,
    DecoderRecipe,
    HeadsRecipe,
    InfoNCERecipe,
    ReconstructionRecipe,
)
from pipeline.views import View, Views

Terms = dict[str, Tensor]


class Decoder(nn.Module):
    """d: tokens of the visible patches → pixels of the patches of a region (MAE's decoder)."""

    pos_embed: Tensor

    def __init__(
        self, recipe: DecoderRecipe, *, width: int, patch: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        if recipe.width % recipe.heads:
            raise ValueError(
                f"measure.decoder.width {recipe.width} is not divisible by its heads {recipe.heads}"
            )
        self.embed = nn.Linear(width, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(recipe.width))
        self.register_buffer("pos_embed", sincos_position(grid, recipe.width))
        self.blocks = nn.ModuleList(
            Block(recipe.width, recipe.heads, qkv_bias=True, norm_layer=_LayerNorm)
            for _ in range(recipe.depth)
        )
        self.norm = _LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, patch * patch * 3)
        init_weights(self)

    def forward(self, tokens: Tensor, inverse: Tensor, region: Tensor) -> Tensor:
        """tokens [B, 1 + K, D], inverse int32 [B, L], region int32 [B, R] → [B, R, p·p·3].

        Values of a patch in the order (row, column, channel). Norm and head see the region only.
        """
        x = kernels.place_tokens(
            self.embed(tokens), inverse, self.mask_token, self.pos_embed, prefix=1
        )
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(take_rows(x, region + 1)))


class _LayerNorm(nn.LayerNorm):
    """LayerNorm with the eps of every ViT here."""

    def __init__(self, width: int, eps: float = 1e-6, **keywords: object) -> None:
        super().__init__(width, eps=eps, **keywords)  # type: ignore[arg-type]


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, N, D], rows int [B, R] → [B, R, D] with row rows[b, r] of sample b.

    One index per row (index_select), so no index is materialised over the channels.
    """
    batch, n, width = x.shape
    start = torch.arange(batch, device=x.device, dtype=rows.dtype)[:, None] * n
    return (
        x.reshape(batch * n, width)
        .index_select(0, (rows + start).flatten())
        .view(batch, rows.shape[1], width)
    )


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
        first = self.decoder(z1, views.first.inverse, views.region)
        if z2 is None or views.second is None:
            loss = self._patch_loss(first, None, views)[0]
            return loss, {"reconstruction": loss.detach()}
        second = self.decoder(z2, views.second.inverse, views.region)
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


def mlp(width: int, recipe: HeadsRecipe) -> nn.Sequential:
    """A projector: Linear, GELU, Linear, without batch norm (SPEC §3.1)."""
    layers = nn.Sequential(
        nn.Linear(width, recipe.hidden), nn.GELU(), nn.Linear(recipe.hidden, recipe.out)
    )
    init_weights(layers)
    return layers


class Contrast(nn.Module):
    """Eq. 9-10 (InfoNCE) or BYOL's loss between q(p(z1)) and the teacher's keys p'(z2).

    The teacher owns p'; here are p and q of the online branch. Keys carry no gradient. With
    several ranks the keys of the global micro-batch are gathered, so the negatives of a step are
    those of all ranks (gradient accumulation does not add any).
    """

    def __init__(self, recipe: InfoNCERecipe | BYOLRecipe, *, width: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.projector = mlp(width, recipe.heads)
        self.predictor = mlp(recipe.heads.out, recipe.heads)

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


def choose_tokens(z: Tensor, tokens: str) -> Tensor:
    """Tab. 3's choices: z [B, 1 + N, D], class token first → [B, T, D]."""
    if tokens == "class":
        return z[:, :1]
    if tokens == "mean":
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
    return measure.decoder(z, view.inverse, everything)

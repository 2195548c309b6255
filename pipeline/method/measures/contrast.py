"""Contrast between q(p(z1)) and the teacher's keys p'(z2): InfoNCE (Eq. 9-10) and BYOL.

Shapes: B batch, T tokens, K visible, L all patches, P 1 with the cls token else 0, D encoder width,
C width of the heads, G images of the micro-batches of all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config.measure_schema import MeasureRecipe
from pipeline.config.recipe import BYOLRecipe, InfoNCERecipe, Recipe
from pipeline.errors import UserError
from pipeline.method.decoder import take_rows
from pipeline.method.encoder import Encoder
from pipeline.method.heads import choose_tokens, mlp, spread
from pipeline.method.teacher import Teacher
from pipeline.method.views import View, Views

Terms = dict[str, Tensor]


class Contrast(nn.Module):
    """What InfoNCE and BYOL share: p and q of the online branch, and which tokens meet.

    The teacher owns p'. Keys carry no gradient. With several ranks the keys of the global
    micro-batch are gathered, so the negatives of a step are those of all ranks (gradient
    accumulation does not add any).
    """

    settings: ClassVar[type[MeasureRecipe]]

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__()
        self.recipe = recipe.measure
        heads = self.recipe.heads
        self.projector = mlp(encoder.width, heads, heads.projector_layers)
        self.predictor = mlp(heads.out, heads, heads.predictor_layers)
        # Where masked patches are dropped, two views share only some patch positions.
        self.pairs = recipe.encoder.masked_tokens == "drop" and self.recipe.contrasts_patches

    def query(self, z: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] of the online encoder → q(p(z)) [B, T, C]."""
        return self.predictor(self.projector(choose_tokens(z, self.recipe.tokens)))

    def forward(
        self, encoder: Encoder, views: Views, teacher: Teacher | None
    ) -> tuple[Tensor, Terms]:
        """Both views → fp32 loss and its terms; `symmetric` takes each view as the online one."""
        if teacher is None:
            raise UserError(f"measure {self.recipe.kind} needs a teacher")
        assert views.second is not None
        if self.recipe.symmetric:
            return self._both_sides(encoder, teacher, views.first, views.second)
        z = encoder(*views.first)
        query = self.query(z)
        key = teacher(views.second, dtype=query.dtype)
        loss, terms = self._side(query, key, views.first, views.second)
        return loss, terms | spread(z)

    def _both_sides(
        self, encoder: Encoder, teacher: Teacher, first: View, second: View
    ) -> tuple[Tensor, Terms]:
        """The mean of both directions, terms too (but the spread, that of the first view); each
        network encodes both views in one call."""
        z1, z2 = encoder(*first, second=second)
        query1, query2 = self.query(z1), self.query(z2)
        key1, key2 = teacher(first, second, dtype=query1.dtype)
        loss, terms = self._side(query1, key2, first, second)
        other, more = self._side(query2, key1, second, first)
        both = {name: 0.5 * (value + more[name]) for name, value in terms.items()}
        return 0.5 * (loss + other), both | spread(z1)

    def _side(self, query: Tensor, key: Tensor, online: View, other: View) -> tuple[Tensor, Terms]:
        """Queries of one view against the keys of the other."""
        if self.pairs:
            return self.paired(query, key, online, other)
        return self.compare(query, key)

    def compare(self, query: Tensor, key: Tensor) -> tuple[Tensor, Terms]:
        """query [B, T, C] online, key [B, T, C] of the teacher for the same images → fp32 loss."""
        raise NotImplementedError

    def paired(self, query: Tensor, key: Tensor, online: View, other: View) -> tuple[Tensor, Terms]:
        """The loss where masked patches were dropped: between the positions that both views show.

        query [B, P + K1, C], key [B, P + K2, C], of the visible tokens of two views of the same
        images (and the cls token where the recipe contrasts it). Mean over the shared positions
        of an image, then over images; a negative counts only where its view shows it.
        """
        prefix = query.shape[1] - online.visible.shape[1]
        q, shown_q = at_positions(query, online, prefix)
        k, shown_k = at_positions(key, other, prefix)
        pairs = shown_q & shown_k
        weight = pairs / pairs.sum(dim=1, keepdim=True).clamp(min=1) / len(pairs)
        cosine = (q * k).sum(-1)
        loss, terms = self.compare_pairs(q, k, shown_q, shown_k, cosine, weight)
        return loss, {"positive": (cosine.detach() * weight).sum()} | terms

    def compare_pairs(
        self, q: Tensor, k: Tensor, shown_q: Tensor, shown_k: Tensor, cosine: Tensor, weight: Tensor
    ) -> tuple[Tensor, Terms]:
        """q, k fp32 [B, P + L, C], normalised, zero where not shown (bool [B, P + L]); cosine and
        weight of each pair [B, P + L] → loss, further terms.
        """
        raise NotImplementedError


class BYOL(Contrast):
    """2 - 2 cos(q(p(z1)), p'(z2))."""

    settings: ClassVar[type[MeasureRecipe]] = BYOLRecipe

    def compare(self, query: Tensor, key: Tensor) -> tuple[Tensor, Terms]:
        """As Contrast.compare."""
        cosine = F.cosine_similarity(query.float(), key.float(), dim=-1)
        loss = (2.0 - 2.0 * cosine).mean()
        return loss, {"positive": cosine.detach().mean()}

    def compare_pairs(
        self, q: Tensor, k: Tensor, shown_q: Tensor, shown_k: Tensor, cosine: Tensor, weight: Tensor
    ) -> tuple[Tensor, Terms]:
        """As Contrast.compare_pairs."""
        return ((2.0 - 2.0 * cosine) * weight).sum(), {}


class InfoNCE(Contrast):
    """Eq. 9-10: -log exp(cos(q, k+) / tau) / sum over the candidates of exp(cos(q, k) / tau)."""

    settings: ClassVar[type[MeasureRecipe]] = InfoNCERecipe

    def compare(self, query: Tensor, key: Tensor) -> tuple[Tensor, Terms]:
        """As Contrast.compare."""
        keys, offset = self._keys_for(key)
        loss, similarity = kernels.token_infonce(
            query,
            keys,
            temperature=self.recipe.temperature,
            negatives=self.recipe.negatives,
            offset=offset,
        )
        return self._scaled(loss), {"positive": similarity[0], "negative": similarity[1]}

    def compare_pairs(
        self, q: Tensor, k: Tensor, shown_q: Tensor, shown_k: Tensor, cosine: Tensor, weight: Tensor
    ) -> tuple[Tensor, Terms]:
        """As Contrast.compare_pairs."""
        keys, offset = self._keys_for(k)
        shown, _ = self._keys_for(shown_k.byte())
        device = q.device.type if q.device.type != "meta" else "cpu"  # meta knows no autocast
        with torch.autocast(device, enabled=False):  # which would round the cosines
            among, there, own = _candidates(q, keys, shown.bool(), self.recipe.negatives, offset)
        # Finite, so that a row without any candidate (which has no weight) has a gradient of 0.
        logits = among.masked_fill(~there, -1e4) / self.recipe.temperature
        loss = ((logits.logsumexp(-1) - cosine / self.recipe.temperature) * weight).sum()
        others = there.scatter(-1, own[..., None], False) & shown_q[..., None]
        negative = (among.detach() * others).sum() / others.sum().clamp(min=1)
        return self._scaled(loss), {"negative": negative}

    def _keys_for(self, key: Tensor) -> tuple[Tensor, int]:
        """As gather_keys; negatives of the same image need none of another rank."""
        return gather_keys(key) if self.recipe.batch_negatives else (key.detach(), 0)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss * (2.0 * self.recipe.temperature) if self.recipe.scale_2tau else loss


def at_positions(z: Tensor, view: View, prefix: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, P + K, C] of the visible patches → normalised fp32 [B, P + L, C], each at its
    position (zero where masked), and bool [B, P + L]: what is there.
    """
    batch = view.inverse.shape[0]
    slot = view.inverse + prefix
    first = torch.arange(prefix, device=z.device, dtype=slot.dtype).expand(batch, prefix)
    slot = torch.cat([first, slot], dim=1)
    shown = slot < z.shape[1]
    placed = take_rows(z, slot.clamp(max=z.shape[1] - 1))
    placed = F.normalize(placed.float(), dim=-1)
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
    position = torch.arange(n, device=query.device)[None]
    if negatives == "position":
        cosine = torch.einsum("bnc,gnc->bng", query, keys)
        return cosine, shown.T.expand_as(cosine), row.expand(batch, n)
    if negatives == "image":
        mine = slice(offset, offset + batch)
        cosine = query @ keys[mine].mT
        return cosine, shown[mine, None].expand_as(cosine), position.expand(batch, n)
    cosine = query @ keys.flatten(0, 1).T
    return cosine, shown.flatten().expand_as(cosine), row * n + position


_planned: ContextVar[tuple[int, list[Tensor]] | None] = ContextVar("planned", default=None)


@contextlib.contextmanager
def keys_as_of(ranks: int) -> Iterator[list[Tensor]]:
    """Inside, one process has as many keys as it would gather from `ranks` ranks, all of them
    copies of its own: for a dry run. Yields a list, which gets what it would send."""
    sent: list[Tensor] = []
    token = _planned.set((ranks, sent))
    try:
        yield sent
    finally:
        _planned.reset(token)


@torch.no_grad()
def gather_keys(key: Tensor) -> tuple[Tensor, int]:
    """Keys [B, …] of this rank → [G, …] of all in rank order, and this rank's offset."""
    if planned := _planned.get():
        ranks, sent = planned
        sent.append(key)
        return torch.cat([key] * ranks) if ranks > 1 else key, 0
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return key, 0
    key = key.contiguous()
    gathered = key.new_empty(dist.get_world_size() * key.shape[0], *key.shape[1:])
    dist.all_gather_into_tensor(gathered, key)
    return gathered, dist.get_rank() * key.shape[0]

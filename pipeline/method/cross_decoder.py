"""d in a cheaper form: queries of the region read the visible tokens and not one another.

CrossMAE's decoder (Fu et al. 2025, "Rethinking Patch Dependence for Masked Autoencoders"): the
patch of a hidden position is predicted from its mask token, which in every block attends to the
encoder's tokens and goes through an MLP. A prediction therefore depends on no other prediction, so
any share of the hidden patches can be decoded alone (`views.predicted`) and gives what all of them
would. Not taken over: a mix of the encoder's blocks for each block of the decoder; the encoder's
last tokens are read by all.

Shape suffixes: B batch, K visible, L all patches, R region, D width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from pipeline.config.recipe import DecoderRecipe
from pipeline.method.attention import attend_heads
from pipeline.method.decoder import LayerNorm, PixelDecoder, take_rows
from pipeline.method.views import View
from pipeline.method.vit import run_block


class CrossDecoder(PixelDecoder):
    """d: tokens of the visible patches → pixels of the patches of a region, each by itself."""

    def __init__(self, recipe: DecoderRecipe, **shape: Any) -> None:
        super().__init__(recipe, **shape, block=CrossBlock)
        self.memory_norm = LayerNorm(recipe.width)

    def forward(
        self, tokens: Tensor, view: View, region: Tensor, second: tuple[Tensor, View] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens [B, 1 + K, D] of a view, region int32 [B, R] → [B, R, p·p·3].

        Values of a patch in the order (row, column, channel). second: tokens of another view and
        that view; the predictions of both.
        """
        hidden = (self.mask_token + self.positions(view)[1:]).to(self.mask_token.dtype)
        # The first block's queries are a function of the position alone: computed once for each.
        query = self.blocks[0].query(hidden)  # type: ignore[operator]
        batch = region.shape[0]
        start = tuple(take_rows(t.expand(batch, -1, -1), region) for t in (hidden, query))
        first = self._predict(tokens, view, *start)
        return first if second is None else (first, self._predict(*second, *start))

    def _predict(self, tokens: Tensor, view: View, x: Tensor, query: Tensor) -> Tensor:
        """x [B, R, D], the mask tokens of a region, and the first block's queries of it → what the
        tokens of a view say of the region."""
        own = F.pad(view.visible + 1, (1, 0))  # rows of the cls token and the visible patches
        memory = self.embed(tokens)
        memory = self.memory_norm(memory + self.positions(view)[own.long()].to(memory.dtype))
        for number, block in enumerate(self.blocks):
            known = query if number == 0 else None
            x = run_block(block, self.grad_checkpointing, x, memory, known)
        predicted: Tensor = self.head(self.norm(x))
        return predicted


class CrossAttention(nn.Module):
    """The projections of a cross-attention of `heads` heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """query [B, R, D] (projected), memory [B, 1 + K, D] → [B, R, D]."""
        key, value = self.kv(memory).chunk(2, dim=-1)
        return self.proj(attend_heads(query, key, value, self.heads))


class CrossBlock(nn.Module):
    """x + attention(norm(x) → memory), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = CrossAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def query(self, x: Tensor) -> Tensor:
        """Queries of x [..., D]."""
        return self.attn.q(self.norm1(x))

    def forward(self, x: Tensor, memory: Tensor, query: Tensor | None = None) -> Tensor:
        """x [B, R, D], memory [B, 1 + K, D] → [B, R, D]; query: of x, where it is known."""
        x = x + self.attn(self.query(x) if query is None else query, memory)
        return x + self.mlp(self.norm2(x))

"""d: MAE's decoder, without the work whose result is known or never read.

Exact, since in a transformer only attention mixes tokens:

- Masked patches enter the first block as mask token + position, the same in every image: their
  norm and their queries, keys and values are computed once per position.
- The loss reads the region only: the last block computes keys and values of all tokens, but
  queries, projection and MLP of the region alone, and so do the last norm and the head.
- Backward recomputes the normed tensors from the norms' inputs, which it keeps in any case.

Weights have the names of plain timm blocks. Shape suffixes: B batch, K visible, L all patches,
R region, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config.recipe import DecoderRecipe
from pipeline.method.attention import attend_heads
from pipeline.method.checks import check_decoder
from pipeline.method.views import View
from pipeline.method.vit import SmallerTables, init_weights, run_block, sincos_position

Known = tuple[Tensor, Tensor, Tensor] | None  # see DecoderBlock.forward


class PixelDecoder(nn.Module):
    """What decoders have in common: embedding, mask token, positions, blocks and head."""

    pos_embed: Tensor

    def __init__(
        self, recipe: DecoderRecipe, *, width: int, patch: int, grid: tuple[int, int],
        block: Callable[[int, int], nn.Module], smaller: Sequence[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        """width: of the encoder; patch: side in pixels; grid: of patches; smaller: further grids,
        of smaller images."""
        super().__init__()
        check_decoder(recipe)
        self.grad_checkpointing = False  # as Encoder's
        self.embed = nn.Linear(width, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(recipe.width))
        self.register_buffer("pos_embed", sincos_position(grid, recipe.width))
        tables = {r * c: sincos_position((r, c), recipe.width) for r, c in smaller}
        self.smaller = SmallerTables(tables)
        self.blocks = nn.ModuleList(block(recipe.width, recipe.heads) for _ in range(recipe.depth))
        self.norm = LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, patch * patch * 3)
        init_weights(self)

    def positions(self, view: View) -> Tensor:
        """The table for the patches of a view: [1 + L, D]."""
        return self.smaller.at(view.inverse.shape[1], self.pos_embed)


class Decoder(PixelDecoder):
    """d: tokens of the visible patches → pixels of the patches of a region (MAE's decoder)."""

    def __init__(self, recipe: DecoderRecipe, **shape: Any) -> None:
        super().__init__(recipe, **shape, block=DecoderBlock)

    def forward(
        self, tokens: Tensor, view: View, region: Tensor, second: tuple[Tensor, View] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens [B, 1 + K, D] of a view, region int32 [B, R] → [B, R, p·p·3].

        Values of a patch in the order (row, column, channel). second: tokens of another view and
        that view; the predictions of both, which go through the blocks together after the first.
        """
        x = self._first_block(tokens, view, region)
        if second is None:
            return self._predict(x, region)
        both = torch.cat([x, self._first_block(*second, region)])
        first, other = self._predict(both, region.repeat(2, 1)).chunk(2)
        return first, other

    def _first_block(self, tokens: Tensor, view: View, region: Tensor) -> Tensor:
        """The tokens of a view, placed and through the first block, which knows what is hidden."""
        position = self.positions(view)
        x = kernels.place_tokens(
            self.embed(tokens), view.inverse, self.mask_token, position, prefix=1
        )
        own = F.pad(view.visible + 1, (1, 0))  # rows of the cls token and the visible patches
        hidden = (self.mask_token + position[1:]).to(x.dtype)
        return self._block(0, x, (own, view.inverse, hidden), region)

    def _predict(self, x: Tensor, region: Tensor) -> Tensor:
        """The other blocks, norm and head."""
        for number in range(1, len(self.blocks)):
            x = self._block(number, x, None, region)
        predicted: Tensor = self.head(self.norm(x))
        return predicted

    def _block(self, number: int, x: Tensor, known: Known, region: Tensor) -> Tensor:
        """One block; the last returns the rows of the region alone."""
        wanted = region + 1 if number == len(self.blocks) - 1 else None
        checkpointing = self.grad_checkpointing
        return run_block(self.blocks[number], checkpointing, x, known, wanted, not checkpointing)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with the eps of every ViT here."""

    def __init__(self, width: int, eps: float = 1e-6, **keywords: object) -> None:
        super().__init__(width, eps=eps, **keywords)  # type: ignore[arg-type]


class DecoderBlock(Block):
    """timm's ViT block (no dropout, no layer scale), with what the decoder can leave out."""

    attn: Attention
    mlp: Mlp

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, qkv_bias=True, norm_layer=LayerNorm)
        self.attn.qkv = Projection(width, 3 * width)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        known: Known = None,
        wanted: Tensor | None = None,
        again: bool = True,
    ) -> Tensor:
        """x [B, N, D] → [B, N, D], or [B, R, D] where `wanted` int [B, R] names the rows to return.

        known: (own int [B, 1 + K], inverse int32 [B, L], hidden [L, D]): x holds rows `own` of
        its own, and hidden[l] at every place l that inverse[b, l] >= K calls hidden. again: normed
        tensors are recomputed for backward instead of kept (False where the whole block is).
        """
        apply = _apply_to_normed if again else _apply
        project = self.attn.qkv
        if known is not None:
            own, inverse, hidden = known
            rows = apply(project, self.norm1, take_rows(x, own, once=True))
            qkv = place_rows(rows, project(self.norm1(hidden)), inverse, own)
            q, k, v = qkv.chunk(3, dim=-1)
            q = q if wanted is None else take_rows(q, wanted, once=True)
        elif wanted is not None:
            q, k, v = apply(partial(project, rows=wanted), self.norm1, x)
        else:
            q, k, v = apply(project, self.norm1, x).chunk(3, dim=-1)
        x = x if wanted is None else take_rows(x, wanted, once=True)
        x = x + self.attn.proj(attend_heads(q, k, v, self.attn.num_heads))
        return x + self.mlp.fc2(self.mlp.act(apply(self.mlp.fc1, self.norm2, x)))


def _apply(layer: Callable, norm: nn.Module, x: Tensor) -> Any:
    """layer(norm(x))."""
    return layer(norm(x))


def _apply_to_normed(layer: Callable, norm: nn.Module, x: Tensor) -> Any:
    """layer(norm(x)), keeping x for backward but not norm(x), which is recomputed from x there.

    x is kept in any case, by the norm. `layer` must consist of linears.
    """
    if torch.compiler.is_compiling():  # inductor recomputes norms by itself
        return layer(norm(x))
    normed, kept = norm(x), x.detach()
    whole = normed.untyped_storage()._cdata, normed.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        same = (saved.untyped_storage()._cdata, saved.numel()) == whole
        return saved.shape if same else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else norm(kept).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(normed)


class Projection(nn.Linear):
    """The linear to queries, keys and values: x [..., D] → [..., 3 D]; with rows int [B, R] of
    x [B, N, D], (queries [B, R, D] of those rows, keys [B, N, D], values [B, N, D]).
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, rows: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if rows is None:
            return super().forward(x)
        width = x.shape[-1]
        query = F.linear(take_rows(x, rows, once=True), self.weight[:width], self.bias[:width])
        key, value = F.linear(x, self.weight[width:], self.bias[width:]).chunk(2, dim=-1)
        return query, key, value


def take_rows(x: Tensor, rows: Tensor, *, once: bool = False) -> Tensor:
    """x [B, N, D], rows int [B, R] → [B, R, D] with row rows[b, r] of sample b.

    One index per row (index_select), so no index is materialised over the channels. once: no row
    is taken twice, so that backward copies rows instead of adding them atomically.
    """
    batch, n, width = x.shape
    start = torch.arange(batch, device=x.device, dtype=rows.dtype)[:, None] * n
    flat, index = x.reshape(batch * n, width), (rows + start).flatten()
    taken = _TakeOnce.apply(flat, index) if once else flat.index_select(0, index)
    return taken.view(batch, rows.shape[1], width)


class _TakeOnce(torch.autograd.Function):
    """Rows of a matrix, none of them twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index.long(), grad), None


def place_rows(own: Tensor, hidden: Tensor, inverse: Tensor, places: Tensor) -> Tensor:
    """own [B, 1 + K, D], hidden [L, D], inverse int32 [B, L] → [B, 1 + L, D]: the cls token's
    row, then for each place l the row 1 + inverse[b, l] of own, or hidden[l] where that is past K.

    places: int [B, 1 + K], where the rows of own come.
    """
    placed: Tensor = _PlaceRows.apply(own, hidden, inverse, places)
    return placed


class _PlaceRows(torch.autograd.Function):
    """As `place_rows`. Autograd would add all rows of a hidden place up one after another, in their
    own dtype: here they are one product, summed in fp32."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, hidden: Tensor, inverse: Tensor, places: Tensor) -> Tensor:
        batch, count, width = own.shape
        slot = F.pad(inverse + 1, (1, 0))
        start = torch.arange(batch, device=own.device, dtype=slot.dtype)[:, None] * count
        place = torch.arange(slot.shape[1], device=own.device, dtype=slot.dtype) - 1
        row = torch.where(slot < count, slot + start, batch * count + place)
        table = torch.cat([own.reshape(batch * count, width), hidden])
        ctx.save_for_backward(inverse, places)
        return table.index_select(0, row.flatten()).view(batch, slot.shape[1], width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inverse, places = ctx.saved_tensors
        away = (inverse >= places.shape[1] - 1).to(grad.dtype)  # [B, L]
        hidden = torch.bmm(away.T.unsqueeze(1), grad[:, 1:].transpose(0, 1)).squeeze(1)
        return take_rows(grad, places), hidden, None, None

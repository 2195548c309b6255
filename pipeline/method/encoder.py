"""f: from a View to tokens, with the modules of a timm ViT, so that weights leave as timm weights.

Shape suffixes: B batch, K visible patches, L all patches, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.method.attention import attend, attention_order
from pipeline.method.checks import vit_options
from pipeline.method.views import View
from pipeline.method.vit import (
    SmallerTables,
    build_vit,
    init_as_mocov3,
    init_weights,
    run_block,
    sincos_position,
)


class PatchProjection(nn.Conv2d):
    """The patch embedding of a ViT, computed for the visible patches of uint8 images only.

    Same weight as timm's `patch_embed.proj`. forward: image uint8 [B, H, W, 3], visible int32
    [B, K], position float [L, D] or None → [B, K, D] in the weight's dtype.
    """

    def __init__(self, proj: nn.Conv2d, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        if proj.bias is None:
            raise UserError("the patch embedding of this ViT has no bias, which f expects")
        super().__init__(3, proj.out_channels, proj.kernel_size, proj.stride, bias=True)  # type: ignore[arg-type]
        self.bias: nn.Parameter  # always there, unlike in nn.Conv2d
        self.mean, self.std = mean, std

    def forward(self, image: Tensor, visible: Tensor, position: Tensor | None) -> Tensor:  # type: ignore[override]
        return kernels.embed_visible(
            image, visible, self.weight, self.bias, position, mean=self.mean, std=self.std
        )


Shapes = tuple[tuple[int, int], ...]  # (images, tokens of each) of parts that lie one after another


class EncoderBlock(Block):
    """timm's ViT block, which can also take the tokens of several views at once.

    Only attention mixes tokens: what else a block does is one launch for all of them, without
    padding. forward: x [B, N, D], or with shapes [sum of B_i N_i, D] → the same shape.
    """

    def forward(self, x: Tensor, shapes: Shapes = ()) -> Tensor:  # type: ignore[override]
        if not shapes:
            with attention_order(x.shape[1], x):
                return super().forward(x)
        x = x + self.ls1(self._attend(self.norm1(x), shapes))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Each token meets those of its own image and view."""
        attn: Any = self.attn
        mixed = []
        parts = attn.qkv(x).split([images * tokens for images, tokens in shapes])
        for (images, tokens), part in zip(shapes, parts, strict=True):
            heads = part.view(images, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = heads.unbind(0)
            out = attend(attn.q_norm(q), attn.k_norm(k), v)
            mixed.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return attn.proj(attn.norm(torch.cat(mixed)))

    @property
    def takes_parts(self) -> bool:
        """Whether forward with shapes is the block: nothing is dropped at random, which is drawn
        per image, and attention is timm's fused one."""
        attn = self.attn
        plain = type(attn) is Attention and attn.fused_attn and hasattr(attn, "norm")
        plain = plain and getattr(attn, "gate", None) is None
        rates = [getattr(m, "p", getattr(m, "drop_prob", 0.0)) for m in self.modules()]
        return plain and not (self.training and any(rates))


class Encoder(nn.Module):
    """f(*view) → tokens [B, 1 + K, D] (masked patches dropped) or [B, 1 + L, D] (mask tokens).

    The state dict has the names of timm's VisionTransformer (plus `mask_token` where there is
    one). Positions are fixed sin-cos, zero for the cls token.
    """

    pos_embed: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        options = vit_options(recipe.encoder)
        vit = build_vit(recipe.encoder.arch, options)
        self.patch, self.width = vit.patch_embed.patch_size[0], vit.embed_dim
        self.grid: tuple[int, int] = vit.patch_embed.grid_size
        proj = PatchProjection(vit.patch_embed.proj, recipe.data.mean, recipe.data.std)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        assert vit.cls_token is not None
        self.cls_token = vit.cls_token
        self.row_first = recipe.encoder.init == "mocov3"
        self.register_buffer("pos_embed", self.position_table()[None])
        patches = [side // self.patch for side in recipe.smaller_sides]
        self.smaller_grids = [(n, n) for n in patches]
        self.smaller = SmallerTables({n * n: self.position_table((n, n)) for n in patches})
        self.blocks = vit.blocks
        for block in self.blocks:
            if type(block) is Block:
                block.__class__ = EncoderBlock
        self.norm = vit.norm
        for module in self.norm, *self.blocks.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        self.grad_checkpointing = False  # set by the engine; changes memory, not results
        self.mask_token: nn.Parameter | None = None
        if recipe.encoder.masked_tokens == "replace":
            self.mask_token = nn.Parameter(torch.zeros(self.width))
        init_weights(self)
        if recipe.encoder.init == "mocov3":
            init_as_mocov3(self)
        proj.requires_grad_(not recipe.encoder.freeze_patch)

    def position_table(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The exact fixed positions: float32 [1 + L, D]. grid: of patches; by default that of the
        image size."""
        return sincos_position(grid or self.grid, self.width, row_first=self.row_first)

    def forward(
        self,
        image: Tensor,
        visible: Tensor,
        inverse: Tensor,
        *,
        drop: bool = False,
        second: View | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The fields of a View → tokens, cls token first, after the final norm.

        image: uint8 [B, H, W, 3]; visible: int32 [B, K]; inverse: int32 [B, L]. drop: leave masked
        patches out even if the recipe has mask tokens (as evaluation does). second: another
        view; the tokens of both, whose weights are then read, and under ZeRO-3 gathered, once.
        """
        x = self._embed(image, visible, inverse, drop)
        if second is None:
            return self._encode(x)
        return self._encode_both(x, self._embed(*second, drop))

    def _embed(self, image: Tensor, visible: Tensor, inverse: Tensor, drop: bool) -> Tensor:
        """A view → tokens before the first block."""
        position = self.smaller.at(inverse.shape[1], self.pos_embed[0])
        batch = image.shape[0]
        if self.mask_token is None or drop:
            patches = self.patch_embed["proj"](image, visible, position[1:])
            first = (self.cls_token[0] + position[:1]).to(patches.dtype)
            return torch.cat([first.expand(batch, 1, -1), patches], dim=1)
        patches = self.patch_embed["proj"](image, visible, None)
        first = self.cls_token.to(patches.dtype).expand(batch, 1, -1)
        x = torch.cat([first, patches], dim=1)
        return kernels.place_tokens(x, inverse, self.mask_token, position, prefix=1)

    def _encode(self, x: Tensor, *shapes: Shapes) -> Tensor:
        for block in self.blocks:
            x = run_block(block, self.grad_checkpointing, x, *shapes)
        z: Tensor = self.norm(x)
        return z

    def _encode_both(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D] and [B, M, D] through the blocks together, or one after the other where
        the blocks cannot take both."""
        if x.shape == y.shape:
            first, second = self._encode(torch.cat([x, y])).chunk(2)
            return first, second
        if not all(isinstance(b, EncoderBlock) and b.takes_parts for b in self.blocks):
            return self._encode(x), self._encode(y)
        shapes = tuple((part.shape[0], part.shape[1]) for part in (x, y))
        z = self._encode(torch.cat([x.flatten(0, 1), y.flatten(0, 1)]), shapes)
        first, second = z.split([images * tokens for images, tokens in shapes])
        return first.view_as(x), second.view_as(y)

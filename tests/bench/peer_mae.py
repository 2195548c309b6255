"""MAE's training step written plainly, as an oracle and as the peer of `make bench-step`.

He et al. 2022, Sec. 3: embed every patch, keep some, encode; decode the whole sequence, predict
every patch, take the error where patches were hidden. Images arrive normalised, as floats.
Parameters have facebookresearch/mae's names, so pipeline.weights.interop moves weights to and fro.
"""

from functools import partial

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class PlainMAE(nn.Module):
    """images float [B, 3, S, S], noise float [B, L] → loss. The patches of least noise stay."""

    def __init__(
        self,
        *,
        side: int = 224,
        patch: int = 16,
        encoder: tuple[int, int, int] = (768, 12, 12),
        decoder: tuple[int, int, int] = (512, 8, 16),
        hide: float = 0.75,
    ) -> None:
        """encoder, decoder: (width, depth, heads)."""
        super().__init__()
        self.patch, self.hide = patch, hide
        length = (side // patch) ** 2
        norm = partial(nn.LayerNorm, eps=1e-6)
        width, depth, heads = encoder
        self.patch_embed = PatchEmbed(side, patch, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", torch.zeros(1, 1 + length, width))
        self.blocks = nn.Sequential(
            *[Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        )
        self.norm = norm(width)
        self.decoder_embed = nn.Linear(width, decoder[0])
        width, depth, heads = decoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, 1 + length, width))
        self.decoder_blocks = nn.Sequential(
            *[Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, 3 * patch * patch)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        tokens = self.patch_embed(image) + self.pos_embed[:, 1:]
        batch, length, width = tokens.shape
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        keep = int(length * (1 - self.hide))
        tokens = tokens.gather(1, order[:, :keep, None].expand(-1, -1, width))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        z = self.norm(self.blocks(torch.cat([first, tokens], dim=1)))

        z = self.decoder_embed(z)
        masks = self.mask_token.expand(batch, length - keep, -1)
        body = torch.cat([z[:, 1:], masks], dim=1)
        body = body.gather(1, back[:, :, None].expand(-1, -1, z.shape[2]))
        x = torch.cat([z[:, :1], body], dim=1) + self.decoder_pos_embed
        prediction = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

        target = self.patchify(image)
        centred = target - target.mean(dim=-1, keepdim=True)
        target = centred / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        error = (prediction - target).square().mean(dim=-1)
        hidden = (back >= keep).float()
        return (error * hidden).sum() / hidden.sum()

    def patchify(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, L, p·p·3], values of a patch as (row, column, channel)."""
        p = self.patch
        grid = image.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B c rows p columns p
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

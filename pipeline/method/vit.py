"""A plain ViT: timm's modules, the sin-cos position table, and initial weights."""

from __future__ import annotations

import traceback
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config.timm_names import no_model
from pipeline.errors import UserError
from pipeline.method.checks import check_table


def build_vit(arch: str, options: dict[str, Any]) -> VisionTransformer:
    """A timm ViT without a head, with its options checked.

    Raises UserError for an unknown name, for options that timm refuses, and for a variant that is
    not plain.
    """
    if arch not in timm.list_models(arch):
        raise no_model(arch, f"encoder.arch {arch!r}")
    try:
        with torch.random.fork_rng(devices=[]):  # we initialise it again; leave the state alone
            vit = timm.create_model(arch, num_classes=0, global_pool="token", **options)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        # An assertion without a text says its condition at least: the line of timm.
        line = traceback.extract_tb(error.__traceback__)[-1].line
        reason = str(error) or line or type(error).__name__
        raise UserError(f"encoder: timm refuses {arch} with {options}: {reason}") from None
    if not is_plain(vit):
        raise UserError(
            f"encoder.arch {arch!r} is not a plain ViT (patches by one convolution, cls token, "
            "no registers, no pre-norm)"
        )
    assert isinstance(vit, VisionTransformer)
    return vit


def is_plain(vit: nn.Module) -> bool:
    """Whether it is a ViT such as f: patches of RGB by one convolution, one cls token, learned
    or fixed positions, no more.
    """
    return (
        type(vit) is VisionTransformer
        and type(vit.patch_embed) is PatchEmbed
        and isinstance(vit.patch_embed.norm, nn.Identity)
        and vit.patch_embed.proj.in_channels == 3
        and not vit.dynamic_img_size
        and vit.has_class_token
        and isinstance(vit.norm_pre, nn.Identity)
        and isinstance(vit.norm, nn.LayerNorm)
        and vit.pos_embed is not None
        and vit.pos_embed.shape[1] == vit.patch_embed.num_patches + 1  # with registers more
    )


def sincos_position(grid: tuple[int, int], width: int, *, row_first: bool = False) -> Tensor:
    """Fixed sin-cos positions of MAE: float32 [1 + L, D], zero for the cls token.

    The first half of the channels encodes the column, the second the row (MoCo v3's table, with
    row_first, the other way round); in each half, sines then cosines of
    coordinate / 10000^(2i / (D / 2)), i = 0 … D / 4 - 1.
    Raises UserError where 4 does not divide the width.
    """
    check_table(width)
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"
    )
    both = (rows, columns) if row_first else (columns, rows)
    halves = [c.reshape(-1, 1) * omega for c in both]
    table = torch.cat([f(half) for half in halves for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float()


class SmallerTables(nn.Module):
    """Tables of the images smaller than the full size on which early steps train (data.sizes).

    tables: number of patches → table [1 + L, D], that of a model built at that size. Fixed and
    recomputed at each start: no state dict has them.
    """

    def __init__(self, tables: dict[int, Tensor]) -> None:
        super().__init__()
        for length, table in tables.items():
            self.register_buffer(f"of_{length}", table, persistent=False)

    def at(self, length: int, full: Tensor) -> Tensor:
        """The table for `length` patches; the full size's where that is none of the smaller."""
        table: Tensor = getattr(self, f"of_{length}", full)
        return table


def run_block(block: nn.Module, checkpointing: bool, *inputs: Any) -> Tensor:
    """A transformer block; checkpointing keeps only its inputs for backward."""
    if checkpointing and torch.is_grad_enabled():
        out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    else:
        out = block(*inputs)
    return out


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: xavier-uniform linears (the patch embedding as a linear), tokens
    N(0, 0.02), LayerNorm one and zero, biases zero.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.out_channels, -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def init_as_mocov3(encoder: Any) -> None:
    """Where MoCo v3's initial weights differ: q, k and v as three linears, a small cls token."""
    nn.init.normal_(encoder.cls_token, std=1e-6)
    for module in encoder.blocks.modules():  # a block may have several attentions
        if isinstance(qkv := getattr(module, "qkv", None), nn.Linear):
            for part in qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)

"""Any ViT of timm behind one interface: what the evaluations read of an encoder.

    forward_features(pixels [B, 3, H, W]) → tokens [B, prefix + L, D]
    forward_head(tokens, pre_logits=True)   the encoder's own pooling → [B, D]
    num_prefix_tokens   cls, distillation and register tokens before those of the patches
    num_features        D
    patch_embed         img_size, grid_size, num_patches, patch_size, proj
    fc_norm             norm of the pooled feature, or an identity
    blocks, no_weight_decay()

Most of timm's have it as they are; `adopt` gives the others what they lack.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.layers.pos_embed_sincos import apply_keep_indices_nlc
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from pipeline.errors import UserError

FAMILIES = (
    VisionTransformer, Beit, Eva, VisionTransformerRelPos, VisionTransformerSAM, NaFlexVit,
)  # fmt: skip
# Further keywords with which an architecture is tried until its norms are those of a file.
_POOLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"global_pool": "token"},
    {"global_pool": "avg"},
    *({"global_pool": p, key: on} for p in ("token", "avg") for key in ("fc_norm", "use_fc_norm")
      for on in (False, True)),
)  # fmt: skip


class _Sam(VisionTransformerSAM):
    """SAM's encoder: a map [B, D, H, W] as tokens, row by row."""

    num_prefix_tokens = 0
    cls_token = None
    fc_norm = staticmethod(lambda feature: feature)

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x).flatten(2).mT

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        side = math.isqrt(x.shape[1])
        return super().forward_head(x.mT.unflatten(2, (side, side)), pre_logits=pre_logits)


class _NaFlex(NaFlexVit):
    """NaFlexViT, which takes any image: of the size that it was built for."""

    img_size: tuple[int, int]

    @property
    def cls_token(self) -> nn.Parameter | None:
        return self.embeds.cls_token

    @property
    def patch_embed(self) -> SimpleNamespace:
        return _patch_embed(self.img_size, self.embeds.patch_size, self.embeds.proj)


class _Within:
    """A classifier of timm around an encoder (DeepSeek, Gemma 4, Qwen 3): patches in a map
    [B, H, W, D] or in a row, without further tokens; its norm is that of their mean.
    """

    num_prefix_tokens = 0
    cls_token = None
    img_size: tuple[int, int]
    encoder: Any
    norm: nn.Module

    @property
    def blocks(self) -> Any:
        return self.encoder.blocks

    @property
    def fc_norm(self) -> nn.Module:
        return self.norm

    @property
    def patch_embed(self) -> SimpleNamespace:
        own = self.encoder.patch_embed
        proj = getattr(own, "proj", None) or own.input_proj
        return _patch_embed(self.img_size, own.patch_size, proj)

    def forward_features(self, x: Tensor, **keywords: Any) -> Tensor:
        return super().forward_features(x, **keywords).flatten(1, -2)  # type: ignore[misc]


class _Late:
    """CaiT and XCiT, whose cls token joins after the blocks: no norm of the pooled feature."""

    fc_norm = staticmethod(lambda feature: feature)


def _patch_embed(
    img_size: tuple[int, int], patch_size: tuple[int, int], proj: nn.Module
) -> SimpleNamespace:
    """What the evaluations read of timm's PatchEmbed."""
    grid = tuple(side // patch for side, patch in zip(img_size, patch_size, strict=True))
    return SimpleNamespace(
        img_size=img_size, grid_size=grid, num_patches=math.prod(grid), patch_size=patch_size,
        proj=proj,
    )  # fmt: skip


def _size(model: Any, options: dict[str, Any]) -> tuple[int, int]:
    """Sides in pixels of the images that a model of any size is to be given."""
    size = options.get("img_size") or model.pretrained_cfg["input_size"][-1]
    return (size, size) if isinstance(size, int) else tuple(size)


def adopt(model: nn.Module, arch: str, options: dict[str, Any]) -> VisionTransformer:
    """The model with the interface above, in eval mode; its weights' names stay timm's.

    UserError where tokens cannot be read from it.
    """
    kind = type(model)
    if not is_family(model):
        kinds = ", ".join((*(family.__name__ for family in FAMILIES), *_FURTHER))
        raise UserError(
            f"{arch} is a {type(model).__name__}; the protocols take vision transformers of timm "
            f"({kinds})"
        )
    if isinstance(model, VisionTransformerSAM):
        model.__class__ = _Sam
    elif isinstance(model, NaFlexVit):
        model.__class__ = _NaFlex
        model.img_size = _size(model, options)  # type: ignore[assignment]
    elif kind.__name__ in _FURTHER:
        mixin = _FURTHER[kind.__name__]
        model.__class__ = type(kind.__name__, (mixin, kind), {})
        if mixin is _Within:
            model.img_size = _size(model, options)  # type: ignore[assignment]
    return model.eval()  # type: ignore[return-value]


# By name, since not every timm has them.
_FURTHER: dict[str, type] = {
    "Cait": _Late,
    "Xcit": _Late,
    "DeepseekVitClassifier": _Within,
    "Gemma4VitClassifier": _Within,
    "Qwen3VitClassifier": _Within,
}


def is_family(model: nn.Module) -> bool:
    """Whether tokens can be read from a model of timm."""
    return isinstance(model, FAMILIES) or type(model).__name__ in _FURTHER


def within_classifier(arch: str) -> bool:
    """Whether timm's names of an architecture begin with `encoder.`, and that is no prefix."""
    module = timm.model_entrypoint(arch.split(".")[0]).__module__
    around = module.endswith((".deepseek_vit", ".gemma4_vit", ".qwen3_vit"))
    return around and not arch.endswith("_enc")


def build_family(
    arch: str, options: dict[str, Any], weights: Iterable[str] | None = None
) -> VisionTransformer:
    """timm's model `arch`, adopted, without a classifier.

    weights: names of a file; the pooling is then the first whose norms are among them, so that a
    model pretrained with the norm on its tokens is not taken for one with the norm behind the
    mean. Raises UserError where timm refuses.
    """
    wanted = _norms(weights or ())
    first, refused = None, ""
    for pooling in _POOLINGS if wanted else _POOLINGS[:1]:
        if set(pooling) & set(options):
            continue
        try:
            model = timm.create_model(arch, num_classes=0, **options, **pooling)
        except Exception as error:
            # timm checks keywords by assert, by shapes, or not at all
            refused = refused or " ".join(str(error).split())[:200] or type(error).__name__
            continue
        if not is_family(model):
            return adopt(model, arch, options)
        first = first or model
        if not wanted or _norms(model.state_dict()) == wanted:
            return adopt(model, arch, options)
    if first is None:
        raise UserError(f"timm refuses {arch} with {options}: {refused}")
    return adopt(first, arch, options)


def _norms(names: Iterable[str]) -> set[str]:
    return {n.split(".")[0] for n in names if n.startswith(("norm.", "fc_norm."))}


def conversion(arch: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """timm's own conversion of the weights that its architecture was published with."""
    entry = timm.model_entrypoint(arch.split(".")[0])
    convert = getattr(importlib.import_module(entry.__module__), "checkpoint_filter_fn", None)
    return convert or (lambda state, _: state)


def with_timm_names(state: dict[str, Tensor], vit: nn.Module, arch: str) -> dict[str, Tensor]:
    """Weights under the names of `vit`: timm's conversion, and what it leaves to others."""
    # DINOv2 trains its blocks in chunks: blocks.<chunk>.<number>.
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
    if isinstance(vit, VisionTransformer) and "blocks.0.gamma_1" in state:  # DeiT III
        state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in state.items()}
    if isinstance(vit, VisionTransformer) and is_clip_tower(state):
        state = {f"visual.{k}": v for k, v in state.items()}  # by which timm knows it
    if isinstance(vit, Beit) and vit.rel_pos_bias is None:
        state = _bias_of_each_block(state, len(vit.blocks))
    if isinstance(vit, Eva):
        state = {k: v for k, v in state.items() if k != "mask_token"}  # timm then renames the norm
        state = _without_zero_biases(state, vit, arch)
    return conversion(arch)(state, vit)


def is_clip_tower(names: Iterable[str]) -> bool:
    """Whether weights are CLIP's visual tower alone (OpenAI's, OpenCLIP's, Meta's PE)."""
    return {"conv1.weight", "class_embedding"} <= set(names)


def _bias_of_each_block(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """BEiT's weights where all blocks share one bias of relative positions, as in its pretraining:
    each block gets that one."""
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is None:
        return state
    names = (f"blocks.{n}.attn.relative_position_bias_table" for n in range(depth))
    return state | dict.fromkeys(names, shared)


def _without_zero_biases(state: dict[str, Tensor], vit: Eva, arch: str) -> dict[str, Tensor]:
    """DINOv3's weights without its biases of q, k and v where `vit` has none: those of k are always
    masked. UserError where the others are not 0, which timm drops without a word."""
    first: Any = vit.blocks[0]
    if "storage_tokens" not in state or getattr(first.attn, "q_bias", None) is not None:
        return state
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        if any(bool(part.any()) for part in state.pop(name).chunk(3)[::2]):
            raise UserError(f"{name} is not 0, and {arch} has no place for it; give {arch}_qkvb")
    return state


def block_features(vit: nn.Module, pixels: Tensor, kept: Tensor | None = None) -> list[Tensor]:
    """Tokens [b, prefix + K, D] after every block; patches not kept are dropped before the first.

    kept: int64 [b, K], or None for all. The encoder is a VisionTransformer or an Eva (see
    `drops_patches`), whose rotary positions go with the patches.
    """
    assert isinstance(vit, VisionTransformer | Eva)
    embedded: Any = vit._pos_embed(vit.patch_embed(pixels))
    tokens, rope = embedded if isinstance(vit, Eva) else (embedded, None)
    if kept is not None:
        prefix = vit.num_prefix_tokens
        index = (kept + prefix)[..., None].expand(-1, -1, tokens.shape[-1])
        if rope is not None:
            rope = apply_keep_indices_nlc(tokens, rope, kept)
            rope = rope.transpose(0, 1) if vit.rope_mixed else rope.unsqueeze(1)
        tokens = torch.cat([tokens[:, :prefix], tokens.gather(1, index)], dim=1)
    tokens = vit.norm_pre(tokens)
    outputs = []
    for number, block in enumerate(vit.blocks):
        if isinstance(vit, Eva):
            of_block = rope[number] if vit.rope_mixed and rope is not None else rope
            tokens = block(tokens, rope=of_block)
        else:
            tokens = block(tokens)
        outputs.append(tokens)
    return outputs


def drops_patches(vit: nn.Module) -> bool:
    """Whether patches can be left out: no block knows them by their position in a full image."""
    return isinstance(vit, VisionTransformer | Eva)


def random_family(arch: str, options: dict[str, Any], seed: int) -> VisionTransformer:
    """A ViT that is not plain, with timm's initial weights drawn by a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_family(arch, options)

"""Weights under other projects' names. Names are facts; no code of those projects is used.

facebookresearch/mae: one flat state dict for encoder and decoder. Hugging Face: ViTModel (encoder)
and ViTMAEForPreTraining (encoder and decoder), q, k and v apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.method.checks import need_mae_decoder
from pipeline.method.encoder import Encoder
from pipeline.method.objective import Objective
from pipeline.weights.files import refuse_integers
from pipeline.weights.run import encoder_state

# facebookresearch/mae's prefix → ours, inside an Objective with a decoder.
_MAE_DECODER = {
    "decoder_embed.": "measure.decoder.embed.",
    "decoder_blocks.": "measure.decoder.blocks.",
    "decoder_norm.": "measure.decoder.norm.",
    "decoder_pred.": "measure.decoder.head.",
}


def _ours(name: str) -> str:
    """Our name of a facebookresearch/mae parameter."""
    if name == "mask_token":
        return "measure.decoder.mask_token"
    if name == "decoder_pos_embed":
        return "measure.decoder.pos_embed"
    for theirs, ours in _MAE_DECODER.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return "encoder." + name


def mae_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder of a facebookresearch/mae state dict under our names (measure.decoder.…)."""
    mine = {_ours(k): v for k, v in state.items() if k.startswith("decoder") or k == "mask_token"}
    flat = ("measure.decoder.mask_token", "measure.decoder.pos_embed")
    return {k: v.flatten(0, -2).squeeze(0) if k in flat else v for k, v in mine.items()}


def from_mae(objective: Objective, state: Mapping[str, Tensor]) -> None:
    """Load a checkpoint in facebookresearch/mae's names (its "model" entry) into an objective.

    Raises UserError naming the first weight that is missing, unknown or of another shape.
    """
    if not objective.reconstructs:
        raise UserError("a facebookresearch/mae checkpoint holds a decoder: use a MAE recipe")
    mine = objective.state_dict()
    renamed = {_ours(name): value for name, value in state.items()}
    for name in sorted(mine.keys() ^ renamed.keys()):
        problem = "is missing from" if name in mine else "is not expected in"
        raise UserError(f"weight {name} {problem} the facebookresearch/mae checkpoint")
    for name, value in renamed.items():
        if value.numel() != mine[name].numel():
            raise UserError(
                f"weight {name} has shape {list(value.shape)}, the recipe needs "
                f"{list(mine[name].shape)}"
            )
    refuse_integers(objective, renamed, "the facebookresearch/mae checkpoint")
    objective.load_state_dict({k: v.reshape(mine[k].shape) for k, v in renamed.items()})


def to_mae(objective: Objective) -> dict[str, Tensor]:
    """The state dict of an objective under facebookresearch/mae's names and shapes."""
    need_mae_decoder(objective.recipe)
    back = {ours: theirs for theirs, ours in _MAE_DECODER.items()}
    state: dict[str, Tensor] = {}
    for name, value in objective.state_dict().items():
        if name == "measure.decoder.mask_token":
            state["mask_token"] = value[None, None]
        elif name == "measure.decoder.pos_embed":
            state["decoder_pos_embed"] = value[None]
        elif name.startswith("encoder."):
            state[name.removeprefix("encoder.")] = value
        else:
            ours = next(prefix for prefix in back if name.startswith(prefix))
            state[back[ours] + name.removeprefix(ours)] = value
    return state


_MAE_BLOCK = {f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1",
              "mlp.fc2") for kind in ("weight", "bias")}  # fmt: skip
_MAE_OUTSIDE = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
                "norm.weight", "norm.bias"}  # fmt: skip


def not_in_mae(encoder: Encoder) -> list[str]:
    """Weights that only one has of this encoder and facebookresearch/mae's, which does not load a
    file with others."""
    blocks = (f"blocks.{n}.{name}" for n in range(len(encoder.blocks)) for name in _MAE_BLOCK)
    return sorted(encoder.state_dict().keys() ^ {*_MAE_OUTSIDE, *blocks})


def vit_facts(encoder: Encoder) -> dict[str, int]:
    """Sizes of a ViT that a configuration names."""
    block = encoder.blocks[0]
    return {
        "hidden_size": encoder.width,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,  # type: ignore[dict-item,union-attr]
        "intermediate_size": block.mlp.fc1.out_features,  # type: ignore[dict-item,union-attr]
        "image_size": encoder.grid[0] * encoder.patch,
        "patch_size": encoder.patch,
    }


_HF_COMMON: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "qkv_bias": True,
}


# Hugging Face's names of a ViT, by ours: of a block, and outside the blocks.
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HF_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def _hf_block(state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """One transformer block under Hugging Face's names (q, k and v apart)."""
    result: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for mine, other in _HF_BLOCK.items():
            result[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{mine}.{kind}"]
        parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
        for name, part in zip(("query", "key", "value"), parts, strict=True):
            result[f"{theirs}.attention.attention.{name}.{kind}"] = part.contiguous()
    return result


def _hf_encoder(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """An encoder under Hugging Face's names; UserError for a part that its ViT does not have."""
    parts = {f"{name}.{kind}" for name in (*_HF_BLOCK, "attn.qkv") for kind in ("weight", "bias")}
    known = {*_HF_OUTSIDE, *(f"blocks.{n}.{part}" for n in range(depth) for part in parts)}
    for name in sorted(known ^ state.keys()):
        problem = "its ViT has no place for" if name in state else "its ViT needs"
        raise UserError(f"transformers: {problem} {name}; use --format timm")
    result = {theirs: state[ours] for ours, theirs in _HF_OUTSIDE.items()}
    for number in range(depth):
        result |= _hf_block(state, f"blocks.{number}", f"encoder.layer.{number}")
    return result


def from_hf(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The encoder of a ViTModel or ViTMAEForPreTraining state dict under timm's names.

    KeyError names a weight that is missing; a pooler and a decoder are left out. UserError where
    there are more than `depth` blocks.
    """
    prefix = "vit." if any(name.startswith("vit.") for name in state) else ""
    further = f"{prefix}encoder.layer.{depth}."
    if any(name.startswith(further) for name in state):
        raise UserError(
            f"config.json: num_hidden_layers {depth}, but the weights go on ({further}*)"
        )
    result = {ours: state[prefix + theirs] for ours, theirs in _HF_OUTSIDE.items()}
    for number in range(depth):
        result |= _from_hf_block(state, f"blocks.{number}", f"{prefix}encoder.layer.{number}")
    return result


def _from_hf_block(state: Mapping[str, Tensor], mine: str, theirs: str) -> dict[str, Tensor]:
    """One transformer block under timm's names (q, k and v in one)."""
    result: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for ours, other in _HF_BLOCK.items():
            result[f"{mine}.{ours}.{kind}"] = state[f"{theirs}.{other}.{kind}"]
        parts = (f"{theirs}.attention.attention.{n}.{kind}" for n in ("query", "key", "value"))
        result[f"{mine}.attn.qkv.{kind}"] = torch.cat([state[part] for part in parts])
    return result


def from_hf_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder of a ViTMAEForPreTraining state dict under our names; {} where it has none."""
    if "decoder.mask_token" not in state:
        return {}
    result = {
        "mask_token": state["decoder.mask_token"],
        "decoder_pos_embed": state["decoder.decoder_pos_embed"],
    }
    for part in ("decoder_embed", "decoder_norm", "decoder_pred"):
        for kind in ("weight", "bias"):
            result[f"{part}.{kind}"] = state[f"decoder.{part}.{kind}"]
    # transformers 5 writes decoder_layers.N as decoder_encoder.layer.N.
    old, new = "decoder.decoder_layers.", "decoder.decoder_encoder.layer."
    state = {k.replace(new, old): v for k, v in state.items()}
    depth = len({k.split(".")[2] for k in state if k.startswith(old)})
    for number in range(depth):
        result |= _from_hf_block(state, f"decoder_blocks.{number}", f"{old}{number}")
    return mae_decoder(result)


def hf_arch(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(timm's name, options of timm.create_model) of a ViT by Hugging Face's configuration.

    UserError for what a plain ViT lacks (another activation, no bias of q, k and v), and for sizes
    that are none. KeyError names one that is missing.
    """
    for key in ("hidden_act", "qkv_bias", "num_channels"):
        if config.get(key, _HF_COMMON[key]) != _HF_COMMON[key]:
            raise UserError(f"config.json: {key} {config[key]!r} is not that of a plain ViT")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for key in sizes:
        if type(config[key]) is not int or config[key] < 1:
            raise UserError(f"config.json: {key} {config[key]!r} is not a whole number from 1 up")
    width = config["hidden_size"]
    return "vit_base_patch16_224", {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / width,
    }


def hf_eps(config: Mapping[str, Any]) -> float:
    """The norms' eps by Hugging Face's configuration. UserError where it is none."""
    eps = config.get("layer_norm_eps", 1e-12)
    if type(eps) not in (int, float) or not 0 < eps < math.inf:
        raise UserError(f"config.json: layer_norm_eps {eps!r} is not a number above 0")
    return float(eps)


def to_hf_vit(objective: Objective) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, config) of the encoder in the layout of Hugging Face's ViTModel, without a pooler."""
    encoder = objective.encoder
    state = _hf_encoder(encoder_state(encoder.state_dict(), encoder), len(encoder.blocks))
    config = {"architectures": ["ViTModel"], "model_type": "vit"} | vit_facts(encoder)
    return state, config | _HF_COMMON | {"encoder_stride": encoder.patch}


def to_hf_mae(objective: Objective) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, config) in the layout of Hugging Face's ViTMAEForPreTraining."""
    encoder, measure = objective.encoder, objective.measure
    whole = to_mae(objective)
    mine = encoder_state(encoder.state_dict(), encoder)
    state = {f"vit.{k}": v for k, v in _hf_encoder(mine, len(encoder.blocks)).items()}
    state |= {
        "decoder.mask_token": whole["mask_token"],
        "decoder.decoder_pos_embed": whole["decoder_pos_embed"],
    }
    for part in ("decoder_embed", "decoder_norm", "decoder_pred"):
        for kind in ("weight", "bias"):
            state[f"decoder.{part}.{kind}"] = whole[f"{part}.{kind}"]
    decoder = measure.recipe.decoder
    for number in range(decoder.depth):
        state |= _hf_block(whole, f"decoder_blocks.{number}", f"decoder.decoder_layers.{number}")
    config = {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae"}
    config |= vit_facts(encoder) | _HF_COMMON
    return state, config | {
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": 4 * decoder.width,
        "mask_ratio": objective.recipe.views.mask_ratio,
        "norm_pix_loss": measure.recipe.norm_pix,
    }

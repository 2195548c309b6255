"""Start a pretraining from existing weights, with a fresh schedule and optimizer.

The source is whatever load_encoder takes: a relaxmim run (encoder and decoder or heads; with `ema`
those of its teacher), our exports, facebookresearch/mae's file (encoder and decoder), or an encoder
of timm, DINO, MoCo v3 or BEiT. A part that f lacks is folded into f's weights where that is exact:

    layer scale      x + g (W y + b)       → W' = diag(g) W, b' = g b
    cls position     cls + p_0             → cls' = cls + p_0
    mean and std     W (x - m) / s + b     → the same function of the recipe's pixels

f's positions are fixed sin-cos ones, computed for the recipe's image size; a learned table is left
out, and the log says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from pipeline.config.recipe import Recipe, load_recipe
from pipeline.errors import UserError
from pipeline.method.encoder import Encoder
from pipeline.method.objective import Objective
from pipeline.method.vit import build_vit
from pipeline.weights.files import find_encoder, load_tensors, refuse_integers
from pipeline.weights.foreign import (
    exported_info,
    from_hub,
    heads_of,
    hugging_face_statistics,
    is_left_out,
    named,
)
from pipeline.weights.interop import from_hf, from_hf_decoder, hf_arch, mae_decoder
from pipeline.weights.layouts import fixed_options, layout_of, mae_decoder_heads, refuse_stem
from pipeline.weights.positions import is_sincos, square
from pipeline.weights.run import (
    encoder_info,
    encoder_part,
    full_weights,
    read_encoder,
    teacher_weights,
)
from pipeline.weights.source import read_config
from shard_tools.home import expand_home

POSITIONS, MASK = "encoder.pos_embed", "encoder.mask_token"
NORM = ("encoder.norm.weight", "encoder.norm.bias")


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    encoder: under timm's names; rest: of the measure, under ours. info: arch, options, mean and std
    where they are known. decoder_heads: of a decoder in `rest`, 0 where that is not known.
    """

    encoder: dict[str, Tensor]
    rest: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    decoder_heads: int = 0


@dataclass
class Start:
    """What an objective took: our names of its tensors, and theirs of what was not taken."""

    taken: list[str] = field(default_factory=list)
    remade: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def lines(self, source: str) -> list[str]:
        """For the log."""
        counts = f"{len(self.taken)} tensors taken, {len(self.remade)} resized"
        result = [f"starts from {source}: {counts}, {len(self.fresh)} left fresh"]
        named = {"resized": self.remade, "left fresh": self.fresh, "not in it": self.left}
        result += [f"  {what}: {_grouped(names)}" for what, names in named.items() if names]
        return result


def start_from(objective: Objective, weights: str, ema: bool = False) -> Start:
    """Give an objective the weights of a source; UserError where that is another architecture.

    The teacher, if there is one, is to be made from the objective afterwards.
    """
    recipe, f = objective.recipe, objective.encoder
    weights = expand_home(weights)
    source = read_source(weights, recipe, ema)
    _check_heads(source, f, weights)
    given = {f"encoder.{name}": value for name, value in source.encoder.items()} | source.rest
    refuse_integers(objective, given, weights)
    state = dict(source.encoder)
    start, new = Start(), {}
    _take_positions(state, f, start, weights)
    state = _plain(state, keep_scale=any(k.endswith("ls1.gamma") for k in f.state_dict()))
    if {"mean", "std"} <= source.info.keys():
        _renormalise(state, source.info, recipe)
    mine = objective.state_dict()
    for name in [n for n in mine if n.startswith("encoder.")]:
        theirs = state.pop(name.removeprefix("encoder."), None)
        if name == POSITIONS:
            continue
        no_mask = name == MASK and (theirs is None or theirs.numel() != mine[name].numel())
        no_norm = theirs is None and name in NORM and "fc_norm.weight" in state
        if no_mask or no_norm:
            start.fresh.append(name)
        else:
            new[name] = _fitting(theirs, mine[name], name, weights)
    _refuse_more(state, weights)
    start.left += sorted(state)
    _take_measure(source, objective, new, start)
    start.taken += new
    objective.load_state_dict(mine | new)
    return start


# ------------------------------------------------------------------ where weights come from


def read_source(weights: str, recipe: Recipe, ema: bool) -> Source:
    """The weights at a path, or timm:NAME. UserError."""
    path = Path(weights)
    if weights.startswith("timm:") or (path / "config.json").is_file():
        if ema:
            raise UserError(f"init.ema: {weights} keeps no average of its weights")
        return _hub(weights) if weights.startswith("timm:") else _hugging_face(path)
    if path.is_file():
        return _file(path, recipe, ema)
    if (path / "recipe.yaml").is_file() and (path / "model.safetensors").is_file():
        return _run(path, ema)
    vit, info = read_encoder(path)
    if ema:
        return Source(teacher_weights(path), info=info)
    return Source(vit.state_dict(), info=info)


def _hub(weights: str) -> Source:
    vit, info = from_hub(weights.removeprefix("timm:"), {})
    return Source(vit.state_dict(), info=info)


def _run(path: Path, ema: bool) -> Source:
    """A run's folder or one of its checkpoints."""
    theirs = load_recipe(path / "recipe.yaml")
    full = full_weights(path)
    encoder = encoder_part(full) | (teacher_weights(path) if ema else {})
    rest = {k: v for k, v in full.items() if k.startswith("measure.")}
    decoder = getattr(theirs.measure, "decoder", None)
    return Source(encoder, rest, encoder_info(theirs), 0 if decoder is None else decoder.heads)


def _file(path: Path, recipe: Recipe, ema: bool) -> Source:
    content = load_tensors(path)
    written = exported_info(path, content)
    found = find_encoder(content, path, ema=ema)
    refuse_stem(found, path)
    state, rest, decoder_heads = found.state, {}, 0
    if "decoder_embed.weight" in state:
        rest, decoder_heads = mae_decoder(state), mae_decoder_heads(state)
        state = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}
    if written:
        return Source(state, rest, written, int(written.get("decoder_heads", 0)))
    layout = layout_of(found, content)
    info = named(recipe.encoder.arch, "") | {"options": fixed_options(layout, state)}
    if not layout.imagenet:
        config = timm.get_pretrained_cfg(recipe.encoder.arch)
        if config is not None:
            info |= {"mean": list(config.mean), "std": list(config.std)}
    return Source(state, rest, info, decoder_heads)


def _hugging_face(folder: Path) -> Source:
    try:
        config = read_config(folder)
        arch, options = hf_arch(config)
        weights = load_tensors(folder / "model.safetensors")
        encoder, rest = from_hf(weights, options["depth"]), from_hf_decoder(weights)
        statistics, _ = hugging_face_statistics(folder, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a ViTModel or ViTMAE of transformers ({error!r})") from None
    info: dict[str, Any] = {"arch": arch, "options": options, **statistics}
    return Source(encoder, rest, info, int(config.get("decoder_num_attention_heads", 0)))


# ------------------------------------------------------------------ making them f's


def _check_heads(source: Source, f: Encoder, where: str) -> None:
    """Refuse weights of another number of attention heads, which no shape shows."""
    options = dict(source.info.get("options", {}))
    arch = source.info.get("arch")
    if "num_heads" in options:
        theirs = options["num_heads"]
    elif arch and "img_size" in options:  # it says how it is built
        theirs = heads_of(build_vit(arch.split(".")[0], options | {"depth": 1}))
    else:
        return
    mine = heads_of(f)
    if theirs != mine:
        raise UserError(
            f"{where}: another architecture, with {theirs} heads where the recipe's encoder has "
            f"{mine}; set encoder.options.num_heads={theirs}"
        )


def _take_positions(state: dict[str, Tensor], f: Encoder, start: Start, where: str) -> None:
    """Compare the position table with f's, and fold that of the cls token into the token."""
    table = state.pop("pos_embed", None)
    if table is None:
        return
    length = table.shape[1]
    side = square(length - 1) or square(length)
    if table.ndim != 3 or side is None or table.shape[2] != f.width:
        raise UserError(
            f"{where}: another architecture, with a position table of {list(table.shape)} where "
            f"the recipe's encoder has {list(f.pos_embed.shape)}"
        )
    patches = table[0, length - side * side :]
    row_first = is_sincos(patches, (side, side))
    if row_first is None:
        start.left.append("pos_embed (learned; f has fixed sin-cos positions)")
        if length > side * side and "cls_token" in state:
            state["cls_token"] = state["cls_token"] + table[:, :1]
    elif row_first != f.row_first:
        order = "mocov3" if row_first else "mae"
        raise UserError(
            f"{where}: its positions have the {'row' if row_first else 'column'} first; set "
            f"encoder.init={order}"
        )
    else:
        (start.taken if (side, side) == f.grid else start.remade).append(POSITIONS)


def _plain(state: dict[str, Tensor], keep_scale: bool) -> dict[str, Tensor]:
    """The names of a plain ViT: q, k and v biases in one, layer scale as f has it or folded."""
    result = dict(state)
    for name, value in state.items():
        if name.endswith(".attn.q_bias"):  # BEiT: no bias of the keys
            block = name.removesuffix("q_bias")
            other = result.pop(block + "v_bias")
            result.pop(name)
            result[block + "qkv.bias"] = torch.cat([value, torch.zeros_like(value), other])
    for name in list(result):
        block, _, scale = name.rpartition(".gamma_")
        if scale in ("1", "2"):
            result[f"{block}.ls{scale}.gamma"] = result.pop(name)
    if keep_scale:
        return result
    for name in [n for n in result if n.endswith((".ls1.gamma", ".ls2.gamma"))]:
        gamma = result.pop(name)
        block = name[: -len(".ls1.gamma")]
        last = f"{block}.attn.proj" if name.endswith("ls1.gamma") else f"{block}.mlp.fc2"
        result[f"{last}.weight"] = gamma[:, None] * result[f"{last}.weight"]
        result[f"{last}.bias"] = gamma * result[f"{last}.bias"]
    return result


def _renormalise(state: dict[str, Tensor], info: Mapping[str, Any], recipe: Recipe) -> None:
    """The patch embedding of pixels by the source's mean and std, of those by the recipe's."""
    theirs, mine = ((d["mean"], d["std"]) for d in (info, dict(recipe.data)))
    weight, bias = state.get("patch_embed.proj.weight"), state.get("patch_embed.proj.bias")
    if weight is None or bias is None or [*map(list, theirs)] == [*map(list, mine)]:
        return
    (m, s), (m0, s0) = (torch.tensor(pair, dtype=torch.float64) for pair in (theirs, mine))
    exact = weight.double() / s[:, None, None]
    shifted = bias.double() + (exact * (m0 - m)[:, None, None]).sum((1, 2, 3))
    state["patch_embed.proj.bias"] = shifted.to(bias.dtype)
    state["patch_embed.proj.weight"] = (exact * s0[:, None, None]).to(weight.dtype)


def _fitting(theirs: Tensor | None, mine: Tensor, name: str, where: str) -> Tensor:
    if theirs is None:
        raise UserError(f"{where}: another architecture, without {name}, which the recipe has")
    alike = theirs.shape == mine.shape or (name == MASK and theirs.numel() == mine.numel())
    if not alike:
        raise UserError(
            f"{where}: another architecture: {name} has shape {list(theirs.shape)}, the recipe "
            f"needs {list(mine.shape)}"
        )
    return theirs.reshape(mine.shape).to(mine.dtype)


def _refuse_more(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse what f has no place for, but heads, pooling and relative positions."""
    known = ("fc_norm.", "mask_token", "norm.", "rel_pos_bias.", "pre_logits")
    for name in sorted(state):
        if not (is_left_out(name) or name.startswith(known) or "relative_position" in name):
            raise UserError(
                f"{where}: another architecture, with {name}, for which the recipe's encoder has "
                "no place"
            )


def _take_measure(
    source: Source, objective: Objective, new: dict[str, Tensor], start: Start
) -> None:
    """Decoder or heads: each part as a whole, if all of it fits; else it stays fresh."""
    mine = {k: v for k, v in objective.state_dict().items() if k.startswith("measure.")}
    decoder = getattr(objective.recipe.measure, "decoder", None)
    for part in dict.fromkeys(k.split(".")[1] for k in (*mine, *source.rest)):
        prefix = f"measure.{part}."
        ours = {k: v for k, v in mine.items() if k.startswith(prefix)}
        theirs = {k: v for k, v in source.rest.items() if k.startswith(prefix)}
        positions = f"{prefix}pos_embed"
        fits = ours.keys() == theirs.keys() and all(
            theirs[k].shape == v.shape for k, v in ours.items() if k != positions
        )
        heads = 0 if decoder is None or part != "decoder" else decoder.heads
        if not fits or (heads and source.decoder_heads not in (0, heads)):
            start.fresh += ours
            start.left += theirs
            continue
        new |= {k: theirs[k].to(v.dtype) for k, v in ours.items() if k != positions}
        if positions in ours:
            same = theirs[positions].shape == ours[positions].shape
            (start.taken if same else start.remade).append(positions)


def _grouped(names: list[str]) -> str:
    """Names, or where they are many, the parts that they belong to with how many."""
    if len(names) <= 4:
        return ", ".join(names)
    parts = Counter(".".join(n.split(".")[:2]) for n in names)
    return ", ".join(f"{part} ({count})" if count > 1 else part for part, count in parts.items())

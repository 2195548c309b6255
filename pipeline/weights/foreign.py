"""Encoders that others trained, or that we wrote in their form: files, folders, timm's hub."""

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.config.schema import IMAGENET_MEAN, IMAGENET_STD
from pipeline.config.timm_names import no_model
from pipeline.errors import UserError
from pipeline.weights.families import (
    adopt,
    build_family,
    is_clip_tower,
    with_timm_names,
    within_classifier,
)
from pipeline.weights.files import EMA, Found, find_encoder, load_tensors, refuse_integers
from pipeline.weights.header import METADATA, check_file, check_statistic, written_info
from pipeline.weights.interop import from_hf, hf_arch, hf_eps
from pipeline.weights.layouts import (
    OURS,
    TIMM,
    Layout,
    fix_norms,
    fixed_options,
    layout_of,
    refuse_stem,
)
from pipeline.weights.positions import resize_positions, square
from pipeline.weights.source import (
    CLASSIFIER,
    check_divisible,
    need_arch,
    other_size,
    read_classifier_info,
    read_config,
)

# Heads and decoders are not part of an encoder; nor is a mask token, but it is in one's middle.
_LEFT_OUT = re.compile(
    r"(?:heads?\d*|head_\w+|fc)(?:\.|$)|(?:decoder|lm_head|predictor|projector|masked_embed)"
)


def is_left_out(name: str, pooled: bool = False) -> bool:
    """Whether a weight is of a head, a decoder or, unless it is `pooled`, an attention pooling."""
    return bool(_LEFT_OUT.match(name)) or (not pooled and name.startswith("attn_pool"))


def known_arch(arch: str | None, source: object) -> str:
    """An architecture that timm knows, which a file of others and a random encoder need."""
    arch = need_arch(arch, source)
    if not timm.is_model(arch.split(".")[0]):
        raise no_model(arch, f"--arch {arch}")
    return arch


def named(arch: str, name: str) -> dict[str, Any]:
    """Info of an encoder that is not ours, with the mean and std of ImageNet."""
    return {"arch": arch, "options": {}, **imagenet(), "recipe": name, "method": name}


def imagenet() -> dict[str, list[float]]:
    """Mean and std of ImageNet's pixels."""
    return {"mean": [*IMAGENET_MEAN], "std": [*IMAGENET_STD]}


def stated(options: dict[str, Any]) -> dict[str, Any]:
    """The mean and std of the pixels that options say, which are taken out of them."""
    overlay = options.pop("pretrained_cfg_overlay", {})
    return {key: list(overlay[key]) for key in ("mean", "std") if key in overlay}


def from_hub(name: str, options: dict[str, Any]) -> tuple[VisionTransformer, dict[str, Any]]:
    """A timm model with the weights that timm publishes for it."""
    if not timm.is_model(name.split(".")[0]):
        raise no_model(name.split(".")[0], f"timm:{name}")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # each version of the hub's client has its own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--encoder timm:{name}: its weights cannot be fetched ({reason}); where no hub can be "
            f"reached give a local file: --encoder FILE --arch {name}"
        ) from None
    info = named(name, f"timm:{name}") | timm_statistics(model)
    stated(options)  # timm has taken them
    vit = adopt(model, name, options)
    return vit, finish(info, vit, options)


def from_file(
    path: Path, arch: str | None, options: dict[str, Any], ema: bool = False
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A file of weights as a timm model; every weight of the encoder must be there.

    A file of pipeline/export.py says its architecture, mean and std itself. For others see
    layouts: mean and std are those of its project's code, or timm's for the architecture.
    """
    content = load_tensors(path)
    written = exported_info(path, content)
    found = find_encoder(content, path, ema=ema)
    refuse_stem(found, path)
    if written:
        size = other_size(path, written, arch, options)
        arch, options = written["arch"], {**written["options"], "img_size": size}
        layout = OURS
    else:
        arch = known_arch(arch or _timms_arch(content), path)
        if within_classifier(arch):
            found = replace(found, state=found.around, words=found.words[:-1])
        layout = layout_of(found, content, arch)
    given, options = options, fixed_options(layout, found.state) | options
    vit = fit(found.state, arch, options, path, layout)
    info, beside = named(arch, path.stem), _finetuned_with(path)  # with ImageNet's statistics
    if not layout.imagenet:
        info |= _trained_with(content) or beside or timm_statistics(vit)
    info |= stated(options)
    info |= {key: written[key] for key in ("mean", "std") if key in written}
    info = finish(info, vit, options)
    heads = heads_of(vit)
    info |= {"note": "" if written else _note(found, layout, info, given, ema, beside, heads)}
    info["note"] += _activation(found, vit, arch)
    return vit, info | left_out(found.state, vit)


def left_out(state: Mapping[str, Tensor], vit: nn.Module) -> dict[str, list[str]]:
    """Parts of a file beside the encoder, as `left_out` of an info; {} where there are none."""
    pooled = getattr(vit, "attn_pool", None) is not None
    words = sorted({k.split(".")[0] for k in state if is_left_out(k, pooled) or k == "mask_token"})
    return {"left_out": words} if words else {}


def _timms_arch(content: Any) -> str | None:
    """The architecture that timm's training script writes beside the weights."""
    arch = content.get("arch") if isinstance(content, dict) else None
    return arch if isinstance(arch, str) and timm.is_model(arch.split(".")[0]) else None


def _trained_with(content: Any) -> dict[str, Any]:
    """Mean and std that timm's training script was given, as it keeps its arguments, or {}."""
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, Namespace):
        return {}
    mean, std = getattr(args, "mean", None), getattr(args, "std", None)
    return {"mean": list(mean), "std": list(std)} if mean and std else {}


def _finetuned_with(path: Path) -> dict[str, Any]:
    """Mean and std that eval/finetune.py wrote beside a classifier, or {}."""
    if path.name != "classifier.safetensors" or not (path.parent / CLASSIFIER).is_file():
        return {}
    info = read_classifier_info(path.parent)
    return {key: info[key] for key in ("mean", "std")}


def _note(
    found: Found, layout: Layout, info: dict[str, Any], given: dict[str, Any], ema: bool,
    beside: dict[str, Any], built: int | None,
) -> str:  # fmt: skip
    """What was taken to be so of a file that does not say it. built: heads, see `heads_of`."""
    if layout is TIMM:
        whose = f"timm's names, mean and std {_short(info)} "
        told = beside and beside.items() <= info.items()
        source = f"timm has them for {info['arch']}"
        if overlay := given.get("pretrained_cfg_overlay"):
            source = (
                "--options has them"
                if {"mean", "std"} <= overlay.keys()
                else f"--options has its {', '.join(overlay)}, else as {source}"
            )
        whose += f"of {CLASSIFIER}" if told else f"as {source}"
    else:
        whose = f"a file of {layout.name}: mean and std {_short(info)}"
    if built is not None:  # no weight shows how many there are
        heads = fixed_options(layout, found.state).get("num_heads")
        whose += f", {built} heads"
        if heads is None and layout is not TIMM and "num_heads" not in given:
            whose += f" as {info['arch']} has (for others --options '{{num_heads: N}}')"
        elif heads not in (None, built):
            whose += f" (its own code has {heads})"
    others = sorted({".".join(words) or "the file itself" for words in found.others})
    left = f"; not taken: {', '.join(others)}" if others else ""
    kept = [word for words in found.others for word in words if word in EMA]
    left += f" (--ema takes {kept[0]})" if kept and not ema else ""
    return f"{whose}; weights from {found.place}{left}"


def heads_of(vit: nn.Module) -> int | None:
    """Heads of an attention of a ViT's blocks, which are alike; a block may have several. None
    where no attention says it."""
    heads = (getattr(part, "num_heads", None) for part in vit.blocks.modules())  # type: ignore[union-attr]
    return next((number for number in heads if isinstance(number, int)), None)


def _activation(found: Found, vit: nn.Module, arch: str) -> str:
    """Which GELU a file of CLIP's names is run with, which nothing in it says."""
    names = found.state.keys()
    if not (is_clip_tower(names) or "visual.class_embedding" in names):
        return ""
    acts = {type(m.act).__name__ for m in vit.modules() if hasattr(m, "act")}
    other = arch.split(".")[0].replace("_clip_", "_clip_quickgelu_")
    if "GELU" not in acts or not timm.is_model(other):
        return f"; its MLPs run {', '.join(sorted(acts))}" if acts else ""
    return f"; its MLPs run GELU (for QuickGELU, which OpenAI's have, --arch {other})"


def _short(info: dict[str, Any]) -> str:
    return " ".join(",".join(f"{v:g}" for v in info[key]) for key in ("mean", "std"))


def fit(
    state: dict[str, Tensor], arch: str, options: dict[str, Any], path: Path, layout: Layout
) -> VisionTransformer:
    """The timm model `arch` with these weights, at the image size of its position table unless
    options say another. UserError names what is missing or left over.
    """
    state = dict(state)
    if "decoder_embed.weight" in state:
        state.pop("mask_token", None)  # timm takes it for a sign of DINOv2
    try:
        vit = build_family(arch, options, state)
        _same_patch(state, vit, arch, path)
        _same_registers(state, vit, arch)
        _same_tower(state, vit, arch)
        size = _table_size(state, vit)
        if "img_size" not in options and size not in (None, vit.patch_embed.img_size[0]):
            options["img_size"] = size
            vit = build_family(arch, options, state)
        check_divisible(vit.patch_embed.img_size[0], patch_side(vit), arch)
        pooled = getattr(vit, "attn_pool", None) is not None
        state = {k: v for k, v in state.items() if not is_left_out(k, pooled)}
        if layout.positions != "timm" and getattr(vit, "pos_embed", None) is not None:
            prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
            grid, how = vit.patch_embed.grid_size, layout.positions
            state["pos_embed"] = resize_positions(state["pos_embed"], prefix, grid, how)
        state = with_timm_names(state, vit, arch)
        state = {  # CLIP's `proj` is timm's head
            k: v for k, v in state.items() if k != "mask_token" and not is_left_out(k, pooled)
        }
        missing, unexpected = vit.load_state_dict(state, strict=False)
        fix_norms(vit, layout, arch)
    except (UserError, RuntimeError, TypeError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        reason = f"{reason} is missing" if isinstance(error, KeyError) else reason
        raise UserError(f"{path}: the weights do not fit {arch}: {reason}") from None
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} has no place in it"
        raise UserError(f"{path}: the weights do not fit {arch}: {what}")
    refuse_integers(vit, state, path)
    return vit


def _same_patch(state: Mapping[str, Tensor], vit: VisionTransformer, arch: str, path: Path) -> None:
    """Refuse patches of another size, which timm would resample without a word."""
    theirs = _first_of(_PATCHES, state)
    mine = getattr(vit.patch_embed.proj, "weight", None)  # none where the stem is convolutional
    if theirs is None or mine is None or theirs.ndim != 4 or theirs.shape[2:] == mine.shape[2:]:
        return
    side = theirs.shape[-1]
    raise UserError(
        f"its patches are {side} pixels wide, those of {arch} {mine.shape[-1]}; give another "
        f"--arch, or --options '{{patch_size: {side}}}'"
    )


def _same_registers(state: Mapping[str, Tensor], vit: VisionTransformer, arch: str) -> None:
    """Refuse register tokens of another number, by which timm misreads the position table."""
    if "patch_embed.proj.weight" not in state:  # RADIO's are beside its cls token
        return
    theirs, mine = (0 if t is None else t.shape[1] for t in (
        _first_of(_REGISTERS, state), getattr(vit, "reg_token", None)
    ))  # fmt: skip
    if theirs != mine:
        raise UserError(
            f"it has {theirs} register tokens, {arch} {mine}; give an --arch of as many"
        )


def _same_tower(state: Mapping[str, Tensor], vit: VisionTransformer, arch: str) -> None:
    """Refuse CLIP's visual tower where the architecture has no norm before its blocks."""
    theirs = "ln_pre.weight" in state or "visual.ln_pre.weight" in state
    if theirs and isinstance(getattr(vit, "norm_pre", nn.Identity()), nn.Identity):
        raise UserError(
            f"it is CLIP's visual tower, whose norm before the blocks {arch} has no place for; "
            "give an --arch such as vit_base_patch16_clip_224, or vit_base_patch16_clip_quickgelu_"
            "224 for OpenAI's weights"
        )


# What timm, OpenCLIP and Meta's PE call them.
_PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight", "conv1.weight")
_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")
_TABLES = ("pos_embed", "visual.positional_embedding", "positional_embedding")


def _first_of(names: tuple[str, ...], state: Mapping[str, Tensor]) -> Tensor | None:
    return next((state[name] for name in names if name in state), None)


def patch_side(vit: VisionTransformer) -> int:
    """Side of a patch in pixels."""
    size: Any = vit.patch_embed.patch_size
    return int(size if isinstance(size, int) else size[0])


def _table_size(state: Mapping[str, Tensor], vit: VisionTransformer) -> int | None:
    """Side in pixels of the images that a position table [1, prefix + L, D] is for, if any."""
    table = _first_of(_TABLES, state)
    if table is not None and table.ndim == 2:  # CLIP's
        table = table[None]
    mine: Tensor | None = getattr(vit, "pos_embed", None)
    if table is None or table.ndim != 3 or mine is None:
        return None
    own = mine.shape[1] - vit.patch_embed.num_patches if mine.ndim == 3 else 0
    for prefix in (own, 1):  # DINOv2's has the cls token where timm's has none
        side = square(table.shape[1] - int(prefix))
        if side is not None:
            return side * patch_side(vit)
    hint = "; it has no cls token, so give an --arch without one, such as vit_base_patch16_gap_224"
    raise UserError(
        f"its position table has {table.shape[1]} entries, not a square of patches and "
        f"{vit.num_prefix_tokens} further" + hint * (square(table.shape[1]) is not None)
    )


def exported_info(path: Path, content: Any) -> dict[str, Any]:
    """What pipeline/export.py wrote beside the weights (arch, options, mean, std), or {}."""
    if path.suffix == ".safetensors":
        content = check_file(path)
    return written_info(path, content.get(METADATA) if isinstance(content, dict) else None)


def from_hugging_face(
    folder: Path, arch: str | None, options: dict[str, Any]
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of a ViTModel or ViTMAEForPreTraining folder (config.json, model.safetensors)."""
    try:
        config = read_config(folder)
        (name, own), eps = hf_arch(config), hf_eps(config)
        weights = load_tensors(folder / "model.safetensors")
        state = from_hf(weights, own["depth"])
        statistics, said = hugging_face_statistics(folder, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a ViTModel or ViTMAE of transformers ({error!r})") from None
    written = exported_info(folder / "model.safetensors", {})
    own["img_size"] = other_size(folder, {"arch": name, "options": own}, arch, options)
    layout = OURS if written else Layout("transformers", positions="bicubic")
    vit = fit(state, name, own, folder, layout)
    for part in vit.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps
    info = named(name, folder.name) | statistics
    note = "" if said else f"no preprocessor_config.json: mean and std {_short(info)}"
    words = {name.removeprefix("vit.").split(".")[0] for name in weights}
    left = sorted(words - {"embeddings", "encoder", "layernorm"})
    return vit, finish(info, vit, own) | {"note": note} | ({"left_out": left} if left else {})


def hugging_face_statistics(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, list[float]], bool]:
    """(mean and std of the pixels, whether the folder says them); else those of transformers'
    ViTImageProcessor for a ViT, and ImageNet's for a ViTMAE. OSError, ValueError, TypeError."""
    pixels = folder / "preprocessor_config.json"
    about = dict(json.loads(pixels.read_text(encoding="utf-8"))) if pixels.is_file() else {}
    if about.get("do_normalize") is False:
        return {"mean": [0.0] * 3, "std": [1.0] * 3}, True
    if {"image_mean", "image_std"} <= about.keys():
        found = {"mean": about["image_mean"], "std": about["image_std"]}
        try:
            for key, value in found.items():
                check_statistic(key, value)
        except TypeError as error:
            raise UserError(f"{pixels}: image_{error}") from None
        return found, True
    if config["model_type"] == "vit":
        return {"mean": [0.5] * 3, "std": [0.5] * 3}, False
    return imagenet(), False


def timm_statistics(vit: nn.Module) -> dict[str, Any]:
    """Mean and std per channel from timm's data configuration of a model."""
    config = resolve_model_data_config(vit)
    return {"mean": list(config["mean"]), "std": list(config["std"])}


def finish(info: dict[str, Any], vit: VisionTransformer, options: dict[str, Any]) -> dict[str, Any]:
    """The info with the options that build the model again."""
    return {**info, "options": {"img_size": vit.patch_embed.img_size[0], **options}}

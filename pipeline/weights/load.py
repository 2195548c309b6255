"""Which encoder a source names: ours, one that others trained, or a random one.

    RUN              a run's folder, or its encoder/ folder
    EXPORT           what pipeline/export.py wrote: timm or mae (a file), hf or hf-mae (a folder)
    FILE             with an architecture: weights under timm's names, or a checkpoint of
                     facebookresearch/mae, MoCo v3, DINO, I-JEPA or BEiT (.pth, .safetensors)
    timm:NAME[.tag]  timm's own weights, from the hub or from its cache on this machine
    random           with an architecture: MAE's initialisation, drawn by a seed

Names of weights are facts; no code of those projects is used. Nothing is unpickled but tensors
and plain values.
"""

import os
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from pipeline.method.vit import build_vit, init_weights, is_plain, sincos_position
from pipeline.weights.families import build_family, random_family
from pipeline.weights.files import refuse_integers
from pipeline.weights.foreign import (
    from_file,
    from_hub,
    from_hugging_face,
    known_arch,
    named,
    patch_side,
    stated,
)
from pipeline.weights.run import read_encoder, teacher_weights
from pipeline.weights.source import check_divisible, check_source, other_size, teacher_of
from shard_tools.home import expand_home


def load_encoder(
    source: str | os.PathLike[str],
    *,
    arch: str | None = None,
    options: dict[str, Any] | None = None,
    random: bool = False,
    seed: int = 0,
    ema: bool = False,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """An encoder as a timm vision transformer (fp32, eval mode, no head, on the CPU) and its info.

    source: see the top of this file. arch: timm's name of what a FILE or `random` is, needed where
    the file does not say it. options: further keywords of timm.create_model, of which a source that
    says its own architecture takes img_size alone; `pretrained_cfg_overlay: {mean, std}` says the
    statistics of the pixels where a file or `random` cannot. random: draw new weights of the same
    architecture with `seed`. ema: the average that a file keeps beside its weights, or the EMA
    teacher of a run.
    info: arch and options (of timm.create_model), mean and std (of pixels in 0 … 1), recipe (what a
    table calls it), random, source, note (what was taken to be so, as a sentence), left_out (parts
    of a file that are none of an encoder's, where there are some).
    UserError where the source cannot be used.

        model, info = load_encoder("runs/rmae")
        tokens = model.forward_features(x)     # [B, 1 + L, D], x: [B, 3, H, W], normalised
    """
    name, options = expand_home(str(source)), dict(options or {})
    path = Path(name)
    check_source(name, arch, options, ema, random)
    vit: VisionTransformer | None = None
    if name == "random":
        info = named(known_arch(arch, name), "random encoder") | stated(options)
        info["options"] = options
    elif name.startswith("timm:"):
        vit, info = from_hub(name.removeprefix("timm:"), options)
    elif path.is_file():
        vit, info = from_file(path, arch, options, ema)
    elif (path / "config.json").is_file():
        vit, info = from_hugging_face(path, arch, options)
    else:
        vit, info = from_run(path, arch, options, ema)
    if random or vit is None:
        vit = _random(vit, info, seed)
        note = str(info.get("note", "")).partition("; weights from ")[0]
        info = {**info, "random_seed": seed, "note": note}
        info.pop("left_out", None)
    return vit, {**info, "random": random or name == "random", "source": name}


def _random(vit: VisionTransformer | None, info: dict[str, Any], seed: int) -> VisionTransformer:
    """New weights: MAE's for a plain ViT, timm's for those of other families."""
    arch, options = info["arch"].split(".")[0], info["options"]
    if vit is None:
        vit = build_family(arch, options)
        if {"img_size", "patch_size"} & options.keys():  # timm's own may be no multiple
            check_divisible(vit.patch_embed.img_size[0], patch_side(vit), "random")
    if not is_plain(vit):
        return random_family(arch, options, seed)
    return random_encoder({"arch": arch, "options": options}, seed)


def random_encoder(info: dict[str, Any], seed: int) -> VisionTransformer:
    """The same architecture with MAE's initialisation instead of trained weights."""
    vit = build_vit(info["arch"], info["options"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        init_weights(vit)
    assert vit.pos_embed is not None
    with torch.no_grad():
        vit.pos_embed.copy_(sincos_position(vit.patch_embed.grid_size, vit.embed_dim)[None])
    return vit.eval()


def from_run(
    path: Path, arch: str | None, options: dict[str, Any], ema: bool = False
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of a run folder, or of its EMA teacher, at its own image size or at another."""
    vit, info = read_encoder(path)
    size = other_size(path, info, arch, options)
    if size != info["options"]["img_size"]:
        check_divisible(size, patch_side(vit), path)
        vit, info = read_encoder(path, size)
    if ema:
        state = teacher_weights(path)
        refuse_integers(vit, state, teacher_of(path))
        vit.load_state_dict(state | {"pos_embed": vit.state_dict()["pos_embed"]})
        info = {**info, "note": "weights of the EMA teacher"}
    return vit, info

"""Which encoder `--encoder` names: ours, one that others trained, or a random one.

    RUN              a run's folder, or its encoder/ folder
    FILE             with --arch NAME: weights under timm's names, or a checkpoint of
                     facebookresearch/mae, MoCo v3, DINO or BEiT (.pth, .safetensors)
    timm:NAME[.tag]  timm's own weights, from the hub or from its cache on this machine
    random           with --arch NAME: MAE's initialisation, drawn by --seed

Names of weights are facts; no code of those projects is used. Nothing is unpickled but tensors.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.data.config import resolve_model_data_config
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.config.recipe import DataRecipe
from pipeline.errors import UserError
from pipeline.method.encoder import load_tensors, random_encoder, read_encoder

# Where a checkpoint keeps its weights: facebookresearch/mae and BEiT, MoCo v3 and timm, DINO.
CONTAINERS = ("model", "state_dict", "teacher")
# What stands before timm's names: nothing, then MoCo v3 (the online encoder) and DINO.
PREFIXES = ("", "module.base_encoder.", "base_encoder.", "module.backbone.", "backbone.", "module.")
# Heads and decoders are not part of an encoder.
LEFT_OUT = ("head", "decoder", "lm_head", "attn_pool")


def choose_encoder(args: argparse.Namespace) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of `args` (encoder, arch, options, random, seed) and its info, on the CPU.

    info: arch and options (of timm.create_model), mean, std, recipe (what a table calls it),
    random, source. Raises UserError in one sentence.
    """
    source = str(args.encoder)
    is_random = bool(args.random) or source == "random"
    if source == "random":
        info = named(needed_arch(args), "random encoder") | {"options": read_options(args)}
        vit = None
    elif source.startswith("timm:"):
        vit, info = from_hub(source.removeprefix("timm:"))
    elif Path(source).is_file():
        vit, info = from_file(Path(source), needed_arch(args), read_options(args))
    else:
        vit, info = read_encoder(source)
    if is_random or vit is None:
        vit = random_encoder({**info, "arch": info["arch"].split(".")[0]}, args.seed)
        info = {**info, "random_seed": args.seed}
    return vit, {**info, "random": is_random, "source": source}


def needed_arch(args: argparse.Namespace) -> str:
    """--arch, which a file and a random encoder need, with the assurance that timm knows it."""
    if not args.arch:
        raise UserError(
            f"--encoder {args.encoder} is no run folder and needs --arch: the name of a vision "
            "transformer of timm such as vit_base_patch16_224"
        )
    if not timm.is_model(args.arch.split(".")[0]):
        near = ", ".join(timm.list_models("vit_*_patch16_224")[:6])
        raise UserError(f"--arch {args.arch} is not a timm model; for example: {near}")
    return str(args.arch)


def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """--options, further keywords of timm.create_model, as a dictionary."""
    try:
        options = yaml.safe_load(args.options)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise UserError(
            f"--options {args.options}: write them as {{img_size: 384, patch_size: 16}}"
        )
    return options


def named(arch: str, name: str) -> dict[str, Any]:
    """Info of an encoder that is not ours, with the mean and std of ImageNet."""
    data = DataRecipe()
    statistics = {"mean": list(data.mean), "std": list(data.std)}
    return {"arch": arch, "options": {}, **statistics, "recipe": name, "method": name}


def from_hub(name: str) -> tuple[VisionTransformer, dict[str, Any]]:
    """A timm model with the weights that timm publishes for it."""
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"--encoder timm:{name}: not a timm model; timm.list_models() lists them")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # each version of the hub's client has its own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--encoder timm:{name}: its weights cannot be fetched ({reason}); where no hub can be "
            f"reached give a local file: --encoder FILE --arch {name}"
        ) from None
    vit = as_vit(model, name)
    return vit, finish(named(name, f"timm:{name}"), vit, timm_statistics(vit), {})


def from_file(
    path: Path, arch: str, options: dict[str, Any]
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A checkpoint file as the timm model `arch`; every weight of the encoder must be there.

    Mean and std: timm's for files in timm's layout, ImageNet's for those of other projects, all
    of which use them.
    """
    state, layout = read_weights(path)
    pool: dict[str, Any] = {"global_pool": "avg" if "fc_norm.weight" in state else "token"}
    if "cls_token" not in state:
        pool = {"global_pool": "avg", "fc_norm": "fc_norm.weight" in state}
    if "decoder_embed.weight" in state:
        state.pop("mask_token", None)  # timm takes it for a sign of DINOv2
    state = {k: v for k, v in state.items() if not k.startswith(LEFT_OUT)}
    try:
        vit = as_vit(timm.create_model(arch, num_classes=0, **pool, **options), arch)
        convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
        state = convert(state, vit) if convert else state
        state.pop("mask_token", None)
        missing, unexpected = vit.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the weights do not fit {arch}: {reason}") from None
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} has no place in it"
        raise UserError(f"{path}: the weights do not fit {arch}: {what}")
    statistics = timm_statistics(vit) if layout == "timm" else None
    return vit, finish(named(arch, path.stem), vit, statistics, options)


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights of a checkpoint file under timm's names, and whose layout it has."""
    content = load_tensors(path)
    box = next((k for k in CONTAINERS if isinstance(content, dict) and k in content), None)
    state = content[box] if box else content
    names = list(state) if isinstance(state, dict) else []
    for prefix in PREFIXES:
        if f"{prefix}patch_embed.proj.weight" in names:
            found = {k.removeprefix(prefix): state[k] for k in names if k.startswith(prefix)}
            ours = not prefix and box in (None, "state_dict")
            return found, "timm" if ours else "other"
    shown = ", ".join(map(str, names[:3])) or type(state).__name__
    raise UserError(
        f"{path}: holds no patch_embed.proj.weight, so no vision transformer under timm's names; "
        f"its first entries are {shown}"
    )


def as_vit(model: nn.Module, arch: str) -> VisionTransformer:
    """The model, if the protocols can read tokens from it."""
    if not isinstance(model, VisionTransformer | Beit):
        raise UserError(
            f"{arch} is a {type(model).__name__}; the protocols take vision transformers of timm "
            "(VisionTransformer, Beit)"
        )
    return model.eval()  # type: ignore[return-value]


def timm_statistics(vit: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and std per channel from timm's data configuration of a model."""
    config = resolve_model_data_config(vit)
    return list(config["mean"]), list(config["std"])


def finish(
    info: dict[str, Any],
    vit: VisionTransformer,
    statistics: tuple[list[float], list[float]] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The info with the options that build the model again and, if given, its mean and std."""
    if statistics is not None:
        info = {**info, "mean": statistics[0], "std": statistics[1]}
    return {**info, "options": {"img_size": vit.patch_embed.img_size[0], **options}}


def check_feature(vit: VisionTransformer, feature: str) -> None:
    """Refuse the class token of an encoder that has none, or none that was trained to be read."""
    if feature == "mean_patch":
        return
    if getattr(vit, "cls_token", None) is None:
        raise UserError("this encoder has no class token; take the mean of the patches instead")
    if isinstance(vit.norm, nn.Identity):
        raise UserError(
            "this encoder normalises the mean of its patches, not its class token; take the mean "
            "of the patches instead"
        )

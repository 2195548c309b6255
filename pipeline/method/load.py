"""Which encoder a source names: ours, one that others trained, or a random one.

    RUN              a run's folder, or its encoder/ folder
    EXPORT           what pipeline/export.py wrote: timm (a file), hf or hf-mae (a folder)
    FILE             with an architecture: weights under timm's names, or a checkpoint of
                     facebookresearch/mae, MoCo v3, DINO or BEiT (.pth, .safetensors)
    timm:NAME[.tag]  timm's own weights, from the hub or from its cache on this machine
    random           with an architecture: MAE's initialisation, drawn by a seed

Names of weights are facts; no code of those projects is used. Nothing is unpickled but tensors.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.config.recipe import DataRecipe, load_recipe
from pipeline.errors import UserError
from pipeline.method.encoder import METADATA, load_tensors, random_encoder, read_encoder
from pipeline.method.interop import from_hf, hf_arch
from pipeline.method.objective import Objective, build_objective

# Where a checkpoint keeps its weights: facebookresearch/mae and BEiT, MoCo v3 and timm, DINO.
CONTAINERS = ("model", "state_dict", "teacher")
# What stands before timm's names: nothing, then MoCo v3 (the online encoder) and DINO.
PREFIXES = ("", "module.base_encoder.", "base_encoder.", "module.backbone.", "backbone.", "module.")
# Heads and decoders are not part of an encoder.
LEFT_OUT = ("head", "decoder", "lm_head", "attn_pool")


def load_encoder(
    source: str | os.PathLike[str],
    *,
    arch: str | None = None,
    options: dict[str, Any] | None = None,
    random: bool = False,
    seed: int = 0,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """An encoder as a timm vision transformer (fp32, eval mode, no head, on the CPU) and its info.

    source: see the top of this file. arch: timm's name of what a FILE or `random` is, needed where
    the file does not say it. options: further keywords of timm.create_model. random: draw new
    weights of the same architecture with `seed`.
    info: arch and options (of timm.create_model), mean and std (of pixels in 0 … 1), recipe (what a
    table calls it), random, source. UserError where the source cannot be used.

        model, info = load_encoder("runs/rmae")
        tokens = model.forward_features(x)     # [B, 1 + L, D], x: [B, 3, H, W], normalised
    """
    name, path = str(source), Path(source)
    if name == "random":
        info = named(known_arch(arch, name), "random encoder") | {"options": options or {}}
        vit = None
    elif name.startswith("timm:"):
        vit, info = from_hub(name.removeprefix("timm:"))
    elif path.is_file():
        vit, info = from_file(path, arch, options)
    elif (path / "config.json").is_file():
        vit, info = from_hugging_face(path)
    else:
        vit, info = read_encoder(path)
    if random or vit is None:
        vit = random_encoder({**info, "arch": info["arch"].split(".")[0]}, seed)
        info = {**info, "random_seed": seed}
    return vit, {**info, "random": random or name == "random", "source": name}


def load_run(run: Path) -> Objective:
    """The objective of a run folder with its newest weights, or of a checkpoint; fp32, on the CPU.

    Raises UserError in one sentence where the folder is no run or the weights do not fit.
    """
    objective, _ = build_objective(load_recipe(run / "recipe.yaml"))
    path = run / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    # The position tables are exact in the new objective, rounded in a bf16 run.
    state = {k: v for k, v in state.items() if not k.endswith("pos_embed")}
    problem = None
    try:
        missing, unexpected = objective.load_state_dict(state, strict=False)
        left = [k for k in (*missing, *unexpected) if not k.endswith("pos_embed")]
        problem = f"weight {left[0]} is in only one of them" if left else None
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
    if problem:
        raise UserError(f"{path}: does not fit the run's recipe: {problem}")
    return objective.eval()


def known_arch(arch: str | None, source: object) -> str:
    """An architecture that timm knows, which a file of others and a random encoder need."""
    if not arch:
        raise UserError(
            f"{source} does not say its architecture: give it with --arch (arch=), the name of a "
            "vision transformer of timm such as vit_base_patch16_224"
        )
    if not timm.is_model(arch.split(".")[0]):
        near = ", ".join(timm.list_models("vit_*_patch16_224")[:6])
        raise UserError(f"--arch {arch} is not a timm model; for example: {near}")
    return arch


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
    path: Path, arch: str | None, options: dict[str, Any] | None
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A file of weights as a timm model; every weight of the encoder must be there.

    A file of pipeline/export.py says its architecture, mean and std itself. Else mean and std are
    timm's for files in timm's layout, ImageNet's for those of other projects, all of which use
    them.
    """
    written = exported_info(path)
    arch = known_arch(arch or written.get("arch"), path)
    options = {**written.get("options", {}), **(options or {})}
    state, layout = read_weights(path)
    vit = fit(timm.create_model, state, arch, options, path)
    statistics = timm_statistics(vit) if layout == "timm" else None
    if written:
        statistics = written["mean"], written["std"]
    return vit, finish(named(arch, path.stem), vit, statistics, options)


def fit(
    create: Callable[..., nn.Module],
    state: dict[str, Tensor],
    arch: str,
    options: dict[str, Any],
    path: Path,
) -> VisionTransformer:
    """The timm model `arch` with these weights. UserError names what is missing or left over."""
    pool: dict[str, Any] = {"global_pool": "avg" if "fc_norm.weight" in state else "token"}
    if "cls_token" not in state:
        pool = {"global_pool": "avg", "fc_norm": "fc_norm.weight" in state}
    if "decoder_embed.weight" in state:
        state.pop("mask_token", None)  # timm takes it for a sign of DINOv2
    state = {k: v for k, v in state.items() if not k.startswith(LEFT_OUT)}
    try:
        vit = as_vit(create(arch, num_classes=0, **pool, **options), arch)
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
    return vit


def exported_info(path: Path) -> dict[str, Any]:
    """What pipeline/export.py wrote into a file's metadata (arch, options, mean, std), or {}."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads((file.metadata() or {}).get(METADATA, "{}")))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a file of weights ({error})") from None


def from_hugging_face(folder: Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of a ViTModel or ViTMAEForPreTraining folder (config.json, model.safetensors)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        arch, options = hf_arch(config)
        state = from_hf(load_tensors(folder / "model.safetensors"), options["depth"])
        pixels = folder / "preprocessor_config.json"
        about = json.loads(pixels.read_text(encoding="utf-8")) if pixels.is_file() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no ViTModel or ViTMAE of transformers ({error!r})") from None
    vit = fit(timm.create_model, state, arch, options, folder)
    for part in vit.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = float(config.get("layer_norm_eps", 1e-12))
    info = named(arch, folder.name)
    statistics = about.get("image_mean", info["mean"]), about.get("image_std", info["std"])
    return vit, finish(info, vit, statistics, options)


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
    """The model, if tokens can be read from it."""
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

"""A pretrained encoder as a classifier: fresh head, layer-wise learning rates, files.

Source: He et al. 2022, Tab. 9; facebookresearch/mae, `models_vit.py` and `util/lr_decay.py`.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eval.shared.encoders import EncoderInfo
from pipeline.errors import UserError, naming
from pipeline.method.parameter_groups import layer_of, layer_scale
from pipeline.weights.families import adopt
from pipeline.weights.files import refuse_integers
from pipeline.weights.source import no_classifier, read_classifier_info
from shard_tools.atomic import write_atomic, write_json

FRESH = ("fc_norm.", "head.")  # what the classifier does not take from the encoder
HEAD_STD = 2e-5


def build_classifier(
    encoder: VisionTransformer, info: EncoderInfo, classes: int, drop_path: float
) -> VisionTransformer:
    """The encoder with a mean over the patch tokens, a fresh fc_norm and a fresh head.

    The encoder's own final norm is dropped (SAM keeps the norms of its neck); drop path grows
    linearly from 0 to `drop_path` over the blocks; head weights are N(0, 2e-5) truncated at two
    deviations, its bias is zero.
    """
    arch, options = classifier_words(info.arch, info.options | {"drop_path_rate": drop_path})
    model = timm.create_model(arch, **options, num_classes=classes)
    mine = model.state_dict()
    state = {
        k: v
        for k, v in encoder.state_dict().items()
        if not k.startswith(("fc_norm.", "attn_pool.", "head."))
        and (k in mine or not k.startswith("norm."))
    }
    if "dist_token" in state:
        state["reg_token"] = state.pop("dist_token")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or not all(name.startswith(FRESH) for name in missing):
        raise UserError(f"{info.arch} does not fit a classifier: {missing}, {unexpected}")
    parts = model.get_submodule("head").modules()
    head = next(part for part in parts if isinstance(part, nn.Linear))
    nn.init.trunc_normal_(head.weight, std=HEAD_STD, a=-2 * HEAD_STD, b=2 * HEAD_STD)
    nn.init.zeros_(head.bias)
    return adopt(model, arch, options).train()


def classifier_words(arch: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, keywords) of timm's classifier on this encoder: the mean of the patches, normalised.

    A distilled DeiT, whose class has no such pooling, is the plain one with a register token. Each
    family has another word for the norm behind the mean, of which the first is taken that works.
    """
    arch, options = arch.split(".")[0], {**options, "global_pool": "avg"}
    if "_distilled" in arch:
        arch, options = arch.replace("_distilled", ""), {**options, "reg_tokens": 1}
    works: list[dict[str, Any]] = []
    for more in ({}, {"fc_norm": True}, {"use_fc_norm": True}):
        try:
            model = timm.create_model(arch, **options | more | {"depth": 1, "num_classes": 1})
        except (TypeError, AssertionError):
            continue
        works.append(more)
        if not isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity):
            break
    else:
        works = works[:1]  # no norm behind the mean at all
    if not works:
        raise UserError(f"timm builds no classifier of {arch} with {options}")
    return arch, options | works[-1]


def layer_groups(
    model: VisionTransformer, *, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale` = layer_decay^(depth + 1 - layer).

    1-D parameters, the cls token and the positions do not decay.
    """
    depth = len(model.blocks)
    fixed = model.no_weight_decay()  # cls and register tokens, positions, biases of positions
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and name not in fixed
        layer = layer_of(name, depth)
        group = groups.setdefault(
            (layer, decays),
            {
                "name": f"layer {layer}, {'decay' if decays else 'no decay'}",
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": layer_scale(layer_decay, layer, depth),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def write_classifier(
    folder: Path, state: dict[str, Tensor], info: dict[str, Any], classes: tuple[str, ...]
) -> None:
    """Write classifier.safetensors (timm names, fp32) and, last, classifier.json."""
    weights = save({k: v.contiguous() for k, v in state.items()})
    keys = ("arch", "options", "mean", "std", "recipe", "method", "step", "random", "random_seed")
    content = {key: info[key] for key in keys if key in info} | {"classes": list(classes)}
    with naming(folder, "cannot be written"):
        write_atomic(folder / "classifier.safetensors", weights)
        write_json(folder / "classifier.json", content, indent=1)


def read_classifier(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier that finetuning wrote (folder), or `timm:NAME` with timm's own weights.

    Returns the model in eval mode and its info: classes (names), mean, std, options.img_size.
    """
    text = str(folder)
    if text.startswith("timm:"):
        try:
            model = timm.create_model(text.removeprefix("timm:"), pretrained=True)
        except Exception as error:  # each version of the hub's client has its own kinds
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"--classifier {text}: cannot be fetched ({reason})") from None
        config: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
        info: dict[str, Any] = {"arch": text, "options": {"img_size": config["input_size"][-1]}}
        info |= {"mean": list(config["mean"]), "std": list(config["std"])}
        info["classes"] = [str(number) for number in range(config["num_classes"])]
        return model.eval(), info
    info, path = read_classifier_info(folder), Path(folder) / "classifier.safetensors"
    try:
        arch, options = classifier_words(info["arch"], info["options"])
        model = timm.create_model(arch, **options, num_classes=len(info["classes"]))
        state = load_file(path)
        model.load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise no_classifier(folder, error) from error
    refuse_integers(model, state, path)
    return model.eval(), info


def classify(model: nn.Module, pixels: Tensor) -> Tensor:
    """Probabilities float32 [b, classes] of normalised pixels [b, 3, H, W]."""
    with torch.no_grad():
        return model(pixels).float().softmax(dim=1)

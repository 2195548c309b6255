"""A pretrained encoder as a classifier: fresh head, layer-wise learning rates, files.

Source: He et al. 2022, Tab. 9; facebookresearch/mae, `models_vit.py` and `util/lr_decay.py`.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eval.shared.encoders import EncoderInfo
from pipeline.errors import UserError, naming
from shard_tools.atomic import write_atomic, write_json

FRESH = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
HEAD_STD = 2e-5


def build_classifier(
    encoder: VisionTransformer, info: EncoderInfo, classes: int, drop_path: float
) -> VisionTransformer:
    """The encoder with a mean over the patch tokens, a fresh fc_norm and a fresh head.

    The encoder's own final norm is dropped; drop path grows linearly from 0 to `drop_path` over
    the blocks; head weights are N(0, 2e-5) truncated at two deviations, its bias is zero.
    """
    arch, options = plain_vit(info)
    model = timm.create_model(
        arch, **options, num_classes=classes, global_pool="avg", drop_path_rate=drop_path
    )
    own = ("norm.", "fc_norm.", "attn_pool.")
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(own)}
    if "dist_token" in state:
        state["reg_token"] = state.pop("dist_token")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) != FRESH or unexpected:
        raise UserError(f"{info.arch} does not fit a classifier: {missing}, {unexpected}")
    assert isinstance(model.head, nn.Linear)
    nn.init.trunc_normal_(model.head.weight, std=HEAD_STD, a=-2 * HEAD_STD, b=2 * HEAD_STD)
    nn.init.zeros_(model.head.bias)
    return model  # type: ignore[return-value]


def plain_vit(info: EncoderInfo) -> tuple[str, dict[str, Any]]:
    """Architecture and options of the ViT that has an encoder's tokens and one head.

    A distilled DeiT has a second token and a head on it, which timm does not pool; the same
    network with that token as a register has neither.
    """
    if "_distilled" not in info.arch:
        return info.arch, info.options
    name = info.arch.split(".")[0].replace("_distilled", "")
    return name, {**info.options, "reg_tokens": 1}


def layer_of(name: str, depth: int) -> int:
    """Layer number of a parameter: embeddings 0, block i is i + 1, fc_norm and head depth + 1."""
    if name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


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
                "lr_scale": layer_decay ** (depth + 1 - layer),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def classifier_info(info: EncoderInfo) -> dict[str, Any]:
    """What classifier.json says of an encoder: its record, with what builds the classifier."""
    arch, options = plain_vit(info)
    return info.record | {"arch": arch, "options": options}


def write_classifier(
    folder: Path, state: dict[str, Tensor], info: dict[str, Any], classes: tuple[str, ...]
) -> None:
    """Write classifier.safetensors (timm names, fp32) and, last, classifier.json."""
    weights = save({k: v.contiguous() for k, v in state.items()})
    keys = ("arch", "options", "mean", "std", "recipe", "method", "step")
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
        info = {"arch": text, "options": {"img_size": config["input_size"][-1]}}
        info |= {"mean": list(config["mean"]), "std": list(config["std"])}
        info["classes"] = [str(number) for number in range(config["num_classes"])]
        return model.eval(), info
    home = Path(folder)
    try:
        info = json.loads((home / "classifier.json").read_text(encoding="utf-8"))
        model = timm.create_model(
            info["arch"], **info["options"], num_classes=len(info["classes"]), global_pool="avg"
        )
        model.load_state_dict(load_file(home / "classifier.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no classifier of eval/finetune.py there ({reason})") from error
    return model.eval(), info


def classify(model: nn.Module, pixels: Tensor) -> Tensor:
    """Probabilities float32 [b, classes] of normalised pixels [b, 3, H, W]."""
    with torch.no_grad():
        return model(pixels).float().softmax(dim=1)

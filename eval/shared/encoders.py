"""The encoder that `--encoder` names, and which of its features can be read."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from eval.shared.options import EncoderChoice
from pipeline.errors import UserError
from pipeline.weights.load import load_encoder


@dataclass(frozen=True)
class EncoderInfo:
    """What is known of an encoder: how timm builds it, and the statistics of its pixels (0 … 1).

    record: all of load_encoder's info, as result files have it, and whether it is with `ema`.
    """

    arch: str
    options: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    record: dict[str, Any]

    @classmethod
    def of(cls, record: dict[str, Any]) -> "EncoderInfo":
        """From load_encoder's info."""
        mean, std = tuple(record["mean"]), tuple(record["std"])
        return cls(record["arch"], record["options"], mean, std, record)


def open_encoder(
    choice: EncoderChoice, device: torch.device, feature: str = "mean_patch"
) -> tuple[VisionTransformer, EncoderInfo]:
    """The encoder, frozen, in eval mode, on a device. UserError where it lacks the feature."""
    vit, record = load_encoder(
        choice.source,
        arch=choice.arch,
        options=choice.options,
        random=choice.random,
        seed=choice.seed,
        ema=choice.ema,
    )
    if choice.ema:
        record = {**record, "ema": True}
    check_feature(vit, feature)
    vit.requires_grad_(False).eval().to(device)
    return vit, EncoderInfo.of(record)


def check_feature(vit: VisionTransformer, feature: str) -> None:
    """Refuse the cls token of an encoder that has none, or that was not trained for it."""
    if feature != "cls":
        return
    if getattr(vit, "cls_token", None) is None:
        raise UserError(
            "this encoder has no cls token; take the mean of the patches instead, "
            "--feature mean_patch, or its own pooling, --feature own"
        )
    if isinstance(vit.norm, nn.Identity):
        raise UserError(
            "this encoder normalises the mean of its patches, not its cls token; take the mean "
            "of the patches instead, --feature mean_patch, or its own pooling, --feature own"
        )

"""The encoder that `--encoder` names, and which of its features can be read."""

from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.errors import UserError
from pipeline.method.load import load_encoder


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder; the words are load_encoder's, but for resize: pixels of the shorter side of
    images before the evaluation crop (0: as crops.shorter_side).
    """

    source: str
    arch: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    random: bool = False
    seed: int = 0
    ema: bool = False
    resize: int = 0


@dataclass(frozen=True)
class EncoderInfo:
    """What is known of an encoder: how timm builds it, and the statistics of its pixels (0 … 1).

    record: all of load_encoder's info, as result files have it.
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
    check_feature(vit, feature)
    vit.requires_grad_(False).eval().to(device)
    return vit, EncoderInfo.of(record)


def read_options(text: str) -> dict[str, Any]:
    """--options, further keywords of timm.create_model, as a dictionary."""
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise UserError(f"--options {text}: write them as {{img_size: 384, patch_size: 16}}")
    return options


def check_feature(vit: VisionTransformer, feature: str) -> None:
    """Refuse the cls token of an encoder that has none, or none that was trained to be read."""
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

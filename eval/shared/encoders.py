"""The encoder that `--encoder` names, and which of its features can be read."""

import argparse
from typing import Any

import yaml
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.errors import UserError
from pipeline.method.load import load_encoder


def choose_encoder(args: argparse.Namespace) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of `args` (encoder, arch, options, random, seed) and its info, on the CPU."""
    options = read_options(args)
    return load_encoder(
        args.encoder, arch=args.arch, options=options, random=bool(args.random), seed=args.seed
    )


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

"""A frozen encoder and what comes out of it: one feature vector per image."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from eval.shared.cli import autocast, progress
from eval.shared.encoders import check_feature, choose_encoder
from pipeline.data.loader import eval_loader
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from shard_tools.manifest import Manifest, read_manifest

FEATURES = ("cls", "mean_patch")


def open_encoder(args: argparse.Namespace, ranks: Ranks) -> tuple[VisionTransformer, dict]:
    """The encoder that the command line names, frozen, in eval mode, on this rank's device."""
    vit, info = choose_encoder(args)
    check_feature(vit, getattr(args, "feature", "mean_patch"))
    vit.requires_grad_(False).eval().to(ranks.device)
    return vit, info


def normalise(image: Tensor, info: dict[str, Any], device: torch.device) -> Tensor:
    """uint8 [b, H, W, 3] → float32 [b, 3, H, W] on the device, (x / 255 - mean) / std."""
    mean = torch.tensor(info["mean"], device=device).view(1, 3, 1, 1)
    std = torch.tensor(info["std"], device=device).view(1, 3, 1, 1)
    pixels = image.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
    return (pixels - mean) / std


def pool(tokens: Tensor, prefix: int, feature: str) -> Tensor:
    """Tokens after the last norm [b, prefix + L, D] → [b, D]: class token, or mean of patches."""
    return tokens[:, 0] if feature == "cls" else tokens[:, prefix:].mean(dim=1)


@torch.no_grad()
def image_features(vit: VisionTransformer, pixels: Tensor, feature: str, precision: str) -> Tensor:
    """Features float32 [b, D] of normalised pixels [b, 3, H, W]; where the encoder was trained to
    normalise the mean of its patches (fc_norm), they are normalised."""
    with autocast(precision, pixels.device):
        tokens = vit.forward_features(pixels)
    return vit.fc_norm(pool(tokens.float(), vit.num_prefix_tokens, feature))


def image_size(vit: VisionTransformer) -> int:
    """Side of the (square) images that the encoder takes, in pixels."""
    height, width = vit.patch_embed.img_size
    if height != width:
        raise UserError(f"the encoder takes {height} by {width} images; square ones are needed")
    return height


def labelled(folder: str | Path) -> Manifest:
    """The manifest of a shard folder, with the assurance that every sample has a label."""
    manifest = read_manifest(folder)
    if bool((manifest.index["label"] < 0).any()):
        raise UserError(f"{folder}: some samples have no label; an evaluation needs every label")
    return manifest


def class_count(train: Manifest, val: Manifest) -> int:
    """Number of classes, with the assurance that both sets number the same classes alike."""
    if train.classes and val.classes and train.classes != val.classes:
        raise UserError(
            f"{train.folder} and {val.folder} do not have the same classes "
            f"({len(train.classes)} and {len(val.classes)}); make both from one dataset"
        )
    labels = max(int(m.index["label"].max()) + 1 for m in (train, val))
    return max(labels, len(train.classes), len(val.classes))


def batches(
    folder: str | Path, vit: VisionTransformer, info: dict, ranks: Ranks, args: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's batches of a set, each image once over all ranks, evaluation crop. What is in a
    batch does not depend on the number of ranks, and so neither does the rounding of its features.

    Yields normalised pixels [b, 3, H, W], labels int64 [b], sample numbers int64 [b].
    """
    loader = eval_loader(
        folder,
        batch_size=args.micro_batch,
        rank=ranks.rank,
        world=ranks.world,
        image_size=image_size(vit),
        workers=args.workers,
        interleave=True,
    )
    for batch in loader:
        pixels = normalise(batch.image, info, ranks.device)
        yield pixels, batch.label.to(ranks.device), batch.sample.to(ranks.device)


def extract(
    folder: str | Path, vit: VisionTransformer, info: dict, ranks: Ranks, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Features float32 [N, D] and labels int64 [N] of a whole set on every rank, in sample order.

    No augmentation. The order, and so whatever is computed from it, does not depend on how many
    ranks shared the work.
    """
    total = read_manifest(folder).samples
    parts = []
    for pixels, label, sample in progress(
        batches(folder, vit, info, ranks, args), ranks, f"features of {folder}"
    ):
        parts.append((image_features(vit, pixels, args.feature, args.precision), label, sample))
    width = vit.num_features
    empty = torch.zeros(0, dtype=torch.int64, device=ranks.device)
    feature = ranks.gather(
        torch.cat([torch.zeros(0, width).to(ranks.device), *[p[0] for p in parts]])
    )
    label = ranks.gather(torch.cat([empty, *[p[1] for p in parts]]))
    sample = ranks.gather(torch.cat([empty, *[p[2] for p in parts]]))
    order = sample.argsort()
    if not torch.equal(sample[order], torch.arange(total, device=ranks.device)):
        raise UserError(f"{folder}: expected each of {total} samples once, got {len(sample)}")
    return feature[order], label[order]


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 2)

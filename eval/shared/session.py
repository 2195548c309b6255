"""A frozen encoder on this rank and how images reach it: what every evaluation is handed."""

import argparse
import hashlib
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from eval.shared.cli import progress, seed_everything
from eval.shared.encoders import EncoderInfo, open_encoder
from eval.shared.features import (
    feature_of,
    image_features,
    image_size,
    last_tokens,
    normalise,
    used_precision,
)
from eval.shared.options import EncoderChoice, encoder_of
from eval.shared.results import Timer, difference
from pipeline.data.crops import CentreCrop, shorter_side
from pipeline.data.loader import Loader, eval_loader
from pipeline.distributed import Ranks, from_all
from pipeline.errors import UserError
from shard_tools.manifest import read_manifest

# Pixels [b, 3, H, W], normalised; labels and sample numbers, int64 [b].
LabelledPixels = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class EvalSession:
    """An encoder with its facts, these ranks, and how batches are read.

    precision: auto, fp32 or bf16. workers: loader processes of each rank. resize: pixels of the
    shorter side before the evaluation crop, 0 for those of `shorter_side`.
    """

    vit: VisionTransformer
    info: EncoderInfo
    ranks: Ranks
    precision: str = "auto"
    workers: int = 0
    resize: int = 0

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.ranks.device

    @property
    def image_size(self) -> int:
        """Side of the (square) images that the encoder takes, in pixels."""
        return image_size(self.vit)

    @property
    def crop(self) -> CentreCrop:
        """The evaluation crop."""
        size = self.image_size
        return CentreCrop(size, self.resize or shorter_side(size))

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [b, H, W, 3] → float32 [b, 3, H, W] on the device, as the encoder expects it."""
        return normalise(image, self.info.mean, self.info.std, self.device)

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Patch tokens after the last norm, float32 [b, L, D], of pixels [b, 3, H, W]."""
        return last_tokens(self.vit, pixels, self.precision)[:, self.vit.num_prefix_tokens :]

    def features(self, pixels: Tensor, feature: str) -> Tensor:
        """Features float32 [b, D] of normalised pixels [b, 3, H, W]."""
        return image_features(self.vit, pixels, feature, self.precision)

    def check_finite(self, feature: Tensor) -> None:
        """UserError where a feature of the encoder is not finite."""
        if not bool(feature.isfinite().all()):
            raise UserError(
                f"{self.info.record['source']}: the encoder gives features that are not finite; "
                "its weights are damaged"
            )

    def need_finite(self, finite: Tensor, folder: str | Path) -> None:
        """UserError on every rank where a feature of a set is not finite on any (collective)."""
        if self.ranks.any(not bool(finite)):
            raise UserError(f"{folder}: the encoder's features of it are not finite")

    @torch.no_grad()
    def all_features(self, pixels: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Several features of the same pixels, from one forward pass."""
        tokens = last_tokens(self.vit, pixels, self.precision)
        return [feature_of(self.vit, tokens, name) for name in names]

    def loader(self, folder: str | Path, batch_size: int) -> Loader:
        """This rank's batches of a set: each image once over all ranks, evaluation crop.

        What is in a batch does not depend on the number of ranks, and so neither does the
        rounding of its features.
        """
        return eval_loader(
            folder,
            batch_size=batch_size,
            rank=self.ranks.rank,
            world=self.ranks.world,
            image_size=self.image_size,
            workers=self.workers,
            interleave=True,
            resize=self.crop.resize,
            pin_memory=self.ranks.pins_memory,
        )

    def check_readable(self, folder: str | Path, batch_size: int) -> None:
        """UserError now, and not at the end of a training, where a set's loader cannot start."""
        self.loader(folder, batch_size).close()

    def batches(self, folder: str | Path, batch_size: int) -> Iterator[LabelledPixels]:
        """The loader's batches on the device."""
        loader = self.loader(folder, batch_size)
        with loader.explaining():
            for batch in loader:
                label, sample = (
                    part.to(self.device, non_blocking=True) for part in (batch.label, batch.sample)
                )
                yield self.normalise(batch.image), label, sample

    def extract(self, folder: str | Path, feature: str, batch_size: int) -> tuple[Tensor, Tensor]:
        """`extract_all` of one feature: float32 [N, D] and labels int64 [N]."""
        (found,), label = self.extract_all(folder, (feature,), batch_size)
        return found, label

    def extract_all(
        self, folder: str | Path, names: Sequence[str], batch_size: int
    ) -> tuple[list[Tensor], Tensor]:
        """Features float32 [N, D], one for each name, and labels int64 [N] of a full set on every
        rank, in sample order, from one pass.

        No augmentation. The order, and so whatever is computed from it, does not depend on how
        many ranks shared the work.
        """
        total, ranks = read_manifest(folder).samples, self.ranks
        stream = progress(
            self.batches(folder, batch_size), ranks, f"features of {folder}",
            total=-(-total // (batch_size * ranks.world)), images=batch_size,
        )  # fmt: skip
        numbers = torch.zeros(0, dtype=torch.int64, device=self.device)
        none = torch.zeros(0, self.vit.num_features, device=self.device)
        parts = [(numbers, numbers, *[none] * len(names))]  # of a rank without images
        for pixels, label, sample in stream:
            parts.append((label, sample, *self.all_features(pixels, names)))
        label, sample, *features = (
            ranks.gather(torch.cat(column)) for column in zip(*parts, strict=True)
        )
        if not all(bool(feature.isfinite().all()) for feature in features):
            raise UserError(f"{folder}: the encoder's features of it are not finite")
        order = sample.argsort()
        if not torch.equal(sample[order], torch.arange(total, device=self.device)):
            raise UserError(f"{folder}: expected each of {total} samples once, got {len(sample)}")
        return [feature[order] for feature in features], label[order]

    def identity(self) -> str:
        """What a checkpoint was trained from, whatever path leads there: sha256 of the weights,
        of a random encoder what they were drawn from."""
        info, record = self.info, self.info.record
        built = [info.arch, info.options, record.get("random_seed")]
        total = hashlib.sha256(json.dumps(built, sort_keys=True).encode())
        if not record["random"]:
            for name, tensor in sorted(self.vit.state_dict().items()):
                total.update(name.encode())
                total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return total.hexdigest()

    def pixels(self) -> dict[str, Any]:
        """Mean and std of the pixels, beside `identity`: no weights say them."""
        return {"mean": list(self.info.mean), "std": list(self.info.std)}

    def facts(self, timer: Timer) -> dict[str, Any]:
        """What every result says last: precision, encoder, seconds, ranks."""
        return {
            "precision": used_precision(self.precision, self.device),
            "encoder": self.info.record,
            "resize": self.crop.resize,
            "seconds": timer.seconds,
            "ranks": self.ranks.world,
        }


def open_session(
    choice: EncoderChoice,
    ranks: Ranks,
    *,
    feature: str = "mean_patch",
    precision: str = "auto",
    workers: int = 0,
    device: torch.device | None = None,
) -> EvalSession:
    """Seed everything, alike on every rank, and open the encoder, which must have the feature.

    device: where it is kept; by default the rank's.
    """
    seed_everything(choice.seed)
    vit, info = open_encoder(choice, device or ranks.device, feature)
    note, left = info.record.get("note"), info.record.get("left_out")
    notes = [note] if note else []
    notes += [f"left out, as no part of an encoder: {', '.join(left)}"] if left else []
    if ranks.first and notes:
        print(f"encoder: {'; '.join(notes)}", flush=True)
    if choice.resize:
        CentreCrop(image_size(vit), choice.resize)  # refused now, not after the training
    return EvalSession(vit, info, ranks, precision, workers, choice.resize)


def session_of(
    args: argparse.Namespace,
    ranks: Ranks,
    feature: str = "mean_patch",
    device: torch.device | None = None,
) -> EvalSession:
    """The session that a command line names. UserError where another rank was given another
    (collective)."""
    _check_alike(args, ranks)
    return open_session(
        encoder_of(args),
        ranks,
        feature=feature,
        precision=args.precision,
        workers=args.workers,
        device=device,
    )


def _check_alike(args: argparse.Namespace, ranks: Ranks) -> None:
    """UserError on every rank where the options of one are not rank 0's, as those of another
    evaluation on the same port are: their features would be mixed (collective)."""
    mine = {key: value for key, value in vars(args).items() if key not in ("local_rank", "workers")}
    theirs = ranks.agree(lambda: mine)
    changed = [
        key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)
    ]
    fault = "; ".join(difference(_option(key), theirs.get(key), mine.get(key)) for key in changed)
    for rank, (host, text) in enumerate(from_all((socket.gethostname(), fault))):
        if text:
            raise UserError(
                f"rank {rank} on {host} was not given the options of rank 0: {text}; every rank "
                "needs the same command line, and every evaluation a MASTER_PORT of its own"
            )


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"

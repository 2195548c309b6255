"""The options of the evaluations and what they say. Nothing here imports torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import yaml

from pipeline.config.texts import read_yaml
from pipeline.data.crops import CentreCrop
from pipeline.errors import UserError, check_range
from pipeline.help_text import HelpFormatter
from pipeline.weights.source import check_reconstructor, check_source
from shard_tools.cli import seed_number, worker_count
from shard_tools.cores import cores

T = TypeVar("T")

FEATURES = ("cls", "mean_patch", "own")  # own: the encoder's own pooling


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


def base_parser(description: str) -> argparse.ArgumentParser:
    """Argument parser with the options of every evaluation; DeepSpeed adds `--local_rank`."""
    result = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    result.add_argument("--seed", type=seed_number, metavar="N", default=0, help="of every draw")
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return result


def add_workers(result: argparse.ArgumentParser) -> None:
    """The option of an evaluation whose images are decoded beside it."""
    result.add_argument(
        "--workers",
        type=worker_count,
        metavar="N",
        default=min(8, cores()),
        help="processes of a rank that decode images",
    )


def parser(description: str) -> argparse.ArgumentParser:
    """Argument parser of an evaluation of encoders, ours or others'."""
    result = base_parser(description)
    add_workers(result)
    encoder = result.add_argument_group("encoder")
    encoder.add_argument(
        "--encoder",
        required=True,
        help="a run's folder; a checkpoint FILE of timm, MAE, MoCo v3, DINO, I-JEPA, BEiT, "
        "mmpretrain, solo-learn or lightly, with --arch; timm:NAME; or random, with --arch",
    )
    encoder.add_argument("--arch", help="timm's name of what a FILE or random is")
    encoder.add_argument(
        "--options",
        default="{}",
        help="further keywords of that timm model, such as '{img_size: 384}'",
    )
    encoder.add_argument(
        "--random",
        action="store_true",
        help="take a randomly initialised encoder of the same architecture: the baseline",
    )
    encoder.add_argument(
        "--ema",
        action="store_true",
        help="take the average that a FILE keeps beside its weights (state_dict_ema, model_ema), "
        "or the EMA teacher of a run",
    )
    encoder.add_argument(
        "--resize",
        type=int,
        default=0,
        help="pixels of the shorter side before an evaluation's centre crop (0: 256/224 of the "
        "image size up to 224, above it the image size)",
    )
    result.add_argument("--output", help="result file (default: RUN/eval/<protocol>.json)")
    result.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 on a GPU with bf16 units, else fp32",
    )  # fmt: skip
    return result


def add_model(result: argparse.ArgumentParser) -> None:
    """The options that name a model with its decoder."""
    add = result.add_argument
    add("--encoder", required=True, help="a run's folder, or a facebookresearch/mae FILE")
    add("--recipe", default="", help="of a FILE: the recipe that it fits")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="of a FILE: change a key of that recipe")  # fmt: skip
    add("--mask-ratio", type=float, help="share of masked patches (default: the recipe's)")


def check_model(
    path: str, recipe: str, overrides: Sequence[str], mask_ratio: float | None, resize: int = 0
) -> float:
    """The share of masked patches, by default the recipe's. UserError if the options of `add_model`
    do not name a model that reconstructs, or if the share leaves it no patches."""
    found = check_reconstructor(path, recipe, overrides)
    check_range("--mask-ratio", mask_ratio, above=0, below=1)
    ratio = found.views.mask_ratio if mask_ratio is None else mask_ratio
    check_ratio(ratio, found.encoder.patches if found.encoder.patch_size else 0)
    if resize:
        CentreCrop(found.encoder.image_size, resize)
    return ratio


def check_ratio(ratio: float, length: int) -> float:
    """A share of masked patches. UserError if it masks none or all of `length` patches (0: not
    known)."""
    if not 0 < ratio < 1 or (length and int(length * (1 - ratio)) in (0, length)):
        raise UserError(
            f"--mask-ratio {ratio}: must leave some of the {length} patches masked and some visible"
        )
    return ratio


def settings_of(kind: type[T], args: argparse.Namespace) -> T:
    """The settings (a dataclass) that a command line names; its lists become tuples.

    UserError for a number that is not finite.
    """
    values = {field.name: getattr(args, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        numbers = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be finite")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check_encoder(choice: EncoderChoice) -> None:
    """UserError where a command line names no encoder, or images that are too small for it."""
    size = check_source(choice.source, choice.arch, choice.options, choice.ema, choice.random)
    channels = choice.options.get("in_chans", 3)
    if channels != 3:
        raise UserError(f"--options {{in_chans: {channels}}}: the pictures have 3 channels")
    if choice.resize < 0:
        raise UserError(f"--resize {choice.resize}: must be 0 or more pixels")
    if choice.resize and size:
        CentreCrop(size, choice.resize)


def encoder_of(args: argparse.Namespace) -> EncoderChoice:
    """The encoder that a command line names."""
    options = read_options(args.options)
    return EncoderChoice(
        args.encoder, args.arch, options, args.random, args.seed, args.ema, args.resize
    )


def read_options(text: str) -> dict[str, Any]:
    """--options, further keywords of timm.create_model, as a dictionary."""
    try:
        options = read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f"--options {text}: write them as {{img_size: 384, patch_size: 16}}")
    return options

"""Every evaluation of eval/ in one table: how its results are named, shown, run and billed.

A new protocol is its script and a row here; the report, its charts and reproduce.py then know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def option(words: Sequence[str], name: str, default: Any) -> Any:
    """The last value of `name` on a command line, in every form that argparse reads: the next word,
    after `=`, the name abbreviated."""
    value = default
    for number, word in enumerate(words):
        given, equals, text = word.partition("=")
        if len(given) > len("--") and name.startswith(given) and given.startswith("--"):
            value = text if equals else words[number + 1]
    return value


@dataclass(frozen=True)
class Work:
    """What a protocol's cost follows from.

    forward: FLOPs of the encoder on one full image; train, val: images; options: the words of its
    command line.
    """

    forward: float
    train: int
    val: int
    options: tuple[str, ...] = ()

    def option(self, name: str, default: Any) -> Any:
        """Its last value among the options."""
        return option(self.options, name, default)


# (images seen, FLOPs) of a protocol.
Cost = Callable[[Work], tuple[int, float]]


def validation_only(work: Work) -> tuple[int, float]:
    """One forward pass over the validation images."""
    return work.val, work.val * work.forward


def features_once(work: Work) -> tuple[int, float]:
    """One forward pass over all images; heads on cached features cost next to nothing."""
    return work.train, (work.train + work.val) * work.forward


def linear_probe(work: Work) -> tuple[int, float]:
    """A forward pass over the training images in every epoch, or one where they are cached."""
    cached = work.option("--protocol", "mae") == "cached"
    images = (1 if cached else int(work.option("--epochs", 90))) * work.train
    return images, images * work.forward


def finetuning(work: Work) -> tuple[int, float]:
    """Forward and backward (three forward passes) of the images in all epochs: the labelled ones,
    or as many as --samples-per-epoch draws."""
    images = float(work.option("--fraction", 1.0)) * work.train
    drawn = float(work.option("--samples-per-epoch", images))
    images = round(float(work.option("--epochs", 100)) * drawn)
    return images, images * 3 * work.forward


def attentive_probe(work: Work) -> tuple[int, float]:
    """A forward pass of the encoder over every crop; the heads cost little beside it."""
    images = int(work.option("--steps", 12_500)) * int(work.option("--batch-size", 128))
    return images, images * work.forward


def nine_ratios(work: Work) -> tuple[int, float]:
    """The full images (--images of them), and what 10 … 90 % dropped leaves: 4.5 more passes."""
    images = min(work.val, int(work.option("--images", 0)) or work.val)
    return images, 5.5 * images * work.forward


@dataclass(frozen=True)
class Protocol:
    """One evaluation.

    name: `protocol` in its result files. script: eval/<script>.py. metric: the number of a result
    that counts, "" where a result is more than one (curves have charts of their own). column: what
    paper.yaml, scales.yaml and reproduce.py call it. heading: of that column. fraction: share of
    the training labels. train, encoder: whether the script takes --train, --encoder.
    """

    name: str
    script: str
    metric: str
    unit: str
    title: str
    cost: Cost
    column: str = ""
    heading: str = ""
    fraction: float = 1.0
    train: bool = True
    encoder: bool = True

    @property
    def key(self) -> str:
        """What a command of reproduce.py and its result file are called."""
        return self.column or self.name

    def words(self, seed: int) -> list[str]:
        """The options that make the script this protocol."""
        if self.fraction == 1.0:
            return []
        return ["--fraction", f"{self.fraction:g}", "--subset-seed", str(seed)]


# Of several that share a column the first counts first.
PROTOCOLS = (
    Protocol(
        "linprobe-mae", "linprobe", "top1", "%", "linear probe", linear_probe,
        "linprobe", "linear probe (%)",
    ),
    Protocol(
        "linprobe-cached", "linprobe", "top1", "%", "linear probe, cached", linear_probe,
        "linprobe", "linear probe (%)",
    ),
    Protocol(
        "finetune", "finetune", "top1", "%", "finetuning", finetuning,
        "finetune", "finetuning (%)",
    ),
    Protocol(
        "finetune", "finetune", "top1", "%", "finetuning", finetuning,
        "fewshot", "10 % of the labels (%)", fraction=0.1,
    ),
    Protocol(
        "psnr", "psnr", "image", "dB", "PSNR", validation_only,
        "psnr", "PSNR (dB)", train=False,
    ),
    Protocol("attentive-probe", "attentive", "top1", "%", "attentive probe", attentive_probe),
    Protocol("knn", "knn", "top1", "%", "k-NN", features_once),
    Protocol("cka", "cka", "", "", "CKA", nine_ratios, train=False),
    Protocol(
        "shape-bias", "shape_bias", "shape_bias", "", "shape bias", validation_only,
        encoder=False,
    ),
)  # fmt: skip


def by_name(name: object) -> Protocol | None:
    """The protocol of a result file, None for an unknown one."""
    return next((p for p in PROTOCOLS if p.name == name), None)


def by_key(key: str) -> Protocol:
    """The protocol that reproduce.py and paper.yaml call `key`. KeyError for an unknown one."""
    return {p.key: p for p in reversed(PROTOCOLS)}[key]


def keys() -> tuple[str, ...]:
    """What reproduce.py and sweep.py can run, each once."""
    return tuple(dict.fromkeys(p.key for p in PROTOCOLS if p.encoder))


def headings() -> dict[str, str]:
    """Column → heading of what the paper's tables and reproduce.py can show."""
    return {p.key: p.heading or f"{p.title} ({p.unit})" for p in PROTOCOLS if p.metric}


def metric_of(result: dict[str, Any], path: Path | str = "") -> float:
    """The number of a result that counts. KeyError or ValueError where it is none."""
    protocol = by_name(result.get("protocol"))
    if protocol is None or not protocol.metric:
        raise KeyError(f"{path}: protocol {result.get('protocol')!r} has no single metric")
    return float(result[protocol.metric])

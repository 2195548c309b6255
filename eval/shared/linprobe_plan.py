"""What a linear probe is asked for, checked, and what that comes to with these data and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.shared.batches import check_batch, micro_batch_of, partitions_of
from eval.shared.labels import class_count, images_of, labelled
from eval.shared.subsets import held_out_count
from pipeline.data.order import steps_per_epoch
from pipeline.errors import UserError, check_range

if TYPE_CHECKING:
    from eval.shared.session import EvalSession

GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Settings:
    """How a probe is trained; its defaults are MAE's protocol.

    train, val: shards. protocol: mae or cached. feature: one of FEATURES; also: others, probed
    beside it in the same passes. batch_size: global. micro_batch: images of a forward pass, at
    most. base_lr: per 256 images, of mae; grid: those of cached, and select: where its best is
    chosen. max_steps: of a trial.
    """

    train: str
    val: str
    protocol: str = "mae"
    feature: str = "cls"
    also: tuple[str, ...] = ()
    epochs: int = 90
    warmup_epochs: float = 10
    batch_size: int = 16384
    micro_batch: int = 256
    base_lr: float = 0.1
    grid: tuple[float, ...] = GRID
    select: str = "held-out"
    max_steps: int | None = None
    seed: int = 0


# Settings that one of the protocols alone reads.
ONLY = {"mae": ("base_lr",), "cached": ("grid", "select")}


@dataclass(frozen=True)
class Plan:
    """What the settings come to with these data and ranks; of cached the classes alone.

    train_sha256, val_sha256: of the index of the sets. images: `images_of` both. steps: of an
    epoch. total: of all. micro_batch: images of this rank's forward pass.
    """

    classes: int
    train_sha256: str
    val_sha256: str
    images: dict[str, str]
    steps: int = 0
    total: int = 0
    micro_batch: int = 0
    partitions: int = 1


def make_plan(s: Settings, world: int) -> Plan:
    """Check the settings against the data and the number of ranks; what they come to."""
    train, val = labelled(s.train), labelled(s.val)
    classes, sets = class_count(train, val), (train.index_sha256, val.index_sha256)
    images = images_of(train, val)
    for name in ("epochs", "batch_size", "micro_batch", "max_steps"):
        check_range(f"--{name.replace('_', '-')}", getattr(s, name), at_least=1)
    if not 0 <= s.warmup_epochs < s.epochs:
        raise UserError(
            f"--warmup-epochs {s.warmup_epochs:g}: must be from 0 to below --epochs {s.epochs}, or "
            "the learning rate never gets to its peak"
        )
    check_range("--base-lr", s.base_lr, above=0)
    for rate in s.grid:
        check_range("--grid", rate, above=0)
    if s.batch_size < 2:
        raise UserError(f"--batch-size {s.batch_size}: the batch norm needs at least 2 images")
    if s.feature in s.also or len(set(s.also)) < len(s.also):
        raise UserError(f"--also {' '.join(s.also)}: each feature once, and not that of --feature")
    for name in ONLY["mae" if s.protocol == "cached" else "cached"]:
        if getattr(s, name) != getattr(Settings, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} does nothing under --protocol {s.protocol}; leave it out")
    if s.protocol == "cached":
        check_cached(s, train.samples)
        return Plan(classes, *sets, images)
    check_batch(s.batch_size, world)
    micro_batch = micro_batch_of(s.batch_size, world, s.micro_batch)
    partitions = partitions_of(s.batch_size, world)
    steps = steps_per_epoch(train.samples, s.batch_size, partitions)
    if steps < 1:
        raise UserError(
            f"{s.train} has {train.samples} samples, too few for --batch-size "
            f"{s.batch_size}; choose a smaller one"
        )
    total = steps * s.epochs if s.max_steps is None else min(steps * s.epochs, s.max_steps)
    return Plan(classes, *sets, images, steps, total, micro_batch, partitions)


def check_cached(s: Settings, samples: int) -> None:
    """UserError where too few images are left to train on."""
    out = held_out_count(samples) if s.select == "held-out" else 0
    if samples - out < 2:
        raise UserError(
            f"{s.train}: {samples} training images, of which {out} are held out, leave "
            f"{samples - out}; the batch norm needs at least 2 (--select validation holds out none)"
        )


def identity(s: Settings, plan: Plan, session: EvalSession) -> dict[str, Any]:
    """`record` for a checkpoint: sha256 instead of paths, which may change."""
    known = record(s, plan, session) | {"encoder": session.identity(), "feature": s.feature}
    known |= {"resize": session.resize or None, **session.pixels()}
    return known | {"train": plan.train_sha256, "val": plan.val_sha256} | plan.images


def record(s: Settings, plan: Plan, session: EvalSession) -> dict[str, Any]:
    """What the result depends on, for the result file."""
    names = ["also"] if s.also else []
    names += ["epochs", "warmup_epochs", "batch_size", "seed", "train", "val", "max_steps"]
    names += ["base_lr"] if s.protocol == "mae" else ["grid", "select"]
    chosen = {name: getattr(s, name) for name in names}
    fixed = {"optimizer": "LARS", "momentum": 0.9, "trust": 0.001, "weight_decay": 0.0}
    return {**chosen, **fixed, "precision": session.precision, "classes": plan.classes}

"""The settings of a finetuning, checked, and the plan that they give for its data and ranks."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.shared.batches import check_batch, partitions_of
from eval.shared.labels import check_classes, class_count, images_of, labelled, say_unseen
from eval.shared.results import digest
from eval.shared.subsets import keep_subset
from pipeline.config.ds_config import DS_CONFIGS, open_ds_config, read_ds_config
from pipeline.config.plan import RunPlan
from pipeline.config.planning import auto_micro_batch, make_plan, set_precision
from pipeline.config.schedules import warmup_cosine
from pipeline.config.schema import LARGEST_RATE, OptimizerRecipe, augmentation
from pipeline.data.order import steps_per_epoch
from pipeline.errors import UserError, check_range
from shard_tools.cli import counted
from shard_tools.manifest import read_manifest
from shard_tools.subset import Choice, choose_samples

if TYPE_CHECKING:
    from eval.shared.session import EvalSession
    from pipeline.distributed import Ranks


@dataclass(frozen=True)
class Settings:
    """The settings of finetuning; the defaults are MAE's. train, val: shards; see --help.

    samples_per_epoch: draws with replacement that make an epoch; None: each image once. crop_area:
    smallest share of the image's area that a training crop shows.
    """

    train: str
    val: str
    ds_config: str = str(DS_CONFIGS / "zero2.json")
    fraction: float = 1.0
    subset: str | None = None
    subset_seed: int = 0
    samples_per_epoch: int | None = None
    epochs: float = 100
    warmup_epochs: float = 5
    batch_size: int = 1024
    base_lr: float = 1e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    drop_path: float = 0.1
    randaugment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    crop_area: float = 0.08
    validate_epochs: int = 1
    stop_epoch: float | None = None
    max_steps: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """finetune, finetune-10percent …: of the folder and the result file. Lists of several
        folders may be named alike."""
        if self.subset:
            path = Path(self.subset)
            return f"finetune-{path.stem}-{digest(os.path.realpath(path))}"
        return "finetune" if self.fraction == 1.0 else f"finetune-{100 * self.fraction:g}percent"

    @property
    def all_labels(self) -> bool:
        """Whether it trains on all of them."""
        return self.fraction == 1.0 and not self.subset

    @property
    def choice(self) -> Choice:
        """The labels that it trains on, where those are not all."""
        names = Path(self.subset) if self.subset else None
        return Choice(None if self.subset else self.fraction, names, seed=self.subset_seed)


@dataclass(frozen=True)
class Plan:
    """What the settings give for these data. train: shards, of the chosen labels; classes:
    their names; steps: of an epoch; total: of all; sha256: of the training and validation index;
    images: `images_of` both.
    """

    train: str
    classes: tuple[str, ...]
    partitions: int
    steps: int
    total: int
    sha256: tuple[str, str]
    images: dict[str, str]


def learning_rate(s: Settings, step: int, steps: int) -> float:
    """The learning rate of a step, given `steps` per epoch, before the layers' scales."""
    return warmup_cosine(
        step,
        peak=s.base_lr * s.batch_size / 256,
        total=s.epochs * steps,
        warmup=s.warmup_epochs * steps,
        low=s.min_lr,
    )


def make_run_plan(s: Settings, plan: Plan, session: EvalSession) -> RunPlan:
    """How the engine runs it on these ranks."""
    config, patches = read_ds_config(s.ds_config), session.vit.patch_embed.num_patches
    stage = stage_of(s, config)
    if session.precision != "auto":
        set_precision(config, session.precision)
        check_bf16(s, session, stage)
    config["train_micro_batch_size_per_gpu"] = micro_batch(s, config, patches, session.ranks.world)
    return make_plan(
        config,
        OptimizerRecipe(base_lr=s.base_lr, betas=(0.9, 0.999)),
        batch_size=s.batch_size,
        partitions=plan.partitions,
        patches=patches,
        world=session.ranks.world,
    )


def stage_of(s: Settings, config: dict[str, Any]) -> int:
    """ZeRO's stage. UserError for 3."""
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    if stage == 3:
        raise UserError(
            f"--ds_config {s.ds_config}: ZeRO stage 3 shards the weights that validation needs; "
            "use zero2 (or zero0, zero1)"
        )
    return stage


def check_bf16_stage(s: Settings, precision: str, stage: int) -> None:
    """UserError if --precision bf16 is given with a ZeRO stage that does not run in it."""
    if precision == "bf16" and not stage:
        raise UserError(
            f"--precision bf16 needs ZeRO stage 1 or 2, and --ds_config {s.ds_config} has stage 0; "
            "use zero1 or zero2, or --precision fp32"
        )


def check_bf16(s: Settings, session: EvalSession, stage: int) -> None:
    """UserError if --precision bf16 is not possible on this device."""
    check_bf16_stage(s, session.precision, stage)
    import torch

    from pipeline.distributed import bf16_units

    if session.precision == "bf16" and torch.cuda.is_available() and not bf16_units():
        name = torch.cuda.get_device_name()
        raise UserError(f"--precision bf16: {name} has no bf16 units; use auto or fp32")


def micro_batch(s: Settings, config: dict[str, Any], patches: int, world: int) -> int:
    """Images of a micro-batch on a rank: the ds_config's, or by its size; even where mixup or
    cutmix pairs them."""
    given = given_micro_batch(s, config, world)
    multiple = 2 if s.mixup or s.cutmix else 1
    return given or auto_micro_batch(s.batch_size // world, patches, multiple=multiple)


def given_micro_batch(s: Settings, config: dict[str, Any], world: int) -> int:
    """What the ds_config says, 0 for "auto". UserError where that cannot be."""
    per_rank, pairs = s.batch_size // world, bool(s.mixup or s.cutmix)
    wanted = config.get("train_micro_batch_size_per_gpu", "auto")
    if pairs and per_rank % 2:
        raise UserError(
            f"--batch-size {s.batch_size}: mixup and cutmix pair images, and {per_rank} per "
            f"rank is odd; choose a multiple of {2 * world}, or --mixup 0 --cutmix 0"
        )
    if wanted == "auto":
        return 0
    if not isinstance(wanted, int) or wanted < 1 or per_rank % wanted:
        raise UserError(
            f"{s.ds_config}: train_micro_batch_size_per_gpu {wanted!r} does not divide the "
            f"{per_rank} images per rank of --batch-size {s.batch_size} over "
            f"{counted(world, 'rank')}"
        )
    if pairs and wanted % 2:
        raise UserError(
            f"{s.ds_config}: train_micro_batch_size_per_gpu {wanted}: mixup and cutmix pair "
            "images, so it must be even; or --mixup 0 --cutmix 0"
        )
    return wanted


def choose_labels(s: Settings, folder: Path, ranks: Ranks) -> str:
    """The shards to train on: s.train, or the subset that --fraction or --subset asks for, which
    is written to `folder` and replaces another one there."""
    if s.all_labels:
        return s.train
    path = folder / "subset"

    def write() -> None:
        choice, manifest = s.choice, read_manifest(s.train)
        samples = choose_samples(manifest, choice)
        keep_subset(manifest, path, samples, choice.record())

    ranks.agree(write)
    return str(path)


def check(s: Settings, world: int) -> None:
    """UserError for a setting that is wrong whatever the data; it names the option."""
    check_batch(s.batch_size, world, pairs=bool(s.mixup or s.cutmix))
    for name in ("max_steps", "samples_per_epoch", "validate_epochs"):
        check_range(f"--{name.replace('_', '-')}", getattr(s, name), at_least=1)
    for name in ("mixup", "cutmix", "weight_decay", "min_lr"):
        check_range(f"--{name.replace('_', '-')}", getattr(s, name), at_least=0)
    check_range("--base-lr", s.base_lr, above=0, at_most=LARGEST_RATE)
    check_range("--epochs", s.epochs, above=0)
    check_range("--stop-epoch", s.stop_epoch, above=0)
    check_range("--layer-decay", s.layer_decay, above=0, at_most=1)
    check_range("--drop-path", s.drop_path, at_least=0, below=1)
    check_range("--erasing", s.erasing, at_least=0, at_most=1)
    check_range("--smoothing", s.smoothing, at_least=0, below=1)
    check_range("--crop-area", s.crop_area, above=0, at_most=1)
    if not 0 <= s.warmup_epochs < s.epochs:
        raise UserError(
            f"--warmup-epochs {s.warmup_epochs:g}: must be from 0 to below --epochs {s.epochs:g}"
        )
    try:
        augmentation(s.randaugment)
    except ValueError:
        raise UserError(
            f"--randaugment {s.randaugment!r} is not a policy of timm such as rand-m9-mstd0.5-inc1"
        ) from None
    if s.subset and s.fraction != 1.0:
        raise UserError("--subset and --fraction both choose the labels: give one of them")


def check_input(s: Settings, world: int, precision: str = "auto") -> None:
    """UserError for what can be checked without the encoder."""
    check(s, world)
    config = open_ds_config(s.ds_config)
    check_bf16_stage(s, precision, stage_of(s, config))
    given_micro_batch(s, config, world)
    train, val = labelled(s.train), labelled(s.val)
    classes = class_count(train, val)
    if s.all_labels:
        count_steps(s, s.train, train.samples, world)
    else:
        asked = f"--subset {s.subset}" if s.subset else f"--fraction {s.fraction:g}"
        samples, left = choose_samples(train, s.choice), f"what {asked} leaves of {s.train}"
        labels = train.index["label"][samples]
        check_classes(left, labels)
        say_unseen(left, labels, val, classes)
        count_steps(s, left, len(samples), world)


def count_steps(s: Settings, shards: str, samples: int, world: int) -> tuple[int, int]:
    """(steps of an epoch, of all) on the samples of `shards`. UserError where there are none."""
    partitions = partitions_of(s.batch_size, world)
    steps = steps_per_epoch(s.samples_per_epoch or samples, s.batch_size, partitions)
    if not steps:
        raise UserError(
            f"--samples-per-epoch {s.samples_per_epoch}: too few for --batch-size {s.batch_size}"
            if s.samples_per_epoch
            else f"{shards} has {samples} samples, too few for --batch-size {s.batch_size}; "
            "choose a smaller one, or draw with replacement: --samples-per-epoch"
        )
    total = round(steps * s.epochs)
    if not total:
        raise UserError(f"--epochs {s.epochs:g}: less than a step, with {steps} in an epoch")
    return steps, total if s.max_steps is None else min(total, s.max_steps)


def plan_training(s: Settings, folder: Path, ranks: Ranks) -> Plan:
    """Check settings and data; the plan. The chosen labels are written to `folder`."""
    check(s, ranks.world)
    val = labelled(s.val)
    count = class_count(labelled(s.train), val)
    shards = choose_labels(s, folder, ranks)
    train = labelled(shards)
    steps, total = count_steps(s, shards, train.samples, ranks.world)
    return Plan(
        train=shards,
        classes=train.classes or tuple(map(str, range(count))),
        partitions=partitions_of(s.batch_size, ranks.world),
        steps=steps,
        total=total,
        sha256=(train.index_sha256, val.index_sha256),
        images=images_of(train, val),
    )


def record(s: Settings, plan: Plan, session: EvalSession) -> dict[str, Any]:
    """What the result depends on."""
    names = (
        "epochs", "warmup_epochs", "batch_size", "base_lr", "min_lr", "weight_decay",
        "layer_decay", "drop_path", "randaugment", "erasing", "mixup", "cutmix", "smoothing",
        "fraction", "subset", "subset_seed", "seed", "max_steps", "val",
    )  # fmt: skip
    encoder, values = session.info.record, asdict(s)
    drawn: dict[str, Any] = {}
    if s.samples_per_epoch:
        drawn["samples_per_epoch"] = s.samples_per_epoch
    if s.crop_area != Settings.crop_area:
        drawn["crop_area"] = s.crop_area
    return (
        {name: values[name] for name in names}
        | drawn
        | {
            "random": encoder["random"],
            "encoder": encoder["source"],
            "train": plan.train,
            "precision": session.precision,
        }
    )


def identity(s: Settings, plan: Plan, session: EvalSession) -> dict[str, Any]:
    """`record` for a checkpoint: sha256 instead of paths, which may change."""
    known = record(s, plan, session)
    del known["subset"]  # the training images say it
    return known | {
        "encoder": session.identity(), "train": plan.sha256[0], "val": plan.sha256[1],
        **plan.images,
        "resize": session.resize or None, **session.pixels(),
    }  # fmt: skip

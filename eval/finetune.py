"""Finetuning: the whole encoder and a fresh head, trained on all labels or on few of them.

MAE's settings (He et al. 2022, Tab. 9; facebookresearch/mae, FINETUNE.md) with the paper's base
learning rate: AdamW betas 0.9, 0.999, weight decay 0.05, batch 1024, base learning rate 1e-3,
layer decay 0.75, 5 of 100 epochs warm up, cosine to 1e-6, drop path 0.1, RandAugment
rand-m9-mstd0.5-inc1, label smoothing 0.1, mixup 0.8, cutmix 1.0, random erasing 0.25, mean of the
patch tokens, a fresh fc_norm and head.

    deepspeed eval/finetune.py --ds_config ds_configs/zero2.json --encoder runs/rmae \\
        --train data/shards/train --val data/shards/val [--fraction 0.1 | --subset FILE]

It resumes from its last checkpoint when rerun; SIGTERM and SIGUSR1 save and exit with 85.
`--random` trains from scratch.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eval.shared.batch_augment import make_erasing, make_mixup
from eval.shared.checkpoints import Checkpoints
from eval.shared.classifier import build_classifier, layer_groups, write_classifier
from eval.shared.cli import (
    World,
    as_percent,
    count_correct,
    output_path,
    parser,
    progress,
    run_command,
    write_result,
)
from eval.shared.features import (
    Timer,
    batches,
    class_count,
    image_size,
    labelled,
    normalise,
    open_encoder,
)
from pipeline.config.ds_config import RunPlan, make_plan, read_ds_config
from pipeline.config.schedules import warmup_cosine
from pipeline.config.schema import OptimizerRecipe
from pipeline.data.crops import Crop
from pipeline.data.loader import Batch, LoaderConfig, train_loader
from pipeline.data.order import steps_per_epoch
from pipeline.data.randaugment import RandAugment
from pipeline.distributed import PREEMPTED, StopSignal
from pipeline.errors import UserError
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.optimizer_state import load_consolidated, save_consolidated
from pipeline.runtime.seeding import seed_all, seed_step
from pipeline.runtime.skipped_steps import SKIP_LIMIT, SkippedSteps
from shard_tools.manifest import read_manifest
from shard_tools.subset import Choice, choose_samples, write_subset


class Classifier(nn.Module):
    """The loss that finetuning minimises: soft-target cross-entropy in fp32."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.criterion = SoftTargetCrossEntropy()

    def forward(self, pixels: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels [b, 3, H, W] and soft targets fp32 [b, classes] → mean loss, no terms."""
        logits = self.model(pixels.to(self.model.patch_embed.proj.weight.dtype))
        return self.criterion(logits.float(), target), {}


class Finetuning:
    """Model, engine and data of one finetuning on this rank."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        encoder, self.info = open_encoder(args, world)
        self.size = image_size(encoder)
        seed_all(args.seed)
        model = build_classifier(encoder, self.info, args.classes, args.drop_path)
        self.plan = self._plan(encoder.patch_embed.num_patches)
        groups = layer_groups(model, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
        self.module = Classifier(model)
        self.engine = Engine(self.module, groups, self.plan)
        self.skipped = SkippedSteps(SKIP_LIMIT, "limit", "use a lower --base-lr")
        self.augment = None  # in the loader's workers, after the crop
        if args.randaugment:
            mean = tuple(self.info["mean"])
            self.augment = RandAugment(args.randaugment, self.size, mean, args.seed)
        self.erase = make_erasing(args.erasing, world.device)
        self.mix = make_mixup(
            mixup=args.mixup, cutmix=args.cutmix, smoothing=args.smoothing, classes=args.classes
        )

    def _plan(self, patches: int) -> RunPlan:
        args = self.args
        config = read_ds_config(args.ds_config)
        if args.precision != "auto":
            config["bf16"] = {"enabled": args.precision == "bf16"}
        plan = make_plan(
            config,
            OptimizerRecipe(base_lr=args.base_lr, betas=(0.9, 0.999)),
            batch_size=args.batch_size,
            partitions=args.partitions,
            patches=patches,
            world=self.world.size,
        )
        if plan.stage == 3:
            raise UserError(
                f"{args.ds_config}: ZeRO stage 3 shards the weights that validation needs; "
                "use ds_configs/zero2.json (or zero0, zero1)"
            )
        if plan.micro_batch % 2:
            raise UserError(
                f"mixup pairs images: {plan.micro_batch} images per micro-batch must be even; "
                "choose another --batch-size"
            )
        return plan

    def batches(self, start: int) -> Iterator[Batch]:
        """This rank's micro-batches from step `start` on."""
        config = LoaderConfig(
            self.args.train,
            batch_size=self.args.batch_size,
            micro_batch=self.plan.micro_batch,
            crop=Crop(image_size=self.size, scale=(0.08, 1.0)),
            seed=self.args.seed,
            partitions=self.args.partitions,
            augment=self.augment,
            workers=self.args.workers,
        )
        steps = range(start, self.args.total_steps)
        return iter(train_loader(config, self.world.rank, self.world.size, steps))

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, before the layers' scales."""
        args = self.args
        return warmup_cosine(
            step,
            peak=args.base_lr * args.batch_size / 256,
            total=args.epochs * args.steps_per_epoch,
            warmup=args.warmup_epochs * args.steps_per_epoch,
            low=args.min_lr,
        )

    def train_step(self, step: int, micro: Iterator[Batch]) -> Tensor:
        """One optimizer step; the mean loss of this rank's micro-batches.

        UserError on every rank where a loss is not finite on any; a gradient that is not finite
        skips the step, and many of them in a row are a UserError too.
        """
        lr = self.learning_rate(step)
        losses = []
        for number, batch in enumerate(itertools.islice(micro, self.plan.accumulation)):
            pixels = normalise(batch.image, self.info, self.world.device)
            seed_step(self.args.seed, step, number, self.world.rank)
            if self.erase is not None:
                pixels = self.erase(pixels)
            pixels, target = self.mix(pixels, batch.label.to(self.world.device))
            losses.append(self.engine.micro_step(lr, pixels, target)[0])
        loss = torch.stack(losses).mean()
        if self.world.any(not bool(loss.isfinite())):
            raise UserError(
                f"the loss of finetuning is not finite in step {step + 1}; use a lower --base-lr, "
                "or an encoder whose features are finite"
            )
        self.skipped.note(step, self.engine.step_skipped)
        return loss

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Accuracy on the validation set, each image once over all ranks."""
        self.module.eval()
        model = self.module.model
        count = torch.zeros(3, dtype=torch.int64, device=self.world.device)
        with torch.random.fork_rng(devices=[]):
            for pixels, label, _ in batches(self.args.val, model, self.info, self.world, self.args):
                logits = model(pixels.to(model.patch_embed.proj.weight.dtype))
                count += count_correct(logits.float(), label)
        self.module.train()
        top1, top5, images = self.world.sum(count).tolist()
        return {
            "top1": as_percent(top1, images),
            "top5": as_percent(top5, images),
            "images": images,
        }


def choose_labels(args: argparse.Namespace, folder: Path, world: World) -> None:
    """Replace args.train by the subset that --fraction or --subset asks for, kept in `folder`."""
    if args.fraction == 1.0 and not args.subset:
        return
    place = folder / "subset"
    if world.first and not (place / "manifest.json").is_file():
        names = Path(args.subset) if args.subset else None
        fraction = None if args.subset else args.fraction
        choice = Choice(fraction=fraction, names=names, seed=args.subset_seed)
        manifest = read_manifest(args.train)
        write_subset(manifest, place, choose_samples(manifest, choice), choice.record())
    world.sum(torch.zeros(1, device=world.device))  # the first rank has written it
    args.train = str(place)


def complete(args: argparse.Namespace) -> tuple[str, ...]:
    """Check the arguments against the data and derive the rest; the names of the classes."""
    train, val = labelled(args.train), labelled(args.val)
    if args.batch_size < 1 or (args.max_steps is not None and args.max_steps < 1):
        raise UserError("--batch-size and --max-steps must be at least 1")
    if args.base_lr <= 0 or not 0 <= args.warmup_epochs < args.epochs:
        raise UserError("--base-lr must be above 0, --warmup-epochs from 0 to below --epochs")
    args.classes = class_count(train, val)
    args.partitions = next(p for p in (64, 32, 16, 8, 4, 2, 1) if args.batch_size % p == 0)
    args.steps_per_epoch = steps_per_epoch(train.samples, args.batch_size, args.partitions)
    if not args.steps_per_epoch:
        raise UserError(
            f"{args.train} has {train.samples} samples, too few for --batch-size {args.batch_size}"
        )
    total = round(args.steps_per_epoch * args.epochs)
    args.total_steps = total if args.max_steps is None else min(total, args.max_steps)
    return train.classes or tuple(map(str, range(args.classes)))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on."""
    names = (
        "epochs", "warmup_epochs", "batch_size", "base_lr", "min_lr", "weight_decay",
        "layer_decay", "drop_path", "randaugment", "erasing", "mixup", "cutmix", "smoothing",
        "fraction", "subset", "subset_seed", "seed", "max_steps", "random", "encoder", "train",
        "val", "precision",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def evaluate(args: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Finetune, validate after every epoch, export the classifier; the result on every rank."""
    timer = Timer()
    args.micro_batch = 256  # of validation
    choose_labels(args, folder, world)
    classes = complete(args)
    stop = StopSignal()
    run = Finetuning(args, world)
    checkpoints = Checkpoints(folder, settings(args))
    latest = checkpoints.load(partial(load_consolidated, run.engine))
    step, history = latest.get("step", 0), latest.get("history", [])
    loader = run.batches(step)
    steps = progress(range(step, args.total_steps), world, "finetuning")
    for step in steps:
        if args.stop_epoch is not None and step >= args.stop_epoch * args.steps_per_epoch:
            break  # resumes here when rerun
        loss = run.train_step(step, loader)
        last = step + 1 == args.total_steps
        stopping = world.any(bool(stop.name)) and not last
        epoch_ends = (step + 1) % args.steps_per_epoch == 0 or last
        if epoch_ends:
            epoch = (step + 1) / args.steps_per_epoch
            row = {"epoch": round(epoch, 3), "loss": round(loss.item(), 5)}
            if last or round(epoch) % args.validate_epochs == 0:
                row |= run.validate()
            history.append(row)
        if epoch_ends or stopping:
            checkpoints.save(step + 1, partial(save_consolidated, run.engine), history=history)
        if epoch_ends and world.first:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if stopping:
            sys.exit(PREEMPTED)
    if "top1" not in history[-1]:
        history[-1] |= run.validate()
    state = run.engine.full_state()
    if world.first:
        weights = {k.removeprefix("model."): v for k, v in state.items()}
        write_classifier(folder, weights, run.info, classes)
    return {
        "protocol": "finetune",
        "feature": "mean_patch",
        **{key: history[-1][key] for key in ("top1", "top5", "images")},
        "best_top1": max(row["top1"] for row in history if "top1" in row),
        "history": history,
        "nonfinite_steps": run.skipped.total,
        "settings": settings(args),
        "precision": run.plan.precision,
        "encoder": run.info,
        "seconds": timer.seconds,
        "ranks": world.size,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are SPEC's finetuning."""
    result = parser(str(__doc__).split("\n", 1)[0])
    result.add_argument("--train", required=True, help="training shards")
    result.add_argument("--val", required=True, help="validation shards")
    result.add_argument("--ds_config", default="ds_configs/zero2.json")
    result.add_argument("--fraction", type=float, default=1.0, help="share of each class's labels")
    result.add_argument("--subset", help="file of image names to train on (SimCLR's 10percent.txt)")
    result.add_argument("--subset-seed", type=int, default=0)
    result.add_argument("--epochs", type=float, default=100)
    result.add_argument("--warmup-epochs", type=float, default=5)
    result.add_argument("--batch-size", type=int, default=1024, help="global, over all ranks")
    result.add_argument("--base-lr", type=float, default=1e-3, help="per 256 images")
    result.add_argument("--min-lr", type=float, default=1e-6)
    result.add_argument("--weight-decay", type=float, default=0.05)
    result.add_argument("--layer-decay", type=float, default=0.75)
    result.add_argument("--drop-path", type=float, default=0.1)
    result.add_argument("--randaugment", default="rand-m9-mstd0.5-inc1", help="'' = none")
    result.add_argument("--erasing", type=float, default=0.25)
    result.add_argument("--mixup", type=float, default=0.8)
    result.add_argument("--cutmix", type=float, default=1.0)
    result.add_argument("--smoothing", type=float, default=0.1)
    result.add_argument("--validate-epochs", type=int, default=1, help="validate so often")
    result.add_argument("--stop-epoch", type=float, help="stop here; rerun to resume")
    result.add_argument("--max-steps", type=int, help="shorten the run: a trial")
    return result


def result_name(args: argparse.Namespace) -> str:
    """finetune, finetune-10percent …: names the folder and the result file."""
    name = "finetune"
    if args.subset:
        name += f"-{Path(args.subset).stem}"
    elif args.fraction != 1.0:
        name += f"-{100 * args.fraction:g}percent"
    return name


def main() -> None:
    args = build_parser().parse_args()
    ranks = init_ranks()
    world = World(ranks.rank, ranks.world, ranks.device)
    output = output_path(args, result_name(args))
    result = evaluate(args, world, output.with_suffix(""))
    if world.first:
        write_result(output, result)
        print(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  → {output}", flush=True)


if __name__ == "__main__":
    run_command(main)

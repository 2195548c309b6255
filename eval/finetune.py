"""Finetuning: the full encoder and a fresh head, trained on all labels or on few of them.

MAE's settings (He et al. 2022, Tab. 9; facebookresearch/mae, FINETUNE.md) with the paper's base
learning rate: AdamW betas 0.9, 0.999, weight decay 0.05, batch 1024, base learning rate 1e-3,
layer decay 0.75, 5 of 100 epochs warm up, cosine to 1e-6, drop path 0.1, RandAugment
rand-m9-mstd0.5-inc1, label smoothing 0.1, mixup 0.8, cutmix 1.0, random erasing 0.25, mean of the
patch tokens, a fresh fc_norm and head.

    deepspeed eval/finetune.py --ds_config ds_configs/zero2.json --encoder runs/rmae \\
        --train data/shards/train --val data/shards/val [--fraction 0.1 | --subset FILE]

It resumes from its last checkpoint when rerun; SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save and exit
with 85. `--random` trains from scratch.
"""

import argparse
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from eval.shared.command import run_command
from eval.shared.finetune_plan import (
    Plan,
    Settings,
    check_input,
    identity,
    learning_rate,
    make_run_plan,
    plan_training,
    record,
)
from eval.shared.labels import content_of
from eval.shared.options import parser, read_options, settings_of
from eval.shared.results import Timer, check_finished, result_of, write_accuracy
from pipeline.command import check_unused, early
from pipeline.errors import Diverged, UserError
from shard_tools.cli import seed_number


def build_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are MAE's finetuning of ViT-B."""
    result, d = parser(str(__doc__).split("\n", 1)[0]), Settings
    add = result.add_argument
    add("--ds_config", "--ds-config", default=d.ds_config, metavar="FILE",
        help="how it runs: a file, or zero0, zero1 or zero2 (default: zero2)")  # fmt: skip
    add("--validate-epochs", type=int, default=d.validate_epochs, help="validate every N epochs")
    add("--stop-epoch", type=float, help="stop here; rerun to resume")
    add("--max-steps", type=int, help="stop after N steps: a trial run")

    add = result.add_argument_group("images and labels").add_argument
    add("--train", required=True, help="training shards")
    add("--val", required=True, help="validation shards")
    add("--fraction", type=float, default=d.fraction, help="share of each class's labels")
    add("--subset", help="file of image names to train on (SimCLR's 10percent.txt)")
    add(
        "--subset-seed",
        type=seed_number,
        metavar="N",
        default=d.subset_seed,
        help="of the draw of --fraction",
    )
    add("--samples-per-epoch", type=int,
        help="make an epoch of N draws with replacement (default: each image once)")  # fmt: skip

    add = result.add_argument_group("schedule and optimizer").add_argument
    add("--epochs", type=float, default=d.epochs, help="over the training set")
    add("--warmup-epochs", type=float, default=d.warmup_epochs, help="below --epochs")
    add("--batch-size", type=int, default=d.batch_size, help="global, over all ranks")
    add("--base-lr", type=float, default=d.base_lr, help="learning rate per 256 images")
    add("--min-lr", type=float, default=d.min_lr, help="where the cosine ends")
    add("--weight-decay", type=float, default=d.weight_decay, help="of AdamW")
    add(
        "--layer-decay",
        type=float,
        default=d.layer_decay,
        help="factor of the learning rate from each layer to the one below",
    )
    add("--drop-path", type=float, default=d.drop_path, help="stochastic depth of the last block")

    add = result.add_argument_group("augmentation").add_argument
    add("--randaugment", default=d.randaugment, help="timm's policy; '' = none")
    add("--erasing", type=float, default=d.erasing, help="probability of random erasing")
    add("--mixup", type=float, default=d.mixup, help="alpha; 0 = off")
    add("--cutmix", type=float, default=d.cutmix, help="alpha; 0 = off")
    add("--smoothing", type=float, default=d.smoothing, help="of the labels")
    add("--crop-area", type=float, default=d.crop_area,
        help="smallest share of the image that a training crop covers")  # fmt: skip
    return result


def prepare(args: argparse.Namespace, world: int = 1) -> tuple[Settings, Path]:
    """The settings and the path of the result. UserError."""
    settings = settings_of(Settings, args)
    if "drop_path_rate" in read_options(args.options):
        raise UserError("--options: drop_path_rate is --drop-path of finetuning; give that one")
    if settings.fraction == 1 or settings.subset:
        check_unused(build_parser(), args, ["subset_seed"], "without --fraction")
    output = result_of(args, settings.name, folder=True, protocol="finetune")
    check_input(settings, world, args.precision)
    known = vars(args).copy()
    if not settings.all_labels:
        del known["train"]  # a result names the chosen labels, which are kept beside it
    unsaid = {"samples_per_epoch": None, "crop_area": Settings.crop_area}
    check_finished(output, argparse.Namespace(**known), unsaid)
    return settings, output


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare, ranks=True)

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eval.shared.batch_augment import make_erasing, make_mixup
from eval.shared.checkpoints import Checkpoints, hold, leave
from eval.shared.classifier import build_classifier, layer_groups, write_classifier
from eval.shared.cli import progress
from eval.shared.metrics import accuracy, count_correct
from eval.shared.session import EvalSession, session_of
from pipeline.data.batch import Batch, LoaderConfig
from pipeline.data.crops import Crop
from pipeline.data.loader import Loader, train_loader
from pipeline.data.randaugment import RandAugment
from pipeline.distributed import StopSignal
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.memory import explaining_memory
from pipeline.runtime.optimizer_state import load_consolidated, save_consolidated
from pipeline.runtime.seeding import seed_all
from pipeline.runtime.skipped_steps import SKIP_LIMIT, SkippedSteps

VAL_BATCH = 256  # images of a validation batch on a rank


class Classifier(nn.Module):
    """The loss that finetuning minimises: soft-target cross-entropy in fp32."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.criterion = SoftTargetCrossEntropy()

    def forward(self, pixels: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels [b, 3, H, W] and soft targets fp32 [b, classes] → mean loss, no terms."""
        logits = self.model(pixels.to(next(self.model.parameters()).dtype))
        return self.criterion(logits.float(), target), {}


class Finetuning:
    """Model, engine and data of one finetuning on this rank."""

    def __init__(self, s: Settings, plan: Plan, session: EvalSession) -> None:
        self.settings, self.plan, self.session, self.ranks = s, plan, session, session.ranks
        info, size = session.info, session.image_size
        seed_all(s.seed)
        model = build_classifier(session.vit, info, len(plan.classes), s.drop_path)
        self.run_plan = make_run_plan(s, plan, session)
        groups = layer_groups(model, weight_decay=s.weight_decay, layer_decay=s.layer_decay)
        self.module = Classifier(model)
        self.engine = Engine(self.module, groups, self.run_plan)
        self.skipped = SkippedSteps(SKIP_LIMIT, "limit", "use a lower --base-lr")
        # In the loader's workers, after the crop.
        self.augment = (
            RandAugment(s.randaugment, size, info.mean, s.seed) if s.randaugment else None
        )
        self.erase = make_erasing(s.erasing, session.device)
        self.mix = make_mixup(
            mixup=s.mixup, cutmix=s.cutmix, smoothing=s.smoothing, classes=len(plan.classes)
        )

    def loader(self, start: int) -> Loader:
        """This rank's micro-batches from step `start` on."""
        config = LoaderConfig(
            self.plan.train,
            batch_size=self.settings.batch_size,
            micro_batch=self.run_plan.micro_batch,
            crop=Crop(image_size=self.session.image_size, scale=(self.settings.crop_area, 1.0)),
            seed=self.settings.seed,
            partitions=self.plan.partitions,
            samples_per_epoch=self.settings.samples_per_epoch or 0,
            augment=self.augment,
            workers=self.session.workers,
            pin_memory=self.ranks.pins_memory,
        )
        steps = range(start, self.plan.total)
        return train_loader(config, self.ranks.rank, self.ranks.world, steps)

    def train_step(self, step: int, micro: Iterator[Batch]) -> Tensor:
        """One optimizer step; the mean loss of this rank's micro-batches.

        Diverged on every rank where a loss is not finite on any; a gradient that is not finite
        skips the step, and many of them in a row are Diverged too.
        """
        lr = learning_rate(self.settings, step, self.plan.steps)
        losses = []
        for number, batch in enumerate(itertools.islice(micro, self.run_plan.accumulation)):
            pixels = self.session.normalise(batch.image)
            seed_all(self.settings.seed, step, number, self.ranks.rank)
            if self.erase is not None:
                pixels = self.erase(pixels)
            label = batch.label.to(self.ranks.device, non_blocking=True)
            pixels, target = self.mix(pixels, label)
            losses.append(self.engine.micro_step(lr, pixels, target)[0])
        loss = torch.stack(losses).mean()
        if self.ranks.any(not bool(loss.isfinite())):
            raise Diverged(
                f"the loss of finetuning is not finite in step {step + 1}; use a lower --base-lr, "
                "or an encoder whose features are finite"
            )
        self.skipped.note(step, self.engine.step_skipped)
        return loss

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Accuracy on the validation set, each image once over all ranks. Diverged where outputs
        are not finite, as after a last step that was too large."""
        self.module.eval()
        model = self.module.model
        count = torch.zeros(3, dtype=torch.int64, device=self.ranks.device)
        finite = torch.ones((), dtype=torch.bool, device=self.ranks.device)
        with torch.random.fork_rng(devices=[]):
            for pixels, label, _ in self.session.batches(self.settings.val, VAL_BATCH):
                with torch.autocast(
                    pixels.device.type, torch.bfloat16, self.run_plan.precision == "autocast"
                ):
                    logits = model(pixels.to(next(model.parameters()).dtype))
                count += count_correct(logits.float(), label)
                finite &= logits.isfinite().all()
        self.module.train()
        if self.ranks.any(not bool(finite)):
            raise Diverged(
                f"{self.settings.val}: the classifier's outputs of it are not finite, so they have "
                "no accuracy; use a lower --base-lr"
            )
        return accuracy(self.ranks.sum(count))


def train(
    run: Finetuning, checkpoints: Checkpoints, latest: dict[str, Any], stop: StopSignal,
    micro: Iterator[Batch], timer: Timer,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train from the checkpoint `latest` on, to the end or to --stop-epoch; the history, whose
    last row is of the last step and validated."""
    s, plan, ranks = run.settings, run.plan, run.ranks
    done, history = latest.get("step", 0), latest.get("history", [])
    pause = plan.total if s.stop_epoch is None else min(plan.total, s.stop_epoch * plan.steps)
    images = s.batch_size // ranks.world
    for step in progress(range(done, plan.total), ranks, "finetuning", images=images):
        if step >= pause:
            break  # resumes here when rerun
        loss = run.train_step(step, micro)
        done, last = step + 1, step + 1 == plan.total
        stopping = ranks.any(bool(stop.name)) and not last
        epoch_ends = done % plan.steps == 0 or last
        if epoch_ends:
            loss = ranks.sum(loss) / ranks.world  # of the global batch
            row = {"epoch": round(done / plan.steps, 3), "loss": round(loss.item(), 5)}
            if last or round(done / plan.steps) % s.validate_epochs == 0:
                row |= run.validate()
            history.append(row)
        if epoch_ends or stopping or done >= pause:
            write, skipped = partial(save_consolidated, run.engine), run.skipped.total
            more = {"nonfinite_steps": skipped, "seconds": timer.seconds,
                    "precision": run.run_plan.precision}  # fmt: skip
            checkpoints.save(done, write, history=history, **more)
        if epoch_ends and ranks.first:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if stopping:
            leave(stop, done, plan.total, ranks)
    epoch = round(done / plan.steps, 3)
    if not history or history[-1]["epoch"] != epoch:  # within an epoch
        history = [*history, {"epoch": epoch}]
    if "top1" not in history[-1]:
        history[-1] |= run.validate()
    return history


def evaluate(s: Settings, session: EvalSession, folder: Path) -> dict[str, Any]:
    """Finetune, validate after every epoch, export the classifier; the result on every rank.

    folder: of the checkpoints, the chosen labels and the classifier.
    """
    timer, ranks = Timer(), session.ranks
    held = hold(folder, ranks)  # before the labels of a run there are replaced by this one's
    plan = plan_training(s, folder, ranks)
    session.check_readable(s.val, VAL_BATCH)
    run = Finetuning(s, plan, session)
    checkpoints = Checkpoints(folder, identity(s, plan, session), held)
    latest = checkpoints.load(partial(load_consolidated, run.engine))
    precision = run.run_plan.precision
    if (before := latest.get("precision", precision)) != precision:
        raise UserError(
            f"{checkpoints.store.folder} holds a training with precision {before}, this one has "
            f"{precision}; resume with the same --ds_config on such a device, remove it or choose "
            "another --output"
        )
    run.skipped.total = latest.get("nonfinite_steps", 0)
    timer.resume(latest.get("seconds", 0.0))
    checkpoints.announce(latest.get("step", 0), plan.total, ranks)
    loader = run.loader(latest.get("step", 0))
    memory = explaining_memory(run.run_plan, session.image_size)
    with loader.explaining(), memory, StopSignal() as stop:
        history = train(run, checkpoints, latest, stop, iter(loader), timer)
    if ranks.first and (sentence := run.skipped.at_end()):
        print(f"warning: {sentence}", flush=True)
    state = run.engine.full_state()
    if ranks.first:
        weights = {k.removeprefix("model."): v for k, v in state.items()}
        write_classifier(folder, weights, session.info.record, plan.classes)
    held.clear()
    return {
        "protocol": "finetune",
        "feature": "mean_patch",
        **{key: history[-1][key] for key in ("top1", "top5", "images")},
        "best_top1": max(row["top1"] for row in history if "top1" in row),
        "history": history,
        "nonfinite_steps": run.skipped.total,
        "settings": record(s, plan, session) | {"trained_epochs": history[-1]["epoch"]},
        "content": content_of(s),
        **session.facts(timer),
        "precision": precision,
    }


def main() -> None:
    args = build_parser().parse_args()
    ranks = init_ranks()
    settings, output = ranks.agree(lambda: prepare(args, ranks.world))
    session = session_of(args, ranks, device=torch.device("cpu"))  # the classifier is a copy
    result = evaluate(settings, session, output.with_suffix(""))
    if ranks.first:
        write_accuracy(output, result)


if __name__ == "__main__":
    run_command(main)

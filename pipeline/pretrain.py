"""Pretrain MAE, R-MAE or C-MAE from shards with DeepSpeed.

deepspeed pipeline/pretrain.py --ds_config ds_configs/zero2.json
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import kernels
from pipeline.config.ds_config import RunPlan, plan_recipe, read_ds_config
from pipeline.config.recipe import (
    RECIPES,
    Recipe,
    dump_recipe,
    load_recipe,
)
from pipeline.config.schedules import ema_momentum, learning_rate
from pipeline.data.loader import Batch, Crop, Loader, eval_loader, train_loader
from pipeline.data.order import steps_per_epoch
from pipeline.data.randaugment import RandAugment
from pipeline.distributed import PREEMPTED, Ranks, StopSignal, agree, any_rank, close
from pipeline.errors import UserError, refuse
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.method.pictures import draw
from pipeline.runtime.checkpoint import CheckpointStore, SaveError
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.optimizers import optimizer_of
from pipeline.runtime.probes import Probes
from pipeline.runtime.run_folder import (
    RunLock,
    claim,
    export,
    load_checkpoint,
    save_checkpoint,
    versions,
)
from pipeline.runtime.skipped_steps import SkippedSteps
from pipeline.runtime.watchdog import Watchdog, last_failure, note_failure
from shard_tools.atomic import write_atomic, write_json
from shard_tools.manifest import read_manifest

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Pretrain a masked-image model (MAE, R-MAE, C-MAE) from shards with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--ds_config", "--ds-config", default=ROOT / "ds_configs" / "zero2.json", metavar="FILE",
        help="how it runs (ZeRO stage, bf16, buckets, micro-batch): a file, or a bundled name such "
        "as zero1",
    )  # fmt: skip
    parser.add_argument(
        "--recipe",
        default=RECIPES / "rmae.yaml",
        metavar="FILE",
        help="what is trained: a file, or a bundled name such as mae",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a recipe key, e.g. --set optimizer.epochs=400; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--data", default="data/shards/train", metavar="FOLDER", help="folder of shards"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="the run's folder (default: runs/<recipe>-<date>)",
        default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument(
        "--resume", default="auto", metavar="auto|PATH|none",
        help="resume from the newest valid checkpoint of --output, from another run or checkpoint, "
        "or start from scratch",
    )  # fmt: skip
    parser.add_argument(
        "--max-steps", type=int, default=argparse.SUPPRESS, metavar="N",
        help="stop after optimizer step N; the learning rate follows the recipe's length all the "
        "same (default: the recipe's epochs)",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.output = getattr(args, "output", None)
    args.max_steps = getattr(args, "max_steps", None)
    if args.max_steps is not None and args.max_steps < 1:
        parser.error(f"--max-steps {args.max_steps}: must be at least 1")
    return args


def default_output(recipe: Recipe) -> Path:
    """runs/<recipe>-<date and time>."""
    return Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"


class Run:
    """One pretraining run: everything that the loop needs, made in the order that fails early."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.ranks = ranks
        self.recipe = recipe = load_recipe(args.recipe, args.overrides)
        self.plan: RunPlan = plan_recipe(read_ds_config(args.ds_config), recipe, ranks.world)
        optimizer_of(self.plan)  # refused before anything is made
        manifest = read_manifest(args.data)
        self.data = args.data
        epoch = recipe.data.samples_per_epoch or manifest.samples
        self.epoch_steps = steps_per_epoch(epoch, recipe.batch_size, recipe.data.partitions)
        if self.epoch_steps == 0:
            raise UserError(
                f"{args.data}: {epoch} samples are fewer than one batch of {recipe.batch_size}; "
                "set batch_size (and data.partitions) lower, or data.samples_per_epoch"
            )
        self.total = round(recipe.optimizer.epochs * self.epoch_steps)
        self.last = min(self.total, args.max_steps or self.total)
        kernel_line = kernels.use(recipe.kernels, ranks.device)
        self.objective, self.teacher = build_objective(recipe)
        self.output: Path = agree(lambda: Path(args.output or default_output(recipe)))
        self.lock: RunLock | None = None
        self.store = CheckpointStore(self.output, recipe.monitor.keep_checkpoints)
        checkpoint, failed = agree(lambda: self._claim(args.resume))
        self.watchdog = Watchdog(self.plan.watchdog_seconds, ranks.rank, self.output)
        self.engine = Engine(self.objective, parameter_groups(self.objective), self.plan)
        if self.teacher is not None:
            self.teacher.to(ranks.device)
        self.first, saved, self.saving = 0, "", 0.0
        self.start = time.perf_counter()
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, self.engine, self.teacher)
            self.first = int(state["step"])
            saved = f"saved by {state['ranks']} ranks under ZeRO stage {state['zero_stage']}"
            together = ranks.world * self.plan.micro_batch
            if recipe.measure.batch_negatives and state["negatives_batch"] != together:
                before = state["negatives_batch"]
                saved += f"; negatives came from {before} images, now from {together}"
            if self.first >= self.last:  # killed before the encoder was written, perhaps
                export(self.output, checkpoint, self.objective, recipe, self.first)
        self.loader = self._loader()
        self.skipped = SkippedSteps(recipe.optimizer.skip_limit)
        self.probes = Probes(recipe, self.data, ranks.rank, ranks.world, self.plan.micro_batch)
        self.monitor = Monitor(
            self.output,
            rank=ranks.rank,
            first=self.first,
            total=self.last,
            images=recipe.batch_size,
            log_steps=recipe.monitor.log_steps,
        )
        if failed:
            self.monitor.say(f"previous run failed: {failed}")
        self._announce(kernel_line, manifest.samples)
        if checkpoint is not None:
            self.monitor.say(
                f"resumed: {checkpoint}, at step {self.first} of {self.last} ({saved})"
            )

    def _claim(self, resume: str) -> tuple[Path | None, str]:
        self.lock, checkpoint = claim(self.output, self.recipe, resume)
        return checkpoint, last_failure(self.output, clear=True)

    def _loader(self) -> Loader:
        d, size = self.recipe.data, self.recipe.encoder.image_size
        augment = None
        if d.randaugment:
            augment = RandAugment(d.randaugment, size, d.mean, self.recipe.seed)
        return train_loader(
            self.data,
            batch_size=self.recipe.batch_size,
            micro_batch=self.plan.micro_batch,
            rank=self.ranks.rank,
            world=self.ranks.world,
            seed=self.recipe.seed,
            start_step=min(self.first, self.last),
            total_steps=self.last,
            crop=Crop(size, d.crop.scale, d.crop.ratio, d.crop.flip),
            workers=loader_workers(d.workers, self.ranks.local_world),
            partitions=d.partitions,
            window=d.window,
            on_error=d.on_error,
            samples_per_epoch=d.samples_per_epoch,
            second_crop=self.recipe.views.second == "crop",
            augment=augment,
            pin_memory=self.ranks.device.type == "cuda",
        )

    def _announce(self, kernel_line: str, samples: int) -> None:
        if self.ranks.rank == 0:
            write_atomic(self.output / "recipe.yaml", dump_recipe(self.recipe))
            write_json(self.output / "ds_config.json", self.engine.config)
            facts = versions() | {
                "device": _device_name(self.ranks.device),
                "ranks": self.ranks.world,
                "kernels": kernels.implementation(),
                "precision": self.plan.precision,
                "data": str(self.data),
                "images": samples,
            }
            write_json(self.output / "versions.json", facts)
        say = self.monitor.say
        say(f"run: {self.output} ({self.recipe.name}, {self.recipe.encoder.arch})")
        lines = [*self.plan.describe(), self.engine.kind.describe(), kernel_line]
        for line in (*lines, f"image decoder: {self.loader.decoder}"):
            say(line)
        say(f"data: {samples} images in {self.data}, {self.epoch_steps} steps per epoch")

    def failed(self, error: Exception) -> int:
        """Say why this rank ends, unless another one said the same; the exit code."""
        gone = isinstance(error, torch.distributed.DistBackendError) or "gloo" in str(error)
        reason = "lost contact to another rank" if gone else str(error) or type(error).__name__
        rank, where = self.ranks.rank, self.watchdog.where
        if note_failure(self.output, rank, where, reason):
            who = f" (rank {rank}, {where})" if self.ranks.world > 1 else ""
            print(f"error{who}: {reason}", file=sys.stderr, flush=True)
        if isinstance(error, UserError):
            return 2
        if not gone:
            traceback.print_exception(error)
        return 1

    def close(self) -> None:
        """End the workers, flush the logs, free the folder."""
        self.watchdog.close()
        self.loader.close()
        self.monitor.close()
        if self.lock is not None:
            self.lock.release()

    def save(self, step: int, must: bool) -> None:
        """Write a checkpoint and the encoder as it is after `step` steps (collective).

        must: raise SaveError where they cannot be written, whatever monitor.on_disk_full says.
        """
        self.watchdog.note(f"saving step {step}")
        paused = self.monitor.pause()
        state = {
            "step": step,
            "ranks": self.ranks.world,
            "zero_stage": self.plan.stage,
            "precision": self.plan.precision,
            "negatives_batch": self.ranks.world * self.plan.micro_batch,
            "versions": versions(),
        }
        m, text = self.recipe.monitor, dump_recipe(self.recipe)
        try:
            place = save_checkpoint(self.store, self.engine, self.teacher, text, state)
            export(self.output, place, self.objective, self.recipe, step)
        except SaveError as error:
            if must or m.on_disk_full == "stop":
                raise
            self.monitor.say(f"warning: {error}; continuing (monitor.on_disk_full: continue)")
        self.saving += time.perf_counter() - paused
        self.monitor.resume_clock(paused)

    def probe(self, step: int) -> None:
        """Report the probes of the weights after `step` steps, where any is due (collective)."""
        if self.probes.due(step):
            paused = self.monitor.pause()
            figures = self.probes(step, self.objective.encoder, self.ranks.device)
            self.monitor.figures(step, figures)
            self.monitor.resume_clock(paused)

    def picture(self, step: int, batch: Batch) -> None:
        """Draw the fixed pictures with the weights after `step` steps (collective)."""
        paused = self.monitor.pause()
        device = self.ranks.device
        grid = draw(self.objective, batch.image.to(device), batch.sample.to(device))
        self.monitor.picture(step, grid)
        self.monitor.resume_clock(paused)


def train(run: Run, stop: StopSignal) -> int:
    """The loop: batch → T1, T2 → f → M → backward → step → EMA → monitor → checkpoint.

    Returns the exit code: 0, or PREEMPTED where any rank was told to stop.
    """
    recipe, device, m = run.recipe, run.ranks.device, run.recipe.monitor
    shown = next(iter(fixed_images(run.data, recipe)))
    batches, skipped = iter(run.loader), run.loader
    for step in range(run.first, run.last):
        lr = learning_rate(recipe, step, run.epoch_steps)
        patience = 4 if step == run.first else 1  # kernels and blocks are compiled
        for micro in range(run.plan.accumulation):
            run.watchdog.note(f"step {step + 1}, waiting for data", patience)
            waiting = time.perf_counter()
            batch = next(batches)
            run.monitor.waited(time.perf_counter() - waiting)
            run.watchdog.note(f"step {step + 1}, forward, backward and update", patience)
            # Whatever draws from torch (dropout of an option) is a function of the step too.
            torch.manual_seed(hash((recipe.seed, step, micro, run.ranks.rank)))
            loss, terms = run.engine.micro_step(
                lr,
                batch.image.to(device, non_blocking=True),
                batch.key.to(device, non_blocking=True),
                batch.epoch,
                run.teacher,
                None if batch.second is None else batch.second.to(device, non_blocking=True),
            )
            run.monitor.add(loss, terms, 1.0 / run.plan.accumulation)
        run.skipped.note(step, run.engine.step_skipped)
        values: dict[str, Any] = {
            "lr": lr,
            "epoch": (step + 1) / run.epoch_steps,
            "grad_norm": run.engine.gradient_norm,
            "skipped": skipped.skipped,
            "skipped_steps": run.skipped.total,
        }
        if run.teacher is not None:
            momentum = ema_momentum(recipe, step, run.total)
            run.teacher.update(run.objective, momentum, run.engine.gathered)
            values["ema"] = momentum
            distance = partial(run.teacher.distance, run.objective, run.engine.gathered)
            values["teacher_distance"] = distance
        run.watchdog.note(f"step {step + 1}, after the update", patience)
        run.monitor.step(step, values, device)
        run.probe(step + 1)
        if (step + 1) % m.picture_steps == 0 or step + 1 == run.last:
            run.picture(step + 1, shown)
        stopping = any_rank(bool(stop.name)) and step + 1 < run.last
        must = stopping or step + 1 == run.last
        if must or (step + 1) % m.save_steps == 0:
            run.save(step + 1, must)
        if stopping:
            signal_name = stop.name or "a signal to another rank"
            run.monitor.say(f"stopped by {signal_name}: saved at step {step + 1} of {run.last}")
            return PREEMPTED
    share = run.saving / (time.perf_counter() - run.start)
    run.monitor.say(f"done: step {run.last}; encoder in {run.output / 'encoder'}")
    run.monitor.say(f"checkpointing took {run.saving:.1f} s ({100 * share:.1f} % of wall time)")
    return 0


def fixed_images(data: str, recipe: Recipe) -> Loader:
    """The first eight samples, centre-cropped: the same in every picture of a run."""
    return eval_loader(
        data, batch_size=8, rank=0, world=1, image_size=recipe.encoder.image_size, workers=0
    )


def loader_workers(workers: int, local_world: int) -> int:
    """-1: one worker per core of this rank's share, at least one, at most 12."""
    if workers >= 0:
        return workers
    return max(1, min(12, (os.cpu_count() or 1) // local_world))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.cpu.get_capabilities().get('cpu_name', 'unknown')})"


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit code.

    0 done, 1 another rank is gone or a bug, 2 bad input or a full disk, 75 (by the watchdog) no
    progress, 85 stopped by a signal and saved.
    """
    args = parse_args(argv)
    stop = StopSignal()
    ranks = init_ranks()
    try:
        run = Run(args, ranks)
    except UserError as error:
        # Once per host: one may lack what the others have.
        who = f" (rank {ranks.rank} on {socket.gethostname()})" if ranks.rank else ""
        return refuse(error, who) if ranks.local_rank == 0 else 2
    try:
        return train(run, stop)
    except Exception as error:
        return run.failed(error)
    finally:
        run.close()


if __name__ == "__main__":
    code = main()
    if code not in (0, PREEMPTED):
        sys.stdout.flush()
        os._exit(code)  # not waiting for ranks that may be gone
    close()
    sys.exit(code)

"""Everything that the training loop needs, made once, in the order that fails early."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import kernels
from pipeline.config.ds_config import read_ds_config
from pipeline.config.plan import RunPlan, for_steps
from pipeline.config.recipe import Recipe, dump_recipe, load_recipe
from pipeline.config.schedules import size_steps
from pipeline.config.schema import OptimizerRecipe
from pipeline.data.batch import LoaderConfig
from pipeline.data.loader import Loader, train_loader
from pipeline.data.randaugment import RandAugment
from pipeline.distributed import Ranks, agree, untried_device
from pipeline.errors import UserError, naming
from pipeline.method.objective import Objective, build_objective
from pipeline.method.parameter_groups import layer_scale, parameter_groups
from pipeline.method.start import start_from
from pipeline.method.teacher import Teacher
from pipeline.processor import processor
from pipeline.runtime.checkpoint import CheckpointStore
from pipeline.runtime.engine import Engine
from pipeline.runtime.memory import explaining_memory
from pipeline.runtime.mfu import Mfu, peak_of
from pipeline.runtime.micro_batch import plan_that_fits
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.optimizers import optimizer_of
from pipeline.runtime.preflight import check_installed, crop_of
from pipeline.runtime.probes import Probes
from pipeline.runtime.run_folder import default_output, export, load_checkpoint, versions
from pipeline.runtime.run_lock import UNWRITABLE, RunLock, claim
from pipeline.runtime.same_run import check_same, schedule_facts
from pipeline.runtime.settings import Settings, epoch_steps, whole_steps
from pipeline.runtime.skipped_steps import SkippedSteps
from pipeline.runtime.trackers import Trackers
from pipeline.runtime.watchdog import Watchdog, last_failure
from shard_tools.atomic import write_atomic, write_json
from shard_tools.manifest import read_manifest


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of this start, [first, last); `total` is the recipe's length. sizes: of its
    images, see schedules.size_steps."""

    first: int
    last: int
    total: int
    per_epoch: int
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Model:
    """What is trained: the objective in its engine, and its EMA teacher if the method has one."""

    objective: Objective
    teacher: Teacher | None
    engine: Engine


@dataclass(frozen=True)
class RunFolder:
    """The folder of the run; the first rank holds its lock. resumed_from: the path of --resume
    with which it began, if any."""

    path: Path
    store: CheckpointStore
    lock: RunLock | None
    resumed_from: str


@dataclass(frozen=True)
class Watch:
    """What looks on: logs, probes, the watchdog, the count of steps that were not finite."""

    monitor: Monitor
    probes: Probes
    watchdog: Watchdog
    nonfinite: SkippedSteps


@dataclass(frozen=True)
class TrainState:
    """One pretraining run on this rank."""

    recipe: Recipe
    plan: RunPlan
    ranks: Ranks
    data: str
    schedule: dict[str, Any]  # what it depends on, for state.json
    steps: Steps
    model: Model
    loader: Loader
    folder: RunFolder
    watch: Watch

    @property
    def negatives_batch(self) -> int:
        """Images of one micro-batch of all ranks, which share InfoNCE's negatives and the
        statistics of batch norm."""
        return self.ranks.world * self.plan.micro_batch

    def bad_samples(self) -> int:
        """Samples of all ranks that would not decode, since the run began (collective)."""
        return int(self.ranks.sum(torch.tensor(self.loader.bad_samples)))

    def close(self) -> None:
        """End the workers, flush the logs, free the folder."""
        self.watch.watchdog.close()
        self.loader.close()
        self.watch.monitor.close()
        if self.folder.lock is not None:
            self.folder.lock.release()


def setup(settings: Settings, ranks: Ranks) -> TrainState:
    """Read, check, claim the folder, build, resume and announce (collective).

    Raises UserError on the rank that finds the fault, on all where the first rank looks for all.
    """
    manifest = read_manifest(settings.data)
    recipe = load_recipe(settings.recipe, settings.overrides, manifest.made.get("pixels"))
    plan = plan_that_fits(read_ds_config(settings.ds_config), recipe, ranks)
    optimizer_of(plan)  # refused before anything is made
    agree(lambda: check_installed(recipe.monitor.log_to))
    per_epoch = epoch_steps(settings.data, manifest.samples, recipe)
    schedule = schedule_facts(manifest, recipe, per_epoch)
    _check_alike(settings.data, schedule)
    total = whole_steps(per_epoch, settings.data, recipe)
    sizes = size_steps(recipe, total)
    plan = for_steps(plan, total)
    last = min(total, settings.max_steps or total)
    kernel_line = kernels.use(recipe.kernels, ranks.device)
    if agree(lambda: kernel_line) != kernel_line:  # all wait for the slowest
        print(f"rank {ranks.rank} on {socket.gethostname()}: {kernel_line}", file=sys.stderr)
    objective, teacher = build_objective(recipe)
    path: Path = agree(lambda: Path(settings.output or default_output(recipe)))
    lock, checkpoint, failure, warnings = _claim(path, recipe, schedule, settings)
    started: list[str] = []
    if checkpoint is None and recipe.init.weights:
        started = start_from(objective, recipe.init.weights, recipe.init.ema).lines(
            recipe.init.weights
        )
        teacher = Teacher(objective) if recipe.teacher else None
    elif checkpoint is not None:
        recipe = _with_init_of(checkpoint, recipe)
    watchdog = Watchdog(plan.watchdog_seconds, ranks.rank, path)
    with explaining_memory(plan, recipe.encoder.image_size):
        engine = Engine(objective, parameter_groups(objective), plan)
        if teacher is not None:
            engine.adopt(teacher)
    first, resumed = 0, ""
    given = "" if settings.resume in ("auto", "none") else str(Path(settings.resume).resolve())
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint, engine, teacher)
        first, by = int(saved["step"]), _saved_by(saved, plan, ranks)
        given = given or saved.get("resumed_from", "")
        resumed = f"resumes from {checkpoint}, at step {first} of {last} ({by})"
        if first >= last:  # killed before the encoder was written, perhaps
            export(path, checkpoint, objective, recipe, first)
    with naming(path, UNWRITABLE):
        monitor = Monitor(
            path, rank=ranks.rank, first=first, total=last, images=recipe.batch_size,
            log_steps=recipe.monitor.log_steps, trackers=_open_trackers(path, recipe, first),
            sizes=sizes,
        )  # fmt: skip
    state = TrainState(
        recipe, plan, ranks, settings.data, schedule, Steps(first, last, total, per_epoch, sizes),
        Model(objective, teacher, engine),
        train_loader(
            loader_config(recipe, plan, settings.data, ranks, sizes), ranks.rank, ranks.world,
            range(min(first, last), last),
        ),
        RunFolder(path, CheckpointStore(path, recipe.monitor.keep_checkpoints), lock, given),
        Watch(
            monitor,
            Probes(recipe, settings.data, ranks.rank, ranks.world, plan.micro_batch),
            watchdog, SkippedSteps(recipe.optimizer.skip_limit),
        ),
    )  # fmt: skip
    if checkpoint is not None:  # what it had counted; of all ranks, so the first takes it
        state.watch.nonfinite.total = int(saved.get("nonfinite_steps", 0))
        state.loader.bad_samples = 0 if ranks.rank else int(saved.get("bad_samples", 0))
    with naming(path, UNWRITABLE):
        _announce(state, kernel_line, failure, [*warnings, *started, resumed])
        _show_mfu(state, settings.peak_tflops)
    return state


def _with_init_of(checkpoint: Path, recipe: Recipe) -> Recipe:
    """The recipe with what a resumed run once started from, where it names nothing itself."""
    if recipe.init.weights:
        return recipe
    return recipe.model_copy(update={"init": load_recipe(checkpoint / "recipe.yaml").init})


def _open_trackers(output: Path, recipe: Recipe, first: int) -> Trackers:
    """Those of the first rank; on the others none."""
    opened = [Trackers()]

    def start() -> None:
        settings = recipe.model_dump(mode="json", by_alias=True)
        opened[0] = Trackers(recipe.monitor.log_to, output, first, settings)

    agree(start)
    return opened[0]


def _show_mfu(state: TrainState, given_tflops: float | None) -> None:
    """Let the first rank's monitor show the MFU, or say why not."""
    monitor, ranks = state.watch.monitor, state.ranks
    peak, problem = peak_of(_device_name(ranks.device), state.plan.precision, given_tflops)
    if peak is None:
        monitor.say(problem)
    elif ranks.rank == 0:
        monitor.mfu = Mfu(state.folder.path / "recipe.yaml", peak * ranks.world)


def _check_alike(data: str, schedule: dict[str, Any]) -> None:
    """UserError on a rank that sees other data than the first one, as a stale local copy."""
    first = agree(lambda: schedule)
    if first != schedule:
        raise UserError(
            f"{data}: {schedule['images']} images, manifest {schedule['data'][:12]}, but rank 0 "
            f"has {first['images']} images, manifest {first['data'][:12]}: every host needs the "
            "same shards"
        )


def _claim(
    output: Path, recipe: Recipe, schedule: dict[str, Any], settings: Settings
) -> tuple[RunLock | None, Path | None, str, list[str]]:
    """(the lock on the first rank, the checkpoint to resume from, why the previous run failed,
    warnings where the checkpoint is not of the same run)."""
    held: list[RunLock] = []

    def take() -> tuple[Path | None, str, list[str]]:
        lock, checkpoint = claim(output, settings.resume, settings.lock)
        held.append(lock)
        warnings = []
        if checkpoint is not None:
            warnings = check_same(checkpoint, recipe, schedule, settings.resume_changed)
        return checkpoint, last_failure(output, clear=True), warnings

    checkpoint, failure, warnings = agree(take)
    return (held[0] if held else None), checkpoint, failure, warnings


def _saved_by(saved: dict, plan: RunPlan, ranks: Ranks) -> str:
    """Which ranks saved a state; and what it took from another number of images than this run."""
    several = f"{saved['ranks']} rank{'s' * (saved['ranks'] != 1)}"
    text = f"saved by {several} under ZeRO stage {saved['zero_stage']}"
    before, now = saved["negatives_batch"], ranks.world * plan.micro_batch
    if plan.pooled and before != now:
        text += f"; {plan.pooled} came from {before} images, now from {now}"
    return text


def loader_config(
    recipe: Recipe, plan: RunPlan, data: str, ranks: Ranks, sizes: tuple[tuple[int, int], ...] = ()
) -> LoaderConfig:
    """The training batches of a recipe on these ranks. sizes: see schedules.size_steps."""
    d, size = recipe.data, recipe.encoder.image_size
    return LoaderConfig(
        data,
        batch_size=recipe.batch_size,
        micro_batch=plan.micro_batch,
        crop=crop_of(recipe),
        seed=recipe.seed,
        partitions=d.partitions,
        window=d.window,
        on_error=d.on_error,
        samples_per_epoch=d.samples_per_epoch,
        sizes=sizes,
        second_crop=recipe.views.second == "crop",
        augment=RandAugment(d.randaugment, size, d.mean, recipe.seed) if d.randaugment else None,
        workers=_workers(d.workers, ranks.cores),
        pin_memory=ranks.pins_memory,
    )


def _workers(workers: int, cores: int) -> int:
    """-1: one worker per core of this rank's share, at most 12."""
    return workers if workers >= 0 else min(12, cores)


def _announce(state: TrainState, kernel_line: str, failure: str, resumed: list[str]) -> None:
    """Write what runs into the folder, and say it."""
    path, recipe, engine = state.folder.path, state.recipe, state.model.engine
    samples = state.schedule["images"]
    if state.ranks.rank == 0:
        write_atomic(path / "recipe.yaml", dump_recipe(recipe))
        write_json(path / "ds_config.json", engine.config)
        facts = versions() | {
            "device": _device_name(state.ranks.device),
            "ranks": state.ranks.world,
            "kernels": kernels.implementation(),
            "precision": state.plan.precision,
            "data": str(state.data),
            "images": samples,
        }
        write_json(path / "versions.json", facts)
    lines = [
        f"previous run failed: {failure}" if failure else "",
        f"run: {path} ({recipe.name}, {recipe.encoder.arch})",
        *state.plan.describe(),
        untried_device(),
        engine.kind.describe(),
        kernel_line,
        f"image decoder: {state.loader.decoder}",
        f"data: {samples} images in {state.data}, {state.steps.per_epoch} steps per epoch",
        _sizes_line(state.steps),
        *_layer_lines(recipe.optimizer, len(state.model.objective.encoder.blocks)),
        *resumed,
    ]
    for line in filter(None, lines):
        state.watch.monitor.say(line)


def _sizes_line(steps: Steps) -> str:
    """The sizes of the images that a run trains on; nothing where they stay the same."""
    phases = [f"{side} pixels up to step {until}" for until, side in steps.sizes]
    return f"image sizes: {', '.join(phases)}" if phases else ""


def _layer_lines(optimizer: OptimizerRecipe, depth: int) -> list[str]:
    """How the learning rates of layers differ."""
    lines = []
    if optimizer.layer_decay < 1:
        first = layer_scale(optimizer.layer_decay, 0, depth)
        lines.append(
            f"layer_decay {optimizer.layer_decay:g}: the embeddings have {first:.3g} of the "
            "learning rate, each block more, what follows the blocks all of it"
        )
    if optimizer.layer_anneal < 1:
        lines.append(
            f"layer_anneal {optimizer.layer_anneal:g}: the embeddings begin at "
            f"{1 / optimizer.layer_anneal:.3g} of the learning rate and are at min_lr after "
            f"{optimizer.layer_anneal:.0%} of the steps behind the warm-up"
        )
    return lines


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({processor().name or 'unknown'})"

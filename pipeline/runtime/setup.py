"""Make everything that the training loop needs, in an order in which faults show early."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import kernels
from pipeline.config.ds_config import read_ds_config
from pipeline.config.plan import RunPlan, for_steps
from pipeline.config.recipe import Recipe, differing, load_recipe
from pipeline.config.schedules import size_steps
from pipeline.data.batch import LoaderConfig
from pipeline.data.loader import train_loader
from pipeline.data.randaugment import RandAugment
from pipeline.distributed import Ranks, agree, from_all
from pipeline.errors import UserError, naming
from pipeline.method.objective import Objective, build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.method.teacher import Teacher
from pipeline.runtime.announce import announce, show_mfu
from pipeline.runtime.checkpoint import CheckpointStore
from pipeline.runtime.engine import Engine
from pipeline.runtime.memory import explaining_memory
from pipeline.runtime.micro_batch import plan_that_fits
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.optimizers import optimizer_of
from pipeline.runtime.output import UNWRITABLE
from pipeline.runtime.preflight import check_installed, crop_of
from pipeline.runtime.probes import Probes
from pipeline.runtime.run_folder import default_output, export, load_checkpoint
from pipeline.runtime.run_lock import RunLock, claim
from pipeline.runtime.same_run import check_same, schedule_facts
from pipeline.runtime.settings import Settings, epoch_steps, total_steps
from pipeline.runtime.skipped_steps import SkippedSteps
from pipeline.runtime.trackers import Trackers
from pipeline.runtime.train_state import Model, RunFolder, Steps, TrainState, Watch
from pipeline.runtime.watchdog import Watchdog, last_failure
from pipeline.weights.start import start_from
from shard_tools.cli import counted
from shard_tools.manifest import read_manifest


def setup(settings: Settings, ranks: Ranks) -> TrainState:
    """Read and check the input, claim the run's folder, build, resume and announce (collective).

    Raises UserError: on the rank that finds the fault, or on all ranks where rank 0 checks for all.
    """
    manifest = read_manifest(settings.data)
    recipe = load_recipe(settings.recipe, settings.overrides, manifest.made.get("pixels"))
    ds_config = read_ds_config(settings.ds_config)
    per_epoch = epoch_steps(settings.data, manifest.samples, recipe)
    schedule = schedule_facts(manifest, recipe, per_epoch)
    _check_alike(settings, recipe, ds_config, schedule)
    plan = plan_that_fits(ds_config, recipe, ranks)
    optimizer_of(plan)  # raises where the optimizer does not run under the ZeRO stage
    agree(lambda: check_installed(recipe.monitor.log_to))
    total = total_steps(settings.data, manifest.samples, recipe)
    sizes = size_steps(recipe, total)
    plan = for_steps(plan, total)
    last = min(total, settings.max_steps or total)
    kernel_line = _choose_kernels(recipe, ranks)
    objective, teacher = build_objective(recipe)
    path: Path = agree(lambda: Path(settings.output or default_output(recipe)))
    claimed = _claim(path, recipe, schedule, settings)
    checkpoint, lines = claimed.checkpoint, [*claimed.warnings]
    if checkpoint is not None:
        recipe = _with_init_of(checkpoint, recipe)
    elif recipe.init.weights:
        teacher, started = _start_from_weights(objective, recipe)
        lines += started
    watchdog = Watchdog(plan.watchdog_seconds, ranks.rank, path)
    model = _build_model(objective, teacher, plan)
    saved = load_checkpoint(checkpoint, model.engine, teacher) if checkpoint else {}
    steps = Steps(saved.get("step", 0), last, total, per_epoch, sizes)
    if checkpoint is not None:
        saved_by = _saved_by(saved, plan, ranks)
        lines.append(f"resumes from {checkpoint}, at step {steps.first} of {last} ({saved_by})")
        if steps.first >= last:  # killed before the encoder was written, perhaps
            export(path, checkpoint, objective, recipe, steps.first)
    monitor = _open_monitor(path, recipe, steps, ranks.rank)
    state = TrainState(
        recipe, plan, ranks, settings.data, schedule, steps, model,
        train_loader(
            loader_config(recipe, plan, settings.data, ranks, sizes), ranks.rank, ranks.world,
            range(min(steps.first, last), last),
        ),
        RunFolder(
            path, CheckpointStore(path, recipe.monitor.keep_checkpoints), claimed.lock,
            _resumed_from(settings.resume) or saved.get("resumed_from", ""),
        ),
        Watch(
            monitor,
            Probes(recipe, settings.data, ranks.rank, ranks.world, plan.micro_batch),
            watchdog, SkippedSteps(recipe.optimizer.skip_limit),
        ),
    )  # fmt: skip
    # Saved is the sum over all ranks, which the first rank takes over.
    state.watch.nonfinite.total = saved.get("nonfinite_steps", 0)
    state.loader.bad_samples = 0 if ranks.rank else saved.get("bad_samples", 0)
    with naming(path, UNWRITABLE):
        announce(state, kernel_line, claimed.failure, lines)
        show_mfu(state, settings.peak_tflops)
    return state


def _choose_kernels(recipe: Recipe, ranks: Ranks) -> str:
    """Choose between kernels and references; this rank's line for the log (collective)."""
    line = kernels.use(recipe.kernels, ranks.device)
    if agree(lambda: line) != line:  # all wait for the slowest
        print(f"rank {ranks.rank} on {socket.gethostname()}: {line}", file=sys.stderr)
    return line


class _Claim(NamedTuple):
    """The run's folder, claimed. lock: on rank 0 only; checkpoint: to resume from; failure: why the
    previous run failed; warnings: what of the checkpoint is not as in this run."""

    lock: RunLock | None
    checkpoint: Path | None
    failure: str
    warnings: list[str]


def _claim(output: Path, recipe: Recipe, schedule: dict[str, Any], settings: Settings) -> _Claim:
    """Lock the folder and find the checkpoint, on rank 0 for all (collective)."""
    held: list[RunLock] = []

    def take() -> tuple[Path | None, str, list[str]]:
        lock, checkpoint = claim(output, settings.resume, settings.lock)
        held.append(lock)
        warnings = []
        if checkpoint is not None:
            warnings = check_same(checkpoint, recipe, schedule, settings.resume_changed)
        return checkpoint, last_failure(output, clear=True), warnings

    found = agree(take)
    return _Claim(held[0] if held else None, *found)


def _start_from_weights(objective: Objective, recipe: Recipe) -> tuple[Teacher | None, list[str]]:
    """Take the weights of recipe.init; the teacher, made from them, and lines for the log."""
    start = start_from(objective, recipe.init.weights, recipe.init.ema)
    return Teacher(objective) if recipe.teacher else None, start.lines(recipe.init.weights)


def _build_model(objective: Objective, teacher: Teacher | None, plan: RunPlan) -> Model:
    """The objective in its engine, and the teacher beside it."""
    with explaining_memory(plan, objective.recipe.encoder.image_size):
        engine = Engine(objective, parameter_groups(objective), plan)
        if teacher is not None:
            engine.adopt(teacher)
    return Model(objective, teacher, engine)


def _resumed_from(resume: str) -> str:
    """The full path that --resume names; "" where it names none."""
    return "" if resume in ("auto", "none") else str(Path(resume).resolve())


def _open_monitor(output: Path, recipe: Recipe, steps: Steps, rank: int) -> Monitor:
    """The monitor, which opens log.txt and metrics.jsonl, and the trackers of rank 0."""
    m = recipe.monitor
    with naming(output, UNWRITABLE):
        return Monitor(
            output, rank=rank, first=steps.first, total=steps.last, images=recipe.batch_size,
            log_steps=m.log_steps, trackers=_open_trackers(output, recipe, steps.first),
            sizes=steps.sizes,
        )  # fmt: skip


# What may differ from rank 0's: paths on a host, and what this rank alone has or does.
_OWN = ("recipe.init.weights", "recipe.monitor.held_out", "recipe.data.workers", "recipe.kernels",
        "recipe.name")  # fmt: skip


def _check_alike(
    settings: Settings, recipe: Recipe, ds_config: dict[str, Any], schedule: dict[str, Any]
) -> None:
    """UserError on every rank where the recipe, ds_config or data of one differ from rank 0's, such
    as a stale local copy (collective)."""
    mine: dict[str, Any] = {"ds_config": ds_config, "--max-steps": settings.max_steps}
    mine["recipe"] = recipe.model_dump(mode="json", by_alias=True)
    theirs, first = agree(lambda: (mine, schedule))
    changed = [line for line in differing(mine, theirs, _OWN) if "nvme_path" not in line]
    fault = ""
    if first["data"] != schedule["data"]:  # of which the recipe may take its mean and std
        fault = (
            f"{settings.data}: {schedule['images']} images, manifest {schedule['data'][:12]}, but "
            f"rank 0 has {first['images']} images, manifest {first['data'][:12]}: every host needs "
            "the same shards"
        )
    elif changed:
        fault = (
            f"not the settings of rank 0 ({'; '.join(changed)}): every rank needs the same recipe, "
            "ds_config and command line"
        )
    for rank, (host, text) in enumerate(from_all((socket.gethostname(), fault))):
        if text:
            raise UserError(f"rank {rank} on {host}: {text}")


def _saved_by(saved: dict, plan: RunPlan, ranks: Ranks) -> str:
    """For the log: how a checkpoint was saved, and whether its loss pooled another number of images
    than this run's."""
    text = f"saved by {counted(saved['ranks'], 'rank')} under ZeRO stage {saved['zero_stage']}"
    before, now = saved["negatives_batch"], ranks.world * plan.micro_batch
    if plan.pooled and before != now:
        text += f"; {plan.pooled} came from {before} images, now from {now}"
    return text


def _with_init_of(checkpoint: Path, recipe: Recipe) -> Recipe:
    """The recipe with the checkpoint's `init` where its own is empty: the run began from those
    weights, although the command that resumes it no longer names them."""
    if recipe.init.weights:
        return recipe
    return recipe.model_copy(update={"init": load_recipe(checkpoint / "recipe.yaml").init})


def _open_trackers(output: Path, recipe: Recipe, first: int) -> Trackers:
    """The trackers of the recipe on rank 0, none on the other ranks (collective)."""
    opened = [Trackers()]

    def start() -> None:
        settings = recipe.model_dump(mode="json", by_alias=True)
        opened[0] = Trackers(recipe.monitor.log_to, output, first, settings)

    agree(start)
    return opened[0]


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
    """Worker processes per rank; -1 stands for one per core of this rank, at most 12."""
    return workers if workers >= 0 else min(12, cores)

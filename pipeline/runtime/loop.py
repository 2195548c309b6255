"""The training loop, and what happens between its steps: checkpoints, probes, pictures."""

from __future__ import annotations

import socket
import sys
import time
from functools import partial
from typing import Any

from pipeline.config.recipe import Recipe, dump_recipe
from pipeline.config.schedules import ema_momentum, learning_rate
from pipeline.data.batch import Batch
from pipeline.data.crops import side_at
from pipeline.data.fixed import Fixed, fixed_images
from pipeline.distributed import StopSignal, agree, any_rank, lost_contact
from pipeline.errors import PREEMPTED, UserError, reachable, refuse
from pipeline.gpu_errors import cuda_fault, nccl_fault
from pipeline.method.pictures import draw
from pipeline.runtime import startup
from pipeline.runtime.checkpoint import SaveError
from pipeline.runtime.compiled import uncompiled
from pipeline.runtime.engine import init_ranks
from pipeline.runtime.memory import explaining_memory
from pipeline.runtime.run_folder import export, save_checkpoint, versions
from pipeline.runtime.run_lock import LostFolder
from pipeline.runtime.seeding import seed_all
from pipeline.runtime.settings import Settings
from pipeline.runtime.setup import setup
from pipeline.runtime.train_state import TrainState
from pipeline.runtime.watchdog import FIRST_PATIENCE, report_failure
from shard_tools.manifest import read_manifest


def pretrain(settings: Settings) -> int:
    """Join the ranks, set up, train; returns the exit code (see pipeline/pretrain.py)."""
    try:
        ranks = init_ranks()
    except UserError as error:
        return refuse(error)
    startup.done("ranks and fused ops")
    try:
        with reachable():
            run = setup(settings, ranks)
    except UserError as error:
        # Once per host, since a fault may be of one host only.
        who = f" (rank {ranks.rank} on {socket.gethostname()})" if ranks.rank else ""
        return refuse(error, who) if ranks.local_rank == 0 else 2
    except RuntimeError as error:
        fault = nccl_fault(error) or cuda_fault(error)
        if not fault and not lost_contact(error):
            raise
        who = f"rank {ranks.rank} on {socket.gethostname()}"
        print(f"error ({who}): {fault or 'lost contact with another rank'}", file=sys.stderr)
        return 1
    try:
        size = run.recipe.encoder.image_size
        with run.loader.explaining(), explaining_memory(run.plan, size):
            startup.done("model and data")
            with StopSignal() as stop:
                return train(run, stop, settings.verbose)
    except Exception as error:
        return report_failure(run.folder.path, ranks, run.watch.watchdog.where, error)
    finally:
        run.close()


def train(run: TrainState, stop: StopSignal, verbose: bool = False) -> int:
    """The loop: batch → T1, T2 → f → M → backward → step → EMA → monitor → checkpoint.

    verbose: log how long each phase until the first step took. Returns the exit code: 0, or
    PREEMPTED after a signal to any rank.
    """
    recipe, steps, device, m = run.recipe, run.steps, run.ranks.device, run.recipe.monitor
    objective, teacher, engine = run.model.objective, run.model.teacher, run.model.engine
    monitor, watchdog = run.watch.monitor, run.watch.watchdog
    shown = first_images(run.data, recipe)
    batches, begun, saving = iter(run.loader), time.perf_counter(), 0.0
    for step in range(steps.first, steps.last):
        rate = partial(learning_rate, recipe, step, steps.per_epoch)
        resized = resize(run, step)
        patience = FIRST_PATIENCE if step == steps.first or resized else 1
        for micro in range(run.plan.accumulation):
            watchdog.note(f"step {step + 1}, waiting for data", patience)
            waiting = time.perf_counter()
            batch = next(batches)
            monitor.waited(time.perf_counter() - waiting)
            watchdog.note(f"step {step + 1}, forward, backward and update", patience)
            # Whatever draws from global generators (dropout, say) is a function of the step too.
            seed_all(recipe.seed, step, micro, run.ranks.rank)
            loss, terms = engine.micro_step(
                rate if recipe.optimizer.by_layer else rate(),
                batch.image.to(device, non_blocking=True),
                batch.key.to(device, non_blocking=True),
                batch.epoch,
                teacher,
                None if batch.second is None else batch.second.to(device, non_blocking=True),
            )
            monitor.add(loss, terms, 1.0 / run.plan.accumulation)
        run.watch.nonfinite.note(step, engine.step_skipped)
        if teacher is not None:
            teacher.update(objective, ema_momentum(recipe, step, steps.total), engine.masters)
        watchdog.note(f"step {step + 1}, after the update", patience)
        values = metrics(run, step, rate(), batch)
        monitor.step(step, values, device)
        if verbose and step == steps.first:
            startup.done("first step")
            monitor.say(startup.report())
        probe(run, step + 1)
        if (step + 1) % m.picture_steps == 0 or step + 1 == steps.last:
            picture(run, step + 1, shown)
        stopping = any_rank(bool(stop.name)) and step + 1 < steps.last
        must = stopping or step + 1 == steps.last
        if must or (step + 1) % m.save_steps == 0:
            monitor.report(step, values, device)
            saving += save(run, step + 1, must)
        if stopping:
            signal_name = stop.name or "a signal to another rank"
            monitor.say(f"stopped by {signal_name}: saved at step {step + 1} of {steps.last}")
            return PREEMPTED
    share = 100 * saving / (time.perf_counter() - begun)
    if sentence := run.watch.nonfinite.at_end():
        monitor.say(f"warning: {sentence}")
    done = max(steps.first, steps.last)  # a checkpoint may be further than --max-steps
    monitor.say(f"done: step {done}; encoder in {run.folder.path / 'encoder'}")
    monitor.say(f"checkpointing took {saving:.1f} s ({share:.1f} % of wall time)")
    return 0


def metrics(run: TrainState, step: int, lr: float, batch: Batch) -> dict[str, Any]:
    """What the monitor logs beside the losses, after step `step` (0-based). What is collective or
    waits for the device is a function, called only for steps that are logged."""
    recipe, steps, model = run.recipe, run.steps, run.model
    engine, teacher = model.engine, model.teacher
    values: dict[str, Any] = {
        "lr": lr,
        "epoch": (step + 1) / steps.per_epoch,
        "grad_norm": engine.gradient_norm,
        "bad_samples": run.bad_samples,
        "nonfinite_steps": run.watch.nonfinite.total,
    }
    if recipe.optimizer.by_layer:
        values["lr_first_layer"] = engine.optimizer.param_groups[0]["lr"]
    if steps.sizes:
        values["image_size"] = batch.image.shape[1]
    if teacher is not None:
        values["ema"] = ema_momentum(recipe, step, steps.total)
        values["teacher_distance"] = partial(teacher.distance, model.objective, engine.masters)
    return values


def resize(run: TrainState, step: int) -> bool:
    """Tell engine and monitor the image size of a step (data.sizes); whether it is a new one."""
    sizes, first = run.steps.sizes, run.steps.first
    if not sizes:
        return False
    side = side_at(sizes, step)
    run.watch.monitor.set_image_size(side)
    if step > first and side == side_at(sizes, step - 1):
        return False
    run.watch.monitor.say(f"step {step + 1}: images of {side} × {side} pixels from here on")
    if step > first:
        run.model.engine.resize()
    return True


def save(run: TrainState, step: int, must: bool) -> float:
    """Write the checkpoint of `step` and export the encoder (collective); the seconds it took.

    must: raise SaveError if that fails, whatever monitor.on_disk_full says.
    """
    run.watch.watchdog.note(f"saving step {step}")
    begun, recipe, model = time.perf_counter(), run.recipe, run.model
    state = {
        "step": step,
        "ranks": run.ranks.world,
        "zero_stage": run.plan.stage,
        "precision": run.plan.precision,
        "negatives_batch": run.negatives_batch,
        "schedule": run.schedule,
        "resumed_from": run.folder.resumed_from,
        "bad_samples": run.bad_samples(),
        "nonfinite_steps": run.watch.nonfinite.total,
        "versions": versions(),
    }
    with run.watch.monitor.paused():
        keep_folder(run)
        try:
            checkpoint = save_checkpoint(
                run.folder.store, model.engine, model.teacher, dump_recipe(recipe), state
            )
            export(run.folder.path, checkpoint, model.objective, recipe, step)
        except SaveError as error:
            if must or recipe.monitor.on_disk_full == "stop":
                raise
            run.watch.monitor.say(
                f"warning: {error}; the run continues (monitor.on_disk_full: continue)"
            )
    return time.perf_counter() - begun


def keep_folder(run: TrainState) -> None:
    """Make and lock the run's folder again where it was removed or moved away (collective).
    LostFolder where another run has taken it meanwhile: both would save into it."""
    lock, monitor = run.folder.lock, run.watch.monitor
    try:
        gone = agree(lambda: lock is not None and lock.keep())
    except UserError as error:
        raise LostFolder(str(error)) from None
    if gone:
        monitor.reopen()
        monitor.say(
            f"warning: {run.folder.path}: the folder, or its lock, was removed or moved while this "
            "run wrote to it; it is locked again, and holds what is saved from here on"
        )


def probe(run: TrainState, step: int) -> None:
    """Run the probes that are due after `step` steps and log their metrics (collective)."""
    if run.watch.probes.due(step):
        with run.watch.monitor.paused(), uncompiled():
            encoder = run.model.objective.encoder
            found = run.watch.probes(step, encoder, run.ranks.device)
            run.watch.monitor.probed(step, found)


def picture(run: TrainState, step: int, fixed: Fixed) -> None:
    """Draw the run's fixed images with the weights after `step` steps (collective)."""
    device = run.ranks.device
    with run.watch.monitor.paused(), uncompiled():
        grid = draw(run.model.objective, fixed.image.to(device), fixed.sample.to(device))
        run.watch.monitor.picture(step, grid)


def first_images(data: str, recipe: Recipe) -> Fixed:
    """The first eight samples, centre-cropped to encoder.image_size: every picture of a run shows
    these at this size, also while it trains on smaller crops (data.sizes)."""
    manifest = read_manifest(data)
    first = range(min(8, manifest.samples))
    return fixed_images(manifest, first, recipe.encoder.image_size, recipe.data.on_error)

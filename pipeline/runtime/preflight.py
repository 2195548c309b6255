"""What can be seen to be wrong with a pretraining before anything is made. Without torch, so that
one rank alone says it at once; several ranks look together, as the run is set up."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.ds_config import open_ds_config
from pipeline.config.plan import check_stage, most_stage
from pipeline.config.planning import split_batch
from pipeline.config.recipe import ANY_PIXELS, Recipe, load_recipe
from pipeline.config.schedules import size_steps
from pipeline.data.crops import Crop
from pipeline.errors import UserError
from pipeline.method.checks import check_objective
from pipeline.runtime.checkpoint import STATE
from pipeline.runtime.output import check_output
from pipeline.runtime.run_lock import RunLock, find_checkpoint
from pipeline.runtime.same_run import check_same, schedule_facts
from pipeline.runtime.settings import Settings, epoch_steps, total_steps
from pipeline.weights.source import check_start
from shard_tools.manifest import Manifest, read_manifest

REFERENCES = 4  # training images per held-out image in the k-NN probe


def preflight(settings: Settings) -> None:
    """UserError for what a run on one rank would be refused for, as far as that can be seen."""
    recipe = load_recipe(settings.recipe, settings.overrides, ANY_PIXELS)
    check_recipe(recipe)
    manifest = read_manifest(settings.data)
    recipe = load_recipe(settings.recipe, settings.overrides, manifest.made.get("pixels"))
    per_epoch = epoch_steps(settings.data, manifest.samples, recipe)
    size_steps(recipe, total_steps(settings.data, manifest.samples, recipe))
    check_plan(open_ds_config(settings.ds_config), recipe)
    check_probes(recipe, settings.data)
    found = _checkpoint(settings, recipe, schedule_facts(manifest, recipe, per_epoch))
    if recipe.init.weights and found is None:
        check_start(recipe.init.weights, recipe.init.ema)


def check_recipe(recipe: Recipe) -> None:
    """UserError for a recipe that cannot be run anywhere, or lacks a package here."""
    check_objective(recipe)
    crop_of(recipe)
    check_installed(recipe.monitor.log_to)


def crop_of(recipe: Recipe) -> Crop:
    """The crop that training images get. UserError where it cannot be."""
    crop = recipe.data.crop
    return Crop(recipe.encoder.image_size, crop.scale, crop.ratio, crop.flip, crop.interpolation)


def check_installed(names: Sequence[str]) -> None:
    """UserError where a package of these trackers is missing."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(
                f"monitor.log_to: {name} is not installed: pip install {name}, or leave it out"
            )


def check_plan(config: dict[str, Any], recipe: Recipe) -> None:
    """UserError where a ds_config's stage does not suit the optimizer, or its micro-batch does not
    divide the batch of one rank."""
    kind, stage = recipe.optimizer.kind, config.get("zero_optimization", {}).get("stage", 0)
    check_stage(kind, stage, most_stage(kind))
    micro = config.get("train_micro_batch_size_per_gpu", "auto")
    if micro != "auto":
        split_batch(recipe.batch_size, recipe.data.partitions, 1, micro, recipe.encoder.patches)


def check_probes(recipe: Recipe, data: str, world: int = 1) -> None:
    """UserError where the probes of a recipe lack images or labels."""
    for folder, count in probe_sets(recipe, data):
        manifest, chosen = probe_samples(folder, count, world)
        if recipe.monitor.knn_steps and (manifest.rows(chosen)["label"] < 0).any():
            raise UserError(f"{folder}: monitor.knn_steps needs labels, which it does not have")


def probe_sets(recipe: Recipe, data: str) -> list[tuple[str, int]]:
    """(shards, images) that the probes look at: held-out ones, and with k-NN training ones."""
    m, sets = recipe.monitor, []
    if m.occlusion_steps or m.knn_steps:
        beside = os.path.join(os.path.dirname(data.rstrip("/")), "val")  # also of a URL
        sets.append((m.held_out or beside, m.images))
    if m.knn_steps:
        sets.append((data, REFERENCES * m.images))
    return sets


def probe_samples(folder: str | Path, count: int, world: int) -> tuple[Manifest, np.ndarray]:
    """`count` samples taken evenly from a shard folder, int64, equally many for every rank."""
    manifest = read_manifest(folder)
    share = min(count, manifest.samples) // world
    if share * world < 4:
        raise UserError(f"{folder}: {manifest.samples} images are too few for the probes")
    return manifest, np.linspace(0, manifest.samples - 1, share * world).astype(np.int64)


def _checkpoint(settings: Settings, recipe: Recipe, facts: dict[str, Any]) -> Path | None:
    """The checkpoint that the run would resume from. UserError where the folder cannot be used, or
    the checkpoint is of another run."""
    look, output = ("recipe.yaml", STATE), Path(settings.output or "runs")
    check_output(output)
    if not settings.output:  # a new folder
        here = settings.resume in ("auto", "none")
        found = None if here else find_checkpoint(output, settings.resume, look)
    else:
        if (output / "lock").exists():
            RunLock(output, settings.lock).release()
        found = find_checkpoint(output, settings.resume, look)
    if found is not None:
        check_same(found, recipe, facts, settings.resume_changed)
    return found

"""What a run says before its first step, in its log and in the files of its folder."""

from __future__ import annotations

import torch

from pipeline import kernels
from pipeline.config.recipe import dump_recipe
from pipeline.config.schema import OptimizerRecipe
from pipeline.distributed import untried_device
from pipeline.method.parameter_groups import layer_scale
from pipeline.processor import processor
from pipeline.runtime.mfu import Mfu, peak_of
from pipeline.runtime.run_folder import versions
from pipeline.runtime.train_state import Steps, TrainState
from shard_tools.atomic import write_atomic, write_json


def announce(state: TrainState, kernel_line: str, failure: str, resumed: list[str]) -> None:
    """Write recipe.yaml, ds_config.json and versions.json, and log what is about to run."""
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
    """The image sizes of data.sizes; "" where they stay the same."""
    phases = [f"{side} pixels up to step {until}" for until, side in steps.sizes]
    return f"image sizes: {', '.join(phases)}" if phases else ""


def _layer_lines(optimizer: OptimizerRecipe, depth: int) -> list[str]:
    """What layer_decay and layer_anneal do to the learning rates, where they are set."""
    lines = []
    if optimizer.layer_decay < 1:
        first = layer_scale(optimizer.layer_decay, 0, depth)
        lines.append(
            f"layer_decay {optimizer.layer_decay:g}: the embeddings have {first:.3g} of the "
            "learning rate, each block a larger share, everything after the blocks all of it"
        )
    if optimizer.layer_anneal < 1:
        lines.append(
            f"layer_anneal {optimizer.layer_anneal:g}: the embeddings begin at "
            f"{1 / optimizer.layer_anneal:.3g} of the learning rate and are at min_lr after "
            f"{optimizer.layer_anneal:.0%} of the steps after the warm-up"
        )
    return lines


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({processor().name or 'unknown'})"


def show_mfu(state: TrainState, given_tflops: float | None) -> None:
    """Let rank 0's monitor report the MFU, or log why it cannot."""
    monitor, ranks = state.watch.monitor, state.ranks
    peak, problem = peak_of(_device_name(ranks.device), state.plan.precision, given_tflops)
    if peak is None:
        monitor.say(problem)
    elif ranks.rank == 0:
        monitor.mfu = Mfu(
            state.folder.path / "recipe.yaml",
            peak * ranks.world,
            micro_batch=state.plan.micro_batch,
            ranks=ranks.world,
        )

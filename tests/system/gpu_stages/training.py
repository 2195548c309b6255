"""Every recipe under every ZeRO stage against fp32."""

from __future__ import annotations

import statistics
from typing import Any

from gpu_stages.common import Fault, Where, join, release, workers
from pipeline import kernels
from pipeline.config.ds_config import plan_recipe
from pipeline.config.recipe import RECIPES, Recipe
from pipeline.config.schedules import ema_momentum, learning_rate
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime import engine as engines

BATCH, STEPS, STAGES = 32, 20, (0, 1, 2, 3)
PROCESSES = 3  # that share the recipes, and the GPU
# Mean distance of a bf16 curve to fp32's, as a share of the loss: several times what
# make bench-precision finds, far below what a lost scale or a wrong mask does.
MOST = 0.02


def table() -> list[str]:
    """Every bundled recipe of the paper; the demo's are the same methods, smaller."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [name for name in names if not name.startswith("demo_")]


def precision(stage: int, bf16: bool) -> dict[str, Any]:
    """Sections of a ds_config: bf16 weights where DeepSpeed has them, autocast under stage 0."""
    section = "bf16" if stage else "torch_autocast"
    return {section: {"enabled": True}} if bf16 else {}


def curve(recipe: Recipe, stage: int, bf16: bool, where: Where, steps: int) -> list[float]:
    """Losses of the first steps of a run, on the same images in every one."""
    kernels.use("auto", where.device)
    config = {
        "train_micro_batch_size_per_gpu": recipe.batch_size // 2,  # sums of gradients too
        "zero_optimization": {"stage": stage},
    } | precision(stage, bf16)
    objective, teacher = build_objective(recipe)
    engine = engines.Engine(objective, parameter_groups(objective), plan_recipe(config, recipe, 1))
    if teacher is not None:
        teacher.to(where.device)
    losses = []
    try:
        for step in range(steps):
            image = where.images(recipe, recipe.batch_size, seed=step % 4)
            crop = image.flip(2).contiguous() if recipe.views.second == "crop" else None
            total = 0.0
            for part in (slice(None, len(image) // 2), slice(len(image) // 2, None)):
                sample = where.numbers(step, recipe.batch_size)[part]
                loss, _ = engine.micro_step(
                    learning_rate(recipe, step, steps), image[part], sample, 0, teacher,
                    None if crop is None else crop[part],
                )  # fmt: skip
                total += float(loss) / 2
            if teacher is not None:
                teacher.update(objective, ema_momentum(recipe, step, steps), engine.masters)
            losses.append(total)
    finally:
        engine.destroy()
    return losses


def shallow(where: Where, name: str) -> Recipe:
    """A recipe at its own width and image size, but two blocks deep, a schedule of one epoch."""
    overrides = [f"batch_size={BATCH}", "data.partitions=4", "encoder.options={depth: 2}",
                 "optimizer.epochs=1", "optimizer.warmup_epochs=0.25"]  # fmt: skip
    if not name.startswith(("cmae", "mocov3")):
        overrides.append("measure.decoder={width: 512, depth: 2, heads: 16}")
    return where.recipe(name, *overrides)


def apart(losses: list[float], exact: list[float]) -> float:
    """Mean distance of two curves as a share of the second; nan where a loss is not finite."""
    return statistics.fmean(
        abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, exact, strict=True)
    )


def recipes(where: Where) -> dict[str, Any]:
    """Every recipe: 20 bf16 steps under ZeRO 0 to 3 against fp32's curve under stage 0.

    Real widths and images, two blocks deep, two micro-batches a step. In a rehearsal two
    steps, and the stages by turns.
    """
    steps = 2 if where.tiny else STEPS
    found: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    stages = {name: (STAGES[n % 4],) if where.tiny else STAGES for n, name in enumerate(table())}
    with workers(1 if where.tiny else PROCESSES) as pool:
        waiting = [pool.submit(one_recipe, where, name, stages[name], steps) for name in stages]
        for name, future in zip(stages, waiting, strict=True):
            row = found[name] = future.result()
            for stage, curve_ in row["bf16"].items():
                losses, distance = curve_["loss"], curve_["distance"]
                if not distance <= MOST:  # nan too
                    wrong.append(f"{name} under ZeRO-{stage} is {distance:.2%} off fp32")
                print(f"{name}, ZeRO-{stage}: {losses[0]:.4f} -> {losses[-1]:.4f}, "
                      f"{distance:.3%} off fp32", flush=True)  # fmt: skip
            where.note({"curves": found, "runs": sum(len(r["bf16"]) for r in found.values())})
    if wrong:
        raise Fault("; ".join(wrong))
    return where.found(where.stage) | {"allowed": MOST}


def one_recipe(where: Where, name: str, stages: tuple[int, ...], steps: int) -> dict[str, Any]:
    """A recipe's losses in fp32, and in bf16 under each stage with their distance."""
    join()
    recipe = shallow(where, name)
    exact = curve(recipe, 0, False, where, steps)
    row: dict[str, Any] = {"fp32": exact, "bf16": {}}
    for stage in stages:
        release(where.device)
        losses = curve(recipe, stage, True, where, steps)
        row["bf16"][str(stage)] = {"loss": losses, "distance": apart(losses, exact)}
    return row

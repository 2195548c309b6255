"""Every recipe under every ZeRO stage against fp32."""

from __future__ import annotations

import statistics
import traceback
from typing import Any

from gpu_stages.common import Fault, Where, join, release, workers
from pipeline import kernels
from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import RECIPES, Recipe
from pipeline.config.schedules import ema_momentum, learning_rate
from pipeline.gpu_errors import one_line
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime import engine as engines

BATCH, STEPS = 32, 20
PROCESSES = 4  # that share the recipes, and the GPU
# Column → ds_config, and how far its curve may be from fp32's: mean distance as a share of the
# loss. Several times what make bench-precision finds, far below what a lost scale or a wrong mask
# does; of bf16 weights more, since a gain of 1 moves by 0.004 or not at all in so few steps.
AUTOCAST = {"torch_autocast": {"enabled": True}}
BF16 = {"bf16": {"enabled": True}}
MOST, MOST_BF16 = 0.01, 0.1
COLUMNS: dict[str, tuple[dict[str, Any], float]] = {
    **{f"ZeRO-{n}": (AUTOCAST | {"zero_optimization": {"stage": n}}, MOST) for n in range(4)},
    "graphs": (AUTOCAST | {"zero_optimization": {"stage": 2}, "cuda_graphs": True}, MOST),
    "bf16": (BF16 | {"zero_optimization": {"stage": 2}}, MOST_BF16),
    "compiled, graphs": (
        AUTOCAST | {"zero_optimization": {"stage": 2}, "compile": True, "cuda_graphs": True},
        MOST,
    ),
}
# Columns that replay what another launches, and how far they may be from it: sums that are not
# ordered.
EAGER, SAME = {"graphs": "ZeRO-2"}, 1e-3
PAPER = ("mae", "rmae", "cmae")  # which run every column


def table() -> list[str]:
    """Every bundled recipe of the paper; the demo's are the same methods, smaller."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [name for name in names if not name.startswith("demo_")]


def curve(recipe: Recipe, config: dict[str, Any], where: Where, steps: int) -> list[float]:
    """Losses of the first steps of a run, on the same images in every one, over two epochs."""
    kernels.use("auto", where.device)
    # Two micro-batches: sums of gradients too.
    config = config | {"train_micro_batch_size_per_gpu": recipe.batch_size // 2}
    objective, teacher = build_objective(recipe)
    engine = engines.Engine(objective, parameter_groups(objective), plan_recipe(config, recipe, 1))
    if teacher is not None:
        engine.adopt(teacher)
    losses = []
    try:
        for step in range(steps):
            image = where.images(recipe, recipe.batch_size, seed=step % 4)
            crop = image.flip(2).contiguous() if recipe.views.second == "crop" else None
            total = 0.0
            for part in (slice(None, len(image) // 2), slice(len(image) // 2, None)):
                sample = where.numbers(step, recipe.batch_size)[part]
                loss, _ = engine.micro_step(
                    learning_rate(recipe, step, steps), image[part], sample, 2 * step // steps,
                    teacher, None if crop is None else crop[part],
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


def columns(where: Where, number: int, name: str) -> list[str]:
    """The columns of COLUMNS that recipe `name` runs; in a rehearsal the stages by turns."""
    if where.tiny:
        more = [] if where.device == "cpu" else ["ZeRO-2", "graphs"]
        return list(dict.fromkeys([f"ZeRO-{number % 4}", *more]))
    long = ("bf16", "compiled, graphs")
    return [c for c in COLUMNS if c not in long or (name in PAPER and where.gpu)]


def recipes(where: Where) -> dict[str, Any]:
    """Every recipe: 20 steps under ZeRO 0 to 3, in bf16, as CUDA graphs, compiled, against fp32.

    Real widths and images, two blocks deep, two micro-batches a step. In a rehearsal two
    steps, and the stages by turns.
    """
    steps = 2 if where.tiny else STEPS
    found: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    with workers(1 if where.tiny else PROCESSES) as pool:
        waiting = {
            name: pool.submit(one_recipe, where, name, columns(where, number, name), steps)
            for number, name in enumerate(table())
        }
        for name, future in waiting.items():
            try:
                row = found[name] = future.result()
            except Exception as error:  # the other recipes are run all the same
                traceback.print_exception(error)
                wrong.append(f"{name}: {one_line(error)}")
                continue
            for column, one in row["columns"].items():
                losses, distance = one["loss"], one["distance"]
                if not distance <= COLUMNS[column][1]:  # nan too
                    wrong.append(f"{name}, {column}: {distance:.2%} off fp32")
                if "same" in one and not one["same"] <= SAME:
                    wrong.append(f"{name}, {column}: {one['same']:.2%} off the eager steps")
                print(f"{name}, {column}: {losses[0]:.4f} -> {losses[-1]:.4f}, "
                      f"{distance:.3%} off fp32", flush=True)  # fmt: skip
            where.note({"curves": found})
    if wrong:
        raise Fault("; ".join(wrong))
    return where.found(where.stage)


def one_recipe(where: Where, name: str, columns: list[str], steps: int) -> dict[str, Any]:
    """A recipe's losses in fp32, and in each column with their distance."""
    join()
    recipe = shallow(where, name)
    exact = curve(recipe, {}, where, steps)
    row: dict[str, Any] = {"fp32": exact, "columns": {}}
    for column in columns:
        release(where.device)
        losses = curve(recipe, COLUMNS[column][0], where, steps)
        row["columns"][column] = {"loss": losses, "distance": apart(losses, exact)}
        if eager := EAGER.get(column):
            same = apart(losses, row["columns"][eager]["loss"])
            row["columns"][column]["same"] = same
    return row

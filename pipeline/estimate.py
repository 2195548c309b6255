"""What a recipe will need on a cluster, before any of it is bought: memory per GPU by ZeRO stage,
bytes sent per step, FLOPs per step, hours, and whether GPU, host or loader sets the pace.

    python pipeline/estimate.py --recipe pipeline/recipes/rmae.yaml --gpus 64 --gpu-memory 80

FLOPs and kept activations come from a dry run of the recipe's own step on tensors without data;
weights, gradients and optimizer state from the formulas of ZeRO (Rajbhandari et al. 2020, Sec. 5
and 7) with DeepSpeed's padding. Not counted: the CUDA context (about 1 GB), what the allocator
wastes and what a step needs only for a moment; a margin of 10 % is left for them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pipeline.command import early, run_main
from pipeline.config.peaks import PEAKS
from pipeline.config.plan import check_stage, most_stage, stage_with_graphs
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.config.schedules import size_steps
from pipeline.cost.feeding import Feeding
from pipeline.cost.micro_batch import (
    MARGIN,
    PlanError,
    fits,
    largest_that_fits,
    split,
    stages_under,
)
from pipeline.cost.options import parse_args
from pipeline.cost.table import table
from pipeline.errors import UserError, naming, refuse
from pipeline.method.checks import check_objective
from pipeline.runtime.settings import total_steps
from shard_tools.atomic import check_writable, write_json


def check_split(recipe: Recipe, args: argparse.Namespace) -> None:
    """UserError where a batch cannot be split as the command line says."""
    sizes = split(recipe, args.gpus)
    if args.micro_batch and args.micro_batch not in sizes:
        raise PlanError(f"--micro-batch {args.micro_batch}: must be one of {sizes}")


def check_fit(recipe: Recipe, args: argparse.Namespace) -> None:
    """UserError where the engine refuses the stage of --fit in the precision, or the optimizer."""
    kind = recipe.optimizer.kind
    check_stage(kind, args.fit, most_stage(kind))
    if args.fit not in (stages := stages_under(args.precision)):
        raise PlanError(
            f"--fit {args.fit}: ZeRO {args.fit} does not run in --precision {args.precision}, "
            f"but {', '.join(map(str, stages))} do"
        )


def steps_of(recipe: Recipe, args: argparse.Namespace) -> int:
    """Steps of the run. UserError where it, or a phase of data.sizes, has none."""
    total = total_steps(f"--images {args.images}", args.images, recipe)
    size_steps(recipe, total)
    return total


def check(args: argparse.Namespace) -> None:
    """UserError for what is seen to be wrong before anything is built."""
    recipe = load_recipe(args.recipe, args.overrides)
    check_objective(recipe)
    check_split(recipe, args)
    if args.fit is not None:
        check_fit(recipe, args)
    elif not args.flops:
        steps_of(recipe, args)
    if args.json:
        check_writable(args.json)


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(parse_args, check)

from pipeline.config.planning import MOST_IMAGES
from pipeline.cost.dry_run import Work, flops_of_phases, meta_objective, scaled
from pipeline.cost.launches import GRAPH_LAUNCHES, measured_launch_ms
from pipeline.cost.stepping import Stepping
from pipeline.cost.zero import Memory, graph_copies, memory, traffic
from pipeline.method.objective import Objective
from pipeline.method.teacher import Teacher


def micro_batch_of(recipe: Recipe, args: argparse.Namespace) -> int:
    """The micro-batch of the command line, or what "auto" takes where it does not follow the
    device."""
    sizes = split(recipe, args.gpus)
    return args.micro_batch or next((n for n in sizes if n <= MOST_IMAGES), sizes[-1])


def flops_lines(recipe: Recipe, args: argparse.Namespace) -> str:
    """What --flops prints: FLOPs of an image; under data.sizes, where that is the mean of the run,
    also a line for every size: its side and its FLOPs."""
    found = flops_of_phases(recipe, micro_batch_of(recipe, args), args.gpus)
    sizes = dict(zip((side for _, side in recipe.data.sizes), (n for _, n in found), strict=False))
    mean = sum(share * flops for share, flops in found)
    return "\n".join([f"{mean}", *(f"{side} {flops}" for side, flops in sizes.items())])


@dataclass(frozen=True)
class Planner:
    """What the rows of all ZeRO stages share: the recipe and command line, its objective and
    teacher on the meta device, the optimizer's step and the work by micro-batch."""

    recipe: Recipe
    args: argparse.Namespace
    objective: Objective
    teacher: Teacher | None
    stepping: Stepping
    work_of: Callable[[int], Work]

    @property
    def per_rank(self) -> int:
        return self.recipe.batch_size // self.args.gpus

    @cached_property
    def launch_ms(self) -> float:
        """Host ms per launch."""
        return self.args.launch_ms or measured_launch_ms()

    @cached_property
    def mean(self) -> float:
        """FLOPs of the mean step over those of the full image size (data.sizes)."""
        if not self.recipe.data.sizes:
            return 1.0
        micro = micro_batch_of(self.recipe, self.args)
        found = flops_of_phases(self.recipe, micro, self.args.gpus)
        return sum(share * flops for share, flops in found) / found[-1][1]

    def micro_batches(self) -> list[int]:
        """Those to choose from: the one of the command line, or what "auto" takes."""
        # With negatives or batch norm over the micro-batch it does not follow the device.
        if self.args.micro_batch or self.recipe.measure.exchanges:
            return [micro_batch_of(self.recipe, self.args)]
        return split(self.recipe, self.args.gpus)

    def under(self, stage: int) -> tuple[bool, int]:
        """Whether a micro-batch is a CUDA graph under a stage, and the stage that DeepSpeed has."""
        captured = graphs(stage, self.args, self.recipe)
        return captured, stage_with_graphs(stage, self.args.gpus) if captured else stage

    def fitting(self, stage: int, sizes: list[int]) -> tuple[int, Memory]:
        """The largest of these micro-batches that fits in a GPU under a stage, else the smallest;
        and its bytes per rank."""
        args, (captured, run_as) = self.args, self.under(stage)

        def need(n: int) -> Memory:
            copies = graph_copies(self.per_rank // n) if captured else 0
            return memory(
                self.objective, self.teacher, self.work_of(n), run_as, args.gpus, args.precision,
                copies,
            )  # fmt: skip

        needs = {n: need(n) for n in sizes}
        totals = {n: one.total for n, one in needs.items()}
        micro = largest_that_fits(totals, args.gpu_memory * 1e9)
        return micro, needs[micro]

    def feeding(self, micro: int, run_as: int, captured: bool) -> Feeding:
        """What a step asks of GPU, host and loader."""
        work, accumulation = self.work_of(micro), self.per_rank // micro
        own, launches = self.stepping, GRAPH_LAUNCHES if captured else work.launches
        flops = self.mean * work.flops * accumulation + own.flops(run_as, self.args.gpus)
        peak = PEAKS[self.args.gpu]["fp32" if self.args.precision == "fp32" else "bf16"] * 1e12
        return Feeding(
            gpu=flops / (peak * self.args.utilisation),
            launches=launches * accumulation + own.launches(run_as, self.args.gpus),
            launch_ms=self.launch_ms,
            images=self.per_rank * (2 if self.recipe.views.second == "crop" else 1),
            core_images=self.args.core_images,
            cores=self.args.cores,
        )

    def row(self, stage: int) -> dict[str, Any]:
        """The plan under a stage, with the largest micro-batch that fits."""
        args, gpus = self.args, self.args.gpus
        captured, run_as = self.under(stage)
        micro, need = self.fitting(stage, self.micro_batches())
        accumulation = self.per_rank // micro
        sent = traffic(
            self.objective, self.teacher, self.work_of(micro), run_as, gpus, accumulation,
            args.precision,
        )  # fmt: skip
        feeding = self.feeding(micro, run_as, captured)
        return (
            {"stage": stage, "run_as": run_as, "micro_batch": micro, "accumulation": accumulation}
            | {f"{name}_gb": round(n / 1e9, 3) for name, n in asdict(need).items()}
            | {
                "memory_gb": round(need.total / 1e9, 3),
                "fits": fits(need.total, args.gpu_memory * 1e9),
                "sent_gb_per_step": round(sent / 1e9, 3),
                "launches": feeding.launches,
                "gpu_ms": round(1e3 * feeding.gpu, 3),
                "host_ms": round(1e3 * feeding.host, 3),
                "loader_ms": round(1e3 * feeding.loader, 3),
                "bound": feeding.bound,
                "cores_needed": feeding.cores_needed,
                "step_ms": round(1e3 * feeding.seconds, 3),
            }
        )


def make_planner(recipe: Recipe, args: argparse.Namespace) -> Planner:
    """The planner of a recipe and a command line. UserError where they do not go together."""
    objective, teacher = meta_objective(recipe)
    check_split(recipe, args)
    work_of = scaled(recipe, args.precision, args.checkpointing, args.gpus)
    return Planner(recipe, args, objective, teacher, Stepping(objective), work_of)


def predict(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """The plan: one row per ZeRO stage, with the largest micro-batch that fits, and the time under
    the recommended stage, of the slowest of GPU, host and loader.

    Under data.sizes memory and launches are of the full size, FLOPs and times of the mean step.
    """
    planner = make_planner(recipe, args)
    total = steps_of(recipe, args)
    rows = [planner.row(stage) for stage in stages_under(args.precision, recipe.optimizer.kind)]
    stage = recommended(rows)
    row = next((row for row in rows if row["stage"] == stage), rows[0])
    work = planner.work_of(row["micro_batch"])
    flops = round(planner.mean * work.flops * row["accumulation"] * args.gpus)
    trained = (p.numel() for p in planner.objective.parameters() if p.requires_grad)
    return {
        "recipe": recipe.name,
        "sizes": recipe.data.sizes,
        "trained_parameters": sum(trained),
        "gpus": args.gpus,
        "gpu": args.gpu,
        "gpu_memory_gb": args.gpu_memory,
        "precision": args.precision,
        "flops_per_step": flops,
        "steps": total,
        "hours": hours(total, row["step_ms"]),
        "gpu_bound_hours": hours(total, row["gpu_ms"]),
        "bound": row["bound"],
        "utilisation": args.utilisation,
        "launch_ms": round(planner.launch_ms, 5),
        "cores": args.cores,
        "core_images": args.core_images,
        "stages": rows,
        "recommended_stage": stage,
    }


def hours(steps: int, milliseconds: float) -> float:
    """Of a run whose steps take so long, to two digits after the point."""
    return round(steps * milliseconds / 3.6e6, 2)


def fit(recipe: Recipe, args: argparse.Namespace) -> int:
    """The micro-batch that --fit prints. Where none fits, the smallest, and stderr says so: the run
    that asked may still have room, since memory offloaded to the host is counted here too."""
    check_fit(recipe, args)
    images, need = make_planner(recipe, args).fitting(args.fit, split(recipe, args.gpus))
    if not fits(need.total, args.gpu_memory * 1e9):
        print(
            f"warning: no micro-batch fits --gpu-memory {args.gpu_memory:g} under ZeRO {args.fit}: "
            f"one of {images} needs {need.total / 1e9:.2f} GB, and {MARGIN:.0%} must stay free",
            file=sys.stderr,
        )
    return images


def graphs(stage: int, args: argparse.Namespace, recipe: Recipe) -> bool:
    """Whether cuda_graphs "auto" of the ds_config comes to true (config/plan.py)."""
    if args.no_graphs or args.checkpointing or (recipe.measure.exchanges and args.gpus > 1):
        return False
    return args.gpus == 1 or (stage < 3 and args.precision != "bf16-fp32-grads")


def recommended(rows: list[dict[str, Any]]) -> int | None:
    """The stage to run under: the lowest from 1 up that fits; None where none does.

    Stage 1 costs the host least (docs/step.md) and sends no more than any other; 0 has no bf16 as
    shipped.
    """
    return next((row["stage"] for row in rows if row["stage"] and row["fits"]), None)


def main(argv: list[str] | None = None) -> int:
    """Print the plan; 0, or 2 for bad input."""
    args = parse_args(argv)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.flops:
            check_split(recipe, args)
            print(flops_lines(recipe, args))
            return 0
        if args.fit is not None:
            print(fit(recipe, args))
            return 0
        plan = predict(recipe, args)
        print(table(plan))
        if args.json:
            with naming(args.json, "cannot be written"):
                write_json(args.json, plan)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    run_main(main)

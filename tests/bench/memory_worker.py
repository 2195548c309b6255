"""Bytes of weights, gradients and optimizer state on every rank, by ZeRO stage, beside the formula.

    deepspeed --num_accelerators 4 tests/bench/memory_worker.py OUTPUT.json [--recipe FILE]

Counted where DeepSpeed keeps them: distinct storages, after a backward and after a step. Used by
test_plan.py on a tiny model; `make bench-memory` runs it for ViT-S on 1, 2 and 4 ranks.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from tiny import tiny_recipe
from torch import Tensor

from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.cost.dry_run import Work
from pipeline.cost.zero import memory
from pipeline.distributed import barrier, close
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.engine import Engine, init_ranks

PARTS = ("weights", "gradients", "optimizer")
WAYS = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16-fp32-grads": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    },
}


def stored(tensors: list[Tensor]) -> int:
    """Bytes of the distinct tensors."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def gradients(engine: Engine) -> list[Tensor]:
    """What is kept of the gradients between two micro-batches of a step."""
    if engine.flat is not None and engine.flat.sums:
        return [*engine.flat.sums.values()]
    if engine.flat is not None or engine.stage == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    if engine.stage == 3:
        return [engine.optimizer.grad_partitions_flat_buffer]
    averaged = engine.optimizer.averaged_gradients.values()
    if compact := [g.flat_partition for g in averaged if hasattr(g, "flat_partition")]:
        return compact
    return [t for group in engine.optimizer.all_grad_tensors.values() for t in group]


def weights(engine: Engine) -> list[Tensor]:
    stage3 = engine.stage == 3
    return [p.ds_tensor if stage3 else p.data for p in engine.module.parameters()]


def optimizer_state(engine: Engine) -> list[Tensor]:
    """Moments, and the fp32 weights that the optimizer steps where they are not the model's."""
    inner = engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer
    state = [t for s in inner.state.values() for t in s.values() if isinstance(t, Tensor)]
    mine = [t for t in state if t.dim()]  # not the step counters
    if engine.stage in (1, 2):
        mine += engine.optimizer.single_partition_of_fp32_groups
    if engine.stage == 3:
        mine += engine.optimizer.fp32_partitioned_groups_flat
    return mine


def measure(
    recipe: Recipe, stage: int, world: int, rank: int, precision: str = "fp32"
) -> dict[str, dict[str, int]]:
    """{part: {measured, predicted}} in bytes on this rank."""
    micro = recipe.batch_size // world // 2
    config = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage}}
    config |= WAYS[precision]
    objective, teacher = build_objective(recipe)
    groups = parameter_groups(objective)
    predicted = memory(objective, teacher, Work(micro, 0, 0, 0), stage, world, precision)
    engine = Engine(objective, groups, plan_recipe(config, recipe, world))
    side = recipe.encoder.image_size
    image = torch.zeros(micro, side, side, 3, dtype=torch.uint8)
    sample = torch.arange(micro) + rank * micro
    found = {}
    for micro in range(4):  # two steps
        loss, _ = engine.engine(image, sample, 0, teacher)
        engine.engine.backward(loss)
        if micro == 2:
            found["gradients"] = stored(gradients(engine))
        engine.engine.step()
    found |= {"weights": stored(weights(engine)), "optimizer": stored(optimizer_state(engine))}
    engine.destroy()
    return {p: {"measured": found[p], "predicted": asdict(predicted)[p]} for p in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", type=Path, help="default: a tiny R-MAE")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    ranks = init_ranks()
    recipe = load_recipe(args.recipe, args.overrides) if args.recipe else tiny_recipe("rmae")
    rows = {str(stage): measure(recipe, stage, ranks.world, ranks.rank) for stage in range(4)}
    for precision in list(WAYS)[1:] * (not args.recipe):
        for stage in (2, 3):
            row = measure(recipe, stage, ranks.world, ranks.rank, precision)
            rows[f"{stage}, {precision}"] = row
    for stage in () if args.recipe else range(3):
        muon = tiny_recipe("rmae", "optimizer.kind=muon")
        rows[f"{stage}, muon"] = measure(muon, stage, ranks.world, ranks.rank)
    everyone: list = [None] * ranks.world
    torch.distributed.all_gather_object(everyone, rows)
    if ranks.rank == 0:
        args.output.write_text(json.dumps(everyone))
    barrier()
    close()


if __name__ == "__main__":
    main()

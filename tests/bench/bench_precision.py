"""How far from fp32 a run in bf16 ends up: the loss curves of tiny ViTs in each way of bf16.

    make bench-precision [PRECISION="--seeds 3 --steps 300"]

Photographs of --data, one rank, two micro-batches per step, the same batches, masks and initial
weights in every way; ZeRO stage 2. Per recipe and way, over the seeds: the mean and the largest
distance of the loss to fp32's at the same step, in percent of it, the distance of the last tenth of
the curve (with its sign), and the relative error of the first step's gradient. The last line is
JSON.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import RECIPES, Recipe, load_recipe
from pipeline.config.schedules import ema_momentum, learning_rate
from pipeline.data.fixed import fixed_images
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.seeding import seed_all
from shard_tools.manifest import read_manifest

BATCH, MICRO = 32, 16
TINY = [
    "encoder.arch=vit_tiny_patch16_224", "encoder.image_size=32", f"batch_size={BATCH}",
    "encoder.options={patch_size: 8, embed_dim: 64, depth: 4, num_heads: 2}",
    "data.partitions=8", "optimizer.epochs=1", "optimizer.warmup_epochs=0.1",
    "optimizer.base_lr=8e-3", "views.jitter.where=none",
]  # fmt: skip
PART = {
    "rmae": "measure.decoder={width: 32, depth: 2, heads: 2}",
    "cmae": "measure.heads={hidden: 128, out: 64}",
}
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, fp32 gradients": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    },
}


@dataclass(frozen=True)
class Curve:
    """Losses [steps] of one run, and the gradient of its first step, flat, fp32."""

    loss: Tensor
    gradient: Tensor


def train(recipe: Recipe, way: str, pool: Tensor, seed: int, steps: int) -> Curve:
    """One run; everything that is drawn depends on the seed alone."""
    seed_all(seed)
    config = WAYS[way] | {
        "train_micro_batch_size_per_gpu": MICRO,
        "zero_optimization": {"stage": 2},
    }
    objective, teacher = build_objective(recipe)
    engine = Engine(objective, parameter_groups(objective), plan_recipe(config, recipe, 1))
    draws = torch.Generator().manual_seed(seed)
    losses, gradient = [], torch.zeros(0)
    for step in range(steps):
        sample = torch.randint(0, len(pool), (BATCH,), generator=draws)
        lr, total = learning_rate(recipe, step, steps), 0.0
        for part in sample.split(MICRO):
            loss, _ = engine.engine(pool[part], part, step, teacher, None)
            engine.engine.backward(loss)
            if step == 0 and engine.engine.is_gradient_accumulation_boundary():
                parts = engine.optimizer.averaged_gradients.values()
                gradient = torch.cat([g.float().flatten() for part in parts for g in part])
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            engine.engine.step()
            total += loss.item() * MICRO / BATCH
        if teacher is not None:
            teacher.update(objective, ema_momentum(recipe, step, steps), engine.masters)
        losses.append(total)
    engine.destroy()
    return Curve(torch.tensor(losses, dtype=torch.float64), gradient)


def distances(curve: Curve, exact: Curve) -> dict[str, float]:
    """In percent: of the loss at each step, and of the first gradient's norm."""
    apart = (curve.loss - exact.loss) / exact.loss * 100
    error = (curve.gradient - exact.gradient).norm() / exact.gradient.norm() * 100
    return {
        "mean": float(apart.abs().mean()),
        "largest": float(apart.abs().max()),
        "end": float(apart[-max(1, len(apart) // 10) :].mean()),
        "gradient": float(error),
    }


def compare(name: str, pool: Tensor, seeds: int, steps: int) -> dict[str, dict[str, float]]:
    """Way → distances to fp32, means over the seeds (the largest is the largest of all)."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*TINY, PART[name]])
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS if way != "fp32"}
    for seed in range(seeds):
        exact = train(recipe, "fp32", pool, seed, steps)
        print(f"{name}, seed {seed}: fp32 loss {exact.loss[0]:.4f} -> {exact.loss[-1]:.4f}")
        for way, rows in found.items():
            rows.append(distances(train(recipe, way, pool, seed, steps), exact))
            print(f"  {way}: {rows[-1]['mean']:.3f} %", flush=True)
    return {
        way: {
            key: (max if key == "largest" else statistics.fmean)(row[key] for row in rows)
            for key in rows[0]
        }
        for way, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/shards/train", help="shards of photographs")
    parser.add_argument("--recipes", nargs="+", choices=PART, default=[*PART])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    init_ranks()
    manifest = read_manifest(args.data)
    pool = fixed_images(manifest, range(min(512, manifest.samples)), 32).image
    results = {name: compare(name, pool, args.seeds, args.steps) for name in args.recipes}
    print(
        f"\ndistance to fp32 in %, {args.seeds} seeds, {args.steps} steps, {len(pool)} photographs"
    )
    print(f"{'recipe':8}{'way':24}{'mean':>9}{'largest':>9}{'end':>9}{'gradient':>10}")
    for name, ways in results.items():
        for way, row in ways.items():
            cells = f"{row['mean']:9.3f}{row['largest']:9.3f}{row['end']:+9.3f}"
            print(f"{name:8}{way:24}{cells}{row['gradient']:10.3f}")
    nearest = min(WAYS.keys() - {"fp32"}, key=lambda w: sum(r[w]["mean"] for r in results.values()))
    rounded = {
        name: {way: {k: round(v, 4) for k, v in row.items()} for way, row in ways.items()}
        for name, ways in results.items()
    }
    print(json.dumps({"steps": args.steps, "seeds": args.seeds, "nearest": nearest} | rounded))


if __name__ == "__main__":
    main()

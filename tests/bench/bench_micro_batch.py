"""Images per second by micro-batch on a CPU: what an "auto" micro-batch rests on.

    make bench-micro-batch

One rank on every core. Each recipe's whole step (views, forward, backward, AdamW, EMA), fp32, at
every micro-batch, interleaved; the median of the rounds. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import RECIPES, load_recipe
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.processor import processor
from pipeline.runtime.engine import Engine, init_ranks

SMALL = ["encoder.image_size=32", "data.partitions=8",
         "encoder.options={patch_size: 4, embed_dim: 192, depth: 6, num_heads: 3}"]  # fmt: skip
NARROW = "measure.decoder={width: 96, depth: 2, heads: 3}"
# Name → recipe, overrides. The demo's own size, CIFAR's, and ViT-S and ViT-B at 224 x 224.
CASES: dict[str, tuple[str, list[str]]] = {
    "demo_mae": ("demo_mae", []),
    "demo_rmae": ("demo_rmae", []),
    "demo_cmae": ("demo_cmae", []),
    "cifar_mae": ("mae", [*SMALL, NARROW]),
    "cifar_rmae": ("rmae", [*SMALL, NARROW]),
    "cifar_cmae": ("cmae", [*SMALL]),
    "mae_vits": ("mae_vits", []),
    "mae": ("mae", []),
}
MICRO = (8, 16, 32, 64, 128, 256)


class Stepper:
    """One recipe at one micro-batch, ready to step."""

    def __init__(self, name: str, overrides: list[str], micro: int) -> None:
        recipe = load_recipe(RECIPES / f"{name}.yaml", [*overrides, f"batch_size={max(MICRO)}"])
        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": micro}
        self.micro, self.size = micro, recipe.encoder.image_size
        self.objective, self.teacher = build_objective(recipe)
        self.plan = plan_recipe(config, recipe, 1)
        self.engine = Engine(self.objective, parameter_groups(self.objective), self.plan)

    def images_per_second(self, steps: int) -> float:
        """Of `steps` micro-steps."""
        image = torch.randint(0, 256, (self.micro, self.size, self.size, 3), dtype=torch.uint8)
        sample = torch.arange(self.micro)
        start = time.perf_counter()
        for _ in range(steps):
            self.engine.micro_step(1e-4, image, sample, 0, self.teacher)
            if self.teacher is not None and self.engine.engine.is_gradient_accumulation_boundary():
                self.teacher.update(self.objective, 0.99)
        return steps * self.micro / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--micro", nargs="+", type=int, default=list(MICRO))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=512, help="per round and micro-batch")
    args = parser.parse_args()
    init_ranks()
    result: dict[str, dict[int, float]] = {}
    for case in args.cases:
        steppers = [Stepper(*CASES[case], micro) for micro in args.micro]
        speeds: dict[int, list[float]] = {micro: [] for micro in args.micro}
        for number in range(args.rounds + 1):  # the first one warms up
            for stepper in steppers:
                steps = max(1, args.images // stepper.micro) if number else 1
                speed = stepper.images_per_second(steps)
                if number:
                    speeds[stepper.micro].append(speed)
        result[case] = {m: round(statistics.median(s), 2) for m, s in speeds.items()}
        print(f"{case:12}", *(f"{m}: {v:g}" for m, v in result[case].items()), sep="  ", flush=True)
    print(json.dumps({"images_per_second": result, "threads": torch.get_num_threads(),
                      "cpu": processor().name}))  # fmt: skip


if __name__ == "__main__":
    main()

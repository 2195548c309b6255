"""The "auto" micro-batch of a GPU: the largest that estimate.py says its memory holds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import pipeline
from pipeline.config.plan import RunPlan, deepspeed_stage
from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import Recipe, dump_recipe
from pipeline.distributed import Ranks, agree
from pipeline.errors import UserError

ESTIMATE = Path(pipeline.__file__).parent / "estimate.py"
KEY = "train_micro_batch_size_per_gpu"


def plan_that_fits(ds_config: dict[str, Any], recipe: Recipe, ranks: Ranks) -> RunPlan:
    """The plan of a pretraining; an "auto" micro-batch fits every GPU's memory (collective there).

    Where negatives, or statistics of batch norm, come from the micro-batch it stays what the recipe
    alone gives on a GPU: its memory must not change the result. Raises UserError.
    """
    plan = plan_recipe(ds_config, recipe, ranks.world)
    if ranks.device.type != "cuda" or ds_config.get(KEY, "auto") != "auto" or plan.pooled:
        return plan
    memory = torch.tensor([device_memory(ranks.device)], device=ranks.device)
    if ranks.world > 1:
        torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MIN)
    most = int(memory)
    images = agree(lambda: images_that_fit(plan, recipe, most))
    return plan_recipe(ds_config | {KEY: images}, recipe, ranks.world)


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def images_that_fit(plan: RunPlan, recipe: Recipe, memory: int) -> int:
    """Images of the largest micro-batch that fits in `memory` bytes, by estimate.py in a process of
    its own, since the count runs the step with other kernels. UserError where it fails."""
    precision = plan.precision
    if precision == "bf16" and plan.config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        precision = "bf16-fp32-grads"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        command: list[str | Path] = [
            sys.executable, ESTIMATE, "--recipe", path,
            "--fit", str(deepspeed_stage(plan)), "--gpus", str(plan.world),
            "--gpu-memory", str(memory / 1e9), "--precision", precision,
        ]  # fmt: skip
        command += ["--checkpointing"] if plan.checkpointing else []
        command += [] if plan.cuda_graphs else ["--no-graphs"]
        alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=os.environ | alone, text=True, capture_output=True, check=False
        )
    try:
        return int(done.stdout)
    except ValueError:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(
            f'{KEY} "auto": pipeline/estimate.py could not say what fits ({why}); give a number'
        ) from None

"""bf16 in its three ways: how near each is to fp32, and what the EMA teacher averages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import images, tiny_recipe

from pipeline.config.planning import plan_recipe
from pipeline.config.schedules import learning_rate
from pipeline.distributed import free_port
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.engine import Engine, init_ranks

ROOT = Path(__file__).parents[3]
BF16 = {"bf16": {"enabled": True}}
FP32_GRADS = BF16 | {
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}
AUTOCAST = {"torch_autocast": {"enabled": True}}
METHODS = ("rmae", "cmae")


def losses(method, config, stage):
    """Losses of eight steps of four micro-batches each, and the dtypes of weights and outputs."""
    torch.manual_seed(0)
    recipe = tiny_recipe(
        method, "optimizer.base_lr=0.1", "optimizer.epochs=12", "optimizer.warmup_epochs=1"
    )
    config = config | {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    objective, teacher = build_objective(recipe)
    engine = Engine(objective, parameter_groups(objective), plan_recipe(config, recipe, 1))
    kept = next(objective.parameters()).dtype
    found = []
    for step in range(8):
        image = images(8, seed=step)
        for micro in torch.arange(8).split(2):
            loss, _ = engine.micro_step(
                learning_rate(recipe, step, 1), image[micro], micro, step, teacher
            )
            assert loss.dtype == torch.float32
            found.append(loss.item())
        if teacher is not None:
            teacher.update(objective, 0.9, engine.masters)
    engine.destroy()
    return torch.tensor(found, dtype=torch.float64), kept


@pytest.fixture(scope="module")
def exact():
    """The losses in fp32."""
    init_ranks()
    return {method: losses(method, {}, 2)[0] for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_autocast_keeps_fp32_weights_and_is_nearer_to_fp32_than_bf16(method, exact):
    apart = {}
    for name, config in (("bf16", BF16), ("fp32 grads", FP32_GRADS), ("autocast", AUTOCAST)):
        found, kept = losses(method, config, 2)
        assert kept == (torch.float32 if name == "autocast" else torch.bfloat16)
        apart[name] = float((found - exact[method]).abs().mean() / exact[method].mean())
    assert 0 < apart["autocast"] < apart["bf16"] < 0.01, apart
    assert 0 < apart["fp32 grads"] < 0.01, apart


def test_autocast_follows_under_every_stage_and_leaves_other_engines_alone(exact):
    """DeepSpeed keeps autocast in a global, which an fp32 engine after it must not see."""
    first, *rest = (losses("rmae", AUTOCAST, stage)[0] for stage in (0, 1, 2, 3))
    for other in rest:
        assert torch.allclose(first, other, rtol=2e-3)  # sums in another order, then rounded
    assert torch.allclose(losses("rmae", {}, 2)[0], exact["rmae"], rtol=1e-5)


def test_the_teacher_averages_the_master_weights_on_two_ranks():
    port, children = str(free_port()), []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"
        command = [sys.executable, ROOT / "tests/helpers/masters_worker.py"]
        children.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [child.communicate(timeout=240)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    found = json.loads(outputs[0].splitlines()[-1])
    assert sorted(found) == ["1", "2", "3"]
    for error, rounded in found.values():
        assert error < 3e-8  # rounding of fp32
        assert rounded > 3e-7  # a tenth of the step, which bf16 weights do not show at all

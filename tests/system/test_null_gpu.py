"""The stand-in for a GPU counts what torch sends it, and DeepSpeed takes its real steps on it."""

import json
import subprocess
import sys
from pathlib import Path

import null_gpu
import pytest

ROOT = Path(__file__).parents[2]
FEW_OPS = """
import json, null_gpu, torch
def change(call):
    before = null_gpu.counts()
    call()
    return [b - a for a, b in zip(before, null_gpu.counts())]
x, h = torch.empty(64, device="cuda"), torch.ones(64).pin_memory()
def sequence():
    x.copy_(h, non_blocking=True); x.add_(1); x.mul_(x)
print(json.dumps([change(sequence), change(lambda: x.sum().item()),
                  change(torch.cuda.synchronize), float(torch.tensor(3.5, device="cuda"))]))
"""
STEPS = """
import json, null_gpu, sys, torch
from tiny import images, tiny_recipe
from pipeline import kernels
from pipeline.config.ds_config import plan_recipe
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.engine import Engine, init_ranks
init_ranks(); kernels.use("reference")
found = {}
for depth in (2, 3):
    for stage in (1, 2, 3):
        size = "{patch_size: 4, embed_dim: 16, depth: %d, num_heads: 2}" % depth
        recipe = tiny_recipe("mae", "encoder.options=" + size)
        objective, _ = build_objective(recipe)
        config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}}
        engine = Engine(objective, parameter_groups(objective), plan_recipe(config, recipe, 1))
        inputs = images(8).cuda(), torch.arange(8).cuda(), 0
        for _ in range(3):
            before = null_gpu.counts()
            engine.micro_step(1e-3, *inputs)
        found["%d-%d" % (depth, stage)] = [b - a for a, b in zip(before, null_gpu.counts())]
        engine.destroy()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_null_gpu(tmp_path_factory):
    try:
        environment = null_gpu.environment(tmp_path_factory.mktemp("gpu"))
    except null_gpu.NoCompilerError as error:
        pytest.skip(str(error))
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/helpers'}"

    def run(code):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_it_counts_launches_copies_waits_and_reads(on_null_gpu):
    sequence, item, wait, number = on_null_gpu(FEW_OPS)
    assert sequence == [2, 1, 0, 0]
    assert item[0] in (1, 2)  # the sum is one launch, or two
    assert item[1:] == [1, 1, 1]
    assert wait == [0, 0, 1, 0]
    assert number == 3.5


def test_deepspeed_steps_on_it(on_null_gpu):
    """A block more is as many launches more under every stage, and no more reads."""
    found = on_null_gpu(STEPS)
    for stage in (1, 2, 3):
        two, three = found[f"2-{stage}"], found[f"3-{stage}"]
        assert three[0] - two[0] > 25, stage  # forward and backward of a block, and its 12 weights
        assert three[3] == two[3], stage

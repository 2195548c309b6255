"""Compiled blocks and CUDA graphs: where they are taken or refused, and what is replayed."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import null_gpu
import pytest
import torch
from tiny import tiny_recipe
from torch import nn

from eval.shared.processes import LAUNCHER
from pipeline import estimate
from pipeline.config.ds_config import DS_CONFIGS, read_ds_config
from pipeline.config.plan import SHORT, deepspeed_stage, for_steps, stage_with_graphs, takes_flat
from pipeline.config.planning import plan_recipe
from pipeline.errors import UserError
from pipeline.runtime.compiled import RECOMPILES, compile_blocks

ROOT = Path(__file__).parents[3]


def plan_of(stage, *, world=1, method="mae", compiled=False, graphs=True, **zero):
    config = {"compile": compiled, "cuda_graphs": graphs}
    config["zero_optimization"] = {"stage": stage, **zero}
    return plan_recipe(config, tiny_recipe(method), world)


@pytest.fixture
def gpu(monkeypatch):
    """A plan is made as if there were a CUDA device."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("pipeline.distributed.bf16_units", lambda: True)


def test_without_a_gpu_auto_is_off_and_true_refused():
    plan = plan_of(2, compiled="auto", graphs="auto")
    assert not plan.compile
    assert not plan.cuda_graphs
    with pytest.raises(UserError, match="cuda_graphs of the ds_config needs a CUDA device"):
        plan_of(2)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [1, 2])
def test_auto_is_whatever_can_be(stage, world, gpu):
    plan = plan_of(stage, world=world, compiled="auto", graphs="auto")
    assert plan.may_fail == {"compile", "cuda_graphs"}
    possible = stage < 3 or world == 1
    assert plan.cuda_graphs == plan.compile == takes_flat(plan) == possible
    if not possible:
        with pytest.raises(UserError, match=r"cuda_graphs of the ds_config needs .*stage 0 to 2"):
            plan_of(stage, world=world)


@pytest.mark.parametrize(("stage", "world"), [(2, 2), (0, 1), (0, 2)])
def test_with_graphs_alone_what_reduces_in_the_backward_pass_runs_as_stage_1(gpu, stage, world):
    plans = [plan_of(stage, world=world, graphs=graphs) for graphs in (False, True)]
    assert [deepspeed_stage(plan) for plan in plans] == [stage, 1]
    assert [takes_flat(plan) for plan in plans] == [False, True]


def test_stage_2_of_one_rank_stays_as_it_is_with_graphs(gpu):
    assert deepspeed_stage(plan_of(2, graphs=True)) == 2


def test_auto_compiles_no_short_schedule(gpu):
    auto, asked = (plan_of(1, compiled=compiled, graphs="auto") for compiled in ("auto", True))
    assert not for_steps(auto, SHORT - 1).compile
    assert for_steps(auto, SHORT - 1).cuda_graphs
    assert for_steps(auto, SHORT).compile
    assert for_steps(asked, 1).compile


def test_the_log_says_why_auto_is_off(gpu):
    assert plan_of(1, compiled="auto", graphs="auto").off == ()
    plan = plan_of(3, world=2, compiled="auto", graphs="auto")
    compiled, graphs = plan.describe()[-2:]
    assert compiled == "compile: off (needs zero_optimization.stage 0 to 2)"
    assert graphs.startswith("cuda_graphs: off (needs zero_optimization.stage 0 to 2 (3 on one")
    config = {"cuda_graphs": "auto", "zero_optimization": {"stage": 2}}
    recipe = tiny_recipe("cmae", "measure.negatives=all")
    assert plan_recipe(config, recipe, 1).off == ()
    assert plan_recipe(config, recipe, 2).describe()[-1] == (
        "cuda_graphs: off (excludes communication between ranks while the loss is computed: "
        "negatives, statistics of batch norm)"
    )
    config |= {"gradient_checkpointing": True}
    assert "cuda_graphs: off (excludes gradient_checkpointing)" in (
        plan_recipe(config, recipe, 1).describe()
    )
    short = for_steps(plan_of(1, compiled="auto", graphs="auto"), 1)
    assert short.off == ("compile: off (a run of 1 step is too short for it to pay)",)
    assert plan_of(1, graphs=False, compiled=False).off == ()


def test_on_a_cpu_nobody_asks_why_there_are_no_graphs():
    assert plan_of(2, compiled="auto", graphs="auto").off == ()


def test_what_excludes_graphs_is_named(gpu):
    for zero in ({"offload_optimizer": {"device": "cpu"}}, {"overlap_comm": True}):
        with pytest.raises(UserError, match="with nothing offloaded, no overlap_comm and"):
            plan_of(1, world=2, **zero)
    # On several ranks stage 2 would become 1, where DeepSpeed sums these by another optimizer.
    config = read_ds_config("zero2-bf16-fp32-grads") | {"bf16": {"enabled": True}}
    plans = [plan_recipe(config, tiny_recipe("mae"), world) for world in (1, 2)]
    assert [plan.cuda_graphs for plan in plans] == [True, False]
    assert [deepspeed_stage(plan) for plan in plans] == [2, 2]
    with pytest.raises(UserError, match="on several ranks, no fp32 sums of bf16 gradients"):
        plan_recipe(config | {"cuda_graphs": True}, tiny_recipe("mae"), 2)
    config = {"cuda_graphs": True, "zero_optimization": {"stage": 1}}
    byol = ["measure.kind=byol", "measure.heads={batch_norm: true}"]
    for changes in (["measure.negatives=all"], byol):
        recipe = tiny_recipe("cmae", *changes)
        with pytest.raises(UserError, match="excludes communication between ranks while"):
            plan_recipe(config, recipe, 2)
        assert plan_recipe(config, recipe, 1).cuda_graphs
    assert plan_recipe(config, tiny_recipe("cmae", "measure.kind=byol"), 2).cuda_graphs
    checkpointing = {"cuda_graphs": "auto", "gradient_checkpointing": True}
    assert not plan_recipe(config | checkpointing, recipe, 1).cuda_graphs


PRECISIONS = {
    "fp32": (0, {}),
    "autocast": (0, {"torch_autocast": {"enabled": True}}),
    "bf16": (1, {"bf16": {"enabled": True}}),
    "bf16-fp32-grads": (
        2,
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
}  # name in estimate.py → the lowest stage, ds_config


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_the_planner_knows_where_graphs_are(precision, world, gpu):
    least, config = PRECISIONS[precision]
    args = argparse.Namespace(no_graphs=False, checkpointing=False, gpus=world, precision=precision)
    byol = ["measure.kind=byol", "measure.heads={batch_norm: true}"]
    for recipe in (tiny_recipe("mae"), tiny_recipe("cmae"), tiny_recipe("cmae", *byol)):
        for stage in range(least, 4):
            asked = config | {"cuda_graphs": "auto", "zero_optimization": {"stage": stage}}
            plan = plan_recipe(asked, recipe, world)
            assert estimate.graphs(stage, args, recipe) == plan.cuda_graphs, stage
            if plan.cuda_graphs and (stage, world) != (3, 1):  # 3 and 2 of one rank are alike
                assert stage_with_graphs(stage, world) == deepspeed_stage(plan)


def test_every_bundled_config_asks_for_both_where_they_can_be(gpu):
    for path in DS_CONFIGS.glob("*.json"):
        config = read_ds_config(path)
        assert config["compile"] == config["cuda_graphs"] == "auto"


def test_the_log_says_what_is_done(gpu):
    told = plan_of(1, compiled=True).describe()[-2:]
    assert told == [
        "compile: the first steps compile the blocks",
        "cuda_graphs: forward and backward of a micro-batch are one CUDA graph",
    ]


def test_blocks_compile_once_per_shape_and_have_room_for_many(monkeypatch):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    seen = []
    monkeypatch.setattr(nn.Linear, "compile", lambda self, **given: seen.append(given))
    for may_fail in (True, False):
        compile_blocks(Stack(), may_fail=may_fail)
        assert torch._dynamo.config.suppress_errors == may_fail
    assert seen == [{"dynamic": False}] * 4
    assert torch._dynamo.config.recompile_limit == RECOMPILES


# Every launch of the real step is made on the stand-in for a GPU; that a replay computes what the
# eager step does only a GPU can show (gpu_check.py: the columns with graphs).
STEPS = """
import json, null_gpu, torch
torch.backends.cudnn.enabled = False
from tiny import images, tiny_recipe
from pipeline import kernels
from pipeline.config.planning import plan_recipe
from pipeline.errors import UserError
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.engine import Engine, init_ranks
init_ranks()
kernels.use("auto", "cuda")
found = {}
for name, precision, stage in (("mae fp32", None, 0), ("mae", "torch_autocast", 2),
                               ("rmae", "bf16", 2), ("cmae", "torch_autocast", 2)):
    recipe = tiny_recipe(name.split()[0], "data.sizes=[[0.5, 8], [1, 16]]")
    config = {"train_micro_batch_size_per_gpu": 4, "cuda_graphs": True}
    config |= {precision: {"enabled": True}} if precision else {}
    config |= {"zero_optimization": {"stage": stage}} if stage else {}
    objective, teacher = build_objective(recipe)
    engine = Engine(objective, parameter_groups(objective), plan_recipe(config, recipe, 1))
    if teacher is not None:
        engine.adopt(teacher)
    image, sample = images(4).cuda(), torch.arange(4, device="cuda")
    rows = []
    for micro in range(6):
        torch.manual_seed(7)
        before, random = null_gpu.counts(), torch.cuda.get_rng_state().tolist()
        engine.micro_step(1e-3, image, sample, micro // 4, teacher)
        rows.append({
            "launches": null_gpu.counts()[0] - before[0], "graphs": engine.graph.captured,
            "waits": null_gpu.counts()[2] - before[2],
            "random": torch.cuda.get_rng_state().tolist() == random,
        })
        if micro % 2 and teacher is not None:
            teacher.update(objective, 0.9, engine.masters)
    try:
        engine.micro_step(1e-3, image[:2], sample[:2], 1, teacher)
    except UserError as error:
        found["shape"] = str(error)
    found[name] = rows
    engine.resize()
    small = images(4, 8).cuda()
    for _ in range(2):
        before = null_gpu.counts()[0]
        engine.micro_step(1e-3, small, sample, 1, teacher)
        launches = null_gpu.counts()[0] - before
        found.setdefault("resized", []).append([launches, engine.graph.captured])
    engine.destroy()
# A forward pass that reads the device cannot be captured, nor one for which memory runs out there;
# another error is none of the capture's.
def read(inputs, result):
    result[0].detach().item()
def read_later(inputs, result):
    if len(inputs[0][0]) == 8:
        result[0].detach().item()
def fill(inputs, result):
    if torch.cuda.is_current_stream_capturing():
        torch.empty(1 << 40, device="cuda")
def refuse(inputs, result):
    if torch.cuda.is_current_stream_capturing():
        with __import__("contextlib").suppress(RuntimeError):
            result[0].detach().item()
        raise UserError("no such thing")
for graphs, spoil in (("auto", read), ("auto", read_later), ("auto", fill), (True, read),
                      (True, fill), ("auto", refuse)):
    recipe = tiny_recipe("mae", "data.sizes=[[0.5, 8], [1, 16]]")
    objective, _ = build_objective(recipe)
    inner = objective.forward
    def forward(*inputs):
        result = inner(*inputs)
        spoil(inputs, result)
        return result
    objective.forward = forward
    plan = plan_recipe(config | {"cuda_graphs": graphs}, recipe, 1)
    engine = Engine(objective, parameter_groups(objective), plan)
    try:
        given_up = []
        for micro in range(4):
            if micro == 2:
                engine.resize()
            engine.micro_step(1e-3, small if micro > 1 else image, sample, 0, None)
            given_up.append(engine.graph is None)
        found[f"failed, {graphs}, {spoil.__name__}"] = given_up
        torch.cuda.empty_cache()  # the failed capture is over
        torch.rand(3, device="cuda")
    except (RuntimeError, UserError) as error:
        found[f"failed, {graphs}, {spoil.__name__}"] = f"{type(error).__name__}: {error}"
# Which attention a block takes for sequences of two lengths.
wide = "measure.decoder={width: 16, depth: 1, heads: 2}"  # of 8 channels a head
objective, _ = build_objective(tiny_recipe("mae", wide))
for part in (objective.encoder, objective.measure.decoder):
    block = part.blocks[0].cuda().bfloat16()
    for tokens in (64, 65):
        x = torch.zeros(2, tokens, block.norm1.weight.numel(), device="cuda", dtype=torch.bfloat16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            block(x)
        names = {event.key for event in profile.key_averages()}
        efficient = "aten::_scaled_dot_product_efficient_attention" in names
        flash = "aten::_scaled_dot_product_flash_attention" in names
        found.setdefault("attention", []).append([tokens, efficient, flash])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Variables of a process that sees the stand-in for a GPU."""
    try:
        environment = null_gpu.environment(tmp_path_factory.mktemp("gpu"))
    except null_gpu.NoCompilerError as error:
        pytest.skip(str(error))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    return {k: v for k, v in environment.items() if k not in LAUNCHER} | {"PYTHONPATH": path}


@pytest.mark.slow
def test_a_micro_batch_is_one_launch_and_few_around_it(stand_in):
    done = subprocess.run([sys.executable, "-c", STEPS], env=stand_in, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "AccumulateGrad" not in done.stderr  # its node would be of another stream
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["attention"] == 2 * [[64, True, False], [65, False, True]]
    assert found["failed, auto, read"] == found["failed, auto, fill"] == [True] * 4
    assert found["failed, auto, read_later"] == [False, False, True, True]
    told = "cuda_graphs: none can be captured here, kernels are launched one by one ("
    reasons = [line.removeprefix(told) for line in done.stderr.splitlines() if told in line]
    assert len(reasons) == 3
    assert "operation not permitted when stream is capturing" in reasons[0]  # not its aftermath
    assert reasons[2].startswith("CUDA out of memory.")
    assert "CaptureError: " in found["failed, True, read"]
    assert "not permitted when stream is capturing" in found["failed, True, read"]
    assert "CaptureError: CUDA out of memory." in found["failed, True, fill"]
    assert found["failed, auto, refuse"] == "UserError: no such thing"
    assert "a micro-batch has shapes [(2, 16, 16, 3), (2,)], the first had" in found["shape"]
    for first, second in (found["resized"][at : at + 2] for at in range(0, 8, 2)):
        assert first[0] > 300  # kernels and blocks are warmed up for the new size
        assert second[0] <= 30
        assert first[1] == second[1] == 2
    for name in ("mae fp32", "mae", "rmae", "cmae"):
        rows = found[name]
        assert [row["graphs"] for row in rows] == [1] * 6  # the one of both epochs
        assert rows[0]["launches"] > 300  # the passes before the first graph
        for row in rows[1:]:
            assert row["launches"] <= 30
            assert row["waits"] <= 1  # for the norm, at the end of a step
        assert all(row["random"] for row in rows)  # what was drawn before a capture is forgotten


# What ranks send each other is nothing there, so that they are not asked for their cores.
TWO_RANKS = """
import json, null_gpu, os, torch
from tiny import images, tiny_recipe
from pipeline import kernels
from pipeline.config.ds_config import read_ds_config
from pipeline.config.planning import plan_recipe
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime import engine as engines
engines.cores_per_rank = lambda: 1
ranks = engines.init_ranks()
kernels.use("auto", "cuda")
recipe = tiny_recipe("rmae")
config = read_ds_config("zero2") | {"train_micro_batch_size_per_gpu": 2, "compile": False}
objective, _ = build_objective(recipe)
plan = plan_recipe(config, recipe, ranks.world)
engine = engines.Engine(objective, parameter_groups(objective), plan)
image, sample, launches = images(2).cuda(), torch.arange(2, device="cuda"), []
for micro in range(4):
    before = null_gpu.counts()[0]
    engine.micro_step(1e-3, image, sample, 0, None)
    launches.append(null_gpu.counts()[0] - before)
print(json.dumps({"stage": engine.stage, "launches": launches}), flush=True)
os._exit(0)  # its groups cannot be left
"""


@pytest.mark.slow
def test_two_ranks_under_stage_2_replay_their_graphs_and_reduce_outside(stand_in, free_port):
    """The shipped zero2.json, two micro-batches a step."""
    ranks = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port)}  # fmt: skip
    both = [
        subprocess.Popen([sys.executable, "-c", TWO_RANKS], env=stand_in | ranks | {"RANK": rank},
                         stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]  # fmt: skip
    for process in both:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0
        found = json.loads(out.splitlines()[-1])
        assert found["stage"] == 1
        first, last = found["launches"][2:]
        assert first <= 8  # the gradients stay with this rank
        assert first < last <= 40  # they are reduced, and the step is taken

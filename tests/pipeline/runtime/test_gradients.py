"""From gradients to the step without DeepSpeed's hooks: same weights, one norm, one read."""

import math
from dataclasses import replace

import pytest
import torch
from launches import CountLaunches
from tiny import images, tiny_recipe
from torch import nn

from pipeline.config.plan import deepspeed_stage, takes_flat
from pipeline.config.planning import plan_recipe
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime import gradients
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.gradients import total_norm

BF16 = {"bf16": {"enabled": True}}
WAYS = {
    "fp32": ({}, (0, 1, 2, 3)),
    "autocast": ({"torch_autocast": {"enabled": True}}, (0, 1, 2, 3)),
    "bf16": (BF16, (1, 2, 3)),
    "fp32 grads": (BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, (2, 3)),
}
EVERY = [(way, stage) for way, (_, stages) in WAYS.items() for stage in stages]


class Odd(nn.Module):
    """Five trained numbers, one without a gradient: groups that are padded."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]]))
        self.unused = nn.Parameter(torch.tensor([3.0]))
        self.bias = nn.Parameter(torch.tensor([0.25]))

    def forward(self, x):
        return (x @ self.matrix.T + self.bias).square().mean(), {}


def groups_of(module):
    return [
        {"name": "decay", "weight_decay": 0.1, "params": [module.matrix]},
        {"name": "no_decay", "weight_decay": 0.0, "params": [module.unused, module.bias]},
    ]


def plan_of(way, stage, *overrides, world=1, **zero):
    config = WAYS[way][0] | {"zero_optimization": {"stage": stage} | zero}
    config["train_micro_batch_size_per_gpu"] = 4
    return plan_recipe(config, tiny_recipe("mae", *overrides), world)


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    init_ranks()


def check_weights(engine, plain):
    """Ends an engine whose weights are those of a plain model."""
    state = engine.full_state()
    engine.destroy()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(state[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("clip", [0.0, 0.7, 1e4])
@pytest.mark.parametrize("each", [False, True], ids=["at the end", "after each micro-batch"])
def test_two_micro_batches_and_a_step_are_torchs_adamw(stage, clip, each):
    plan = plan_of(
        "fp32", stage, f"optimizer.gradient_clipping={clip}", "optimizer.betas=[0.9,0.9]"
    )
    ours, plain = Odd(), Odd()
    engine = Engine(ours, groups_of(ours), plan)
    if engine.flat is not None:
        engine.flat._each = each
    adamw = torch.optim.AdamW(groups_of(plain), betas=(0.9, 0.9), eps=plan.optimizer.eps)
    x = torch.linspace(-1, 2, 24).view(2, 4, 3)
    for step in range(3):
        lr = 0.1 / (step + 1)
        for micro in x:
            engine.micro_step(lr, micro + step)
            (plain(micro + step)[0] / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
        assert engine.gradient_norm() == pytest.approx(float(norm), rel=1e-5)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
    check_weights(engine, plain)
    assert 0.7 < float(norm) < 1e4  # it was clipped, but not by the largest


def test_graphs_have_their_stage_without_a_section_for_it_too(monkeypatch):
    """A graph itself is a GPU's; what is around it is the same without one."""
    monkeypatch.setattr("pipeline.runtime.engine.MicroStepGraph", lambda *parts: None)
    plan = plan_recipe({"train_micro_batch_size_per_gpu": 8}, tiny_recipe("mae"), 1)
    engine = Engine(ours := Odd(), groups_of(ours), replace(plan, cuda_graphs=True))
    engine.micro_step(0.1, torch.ones(4, 3))
    assert (engine.stage, engine.engine.zero_optimization_stage()) == (1, 1)
    assert engine.full_state()["bias"].item() != 0.25
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_with_the_optimizer_on_the_host_is_torchs_adamw(stage):
    """And one whose gradient is not finite is left out. Nothing of DeepSpeed's is left behind."""
    linear = torch.nn.functional.linear
    plan = plan_of("fp32", stage, "optimizer.gradient_clipping=0.7", "optimizer.betas=[0.9,0.9]",
                   offload_optimizer={"device": "cpu"})  # fmt: skip
    ours, plain = Odd(), Odd()
    engine = Engine(ours, groups_of(ours), plan)
    adamw = torch.optim.AdamW(groups_of(plain), lr=0.1, betas=(0.9, 0.9), eps=plan.optimizer.eps)
    x = torch.linspace(-1, 2, 12).view(4, 3)
    for step in range(3):
        wrong = x.clone().fill_(math.inf) if step == 1 else x + step
        for _ in range(plan.accumulation):
            engine.micro_step(0.1, wrong)
        assert engine.step_skipped == (step == 1)
        if step != 1:
            plain(wrong)[0].backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.7)
            assert engine.gradient_norm() == pytest.approx(float(norm), rel=1e-5)
            adamw.step()
            adamw.zero_grad()
    assert (torch.nn.functional.linear is linear) == (stage < 3)
    check_weights(engine, plain)
    assert torch.nn.functional.linear is linear


@pytest.mark.parametrize(("way", "stage"), EVERY)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_that_is_not_finite_is_never_taken(way, stage, bad):
    """One bad number in the first micro-batch of a step: weights and moments stay bit for bit."""
    objective = Odd()
    engine = Engine(objective, groups_of(objective), plan_of(way, stage))
    x, skipped, states = torch.ones(4, 3).to(objective.matrix.dtype), [], []
    for step in range(3):
        broken = torch.tensor([[0.0, 0.0, bad if step == 1 else 0.0]], dtype=x.dtype)
        hook = objective.matrix.register_hook(lambda g, broken=broken: g + broken)
        engine.micro_step(0.01, x)
        hook.remove()
        engine.micro_step(0.01, x)
        skipped.append(engine.step_skipped)
        kept = [t for s in engine.base_optimizer.state.values() for t in s.values()]
        states.append([*engine.full_state().values(), *map(torch.as_tensor, kept)])
        states[-1] = [tensor.clone() for tensor in states[-1]]
    engine.destroy()
    assert skipped == [False, True, False]
    good, bad_step, after = states
    assert len(good) > 3
    assert all(map(torch.equal, good, bad_step))
    assert all(tensor.isfinite().all() for tensor in after)
    assert not torch.equal(after[0], bad_step[0])


@pytest.mark.parametrize(("way", "stage"), EVERY)
def test_the_step_is_few_launches_and_one_read(way, stage):
    """However many parameters; and the backward pass copies no gradient on its way."""
    engines = []
    for depth in (1, 3):
        size = "{patch_size: 4, embed_dim: 16, depth: %d, num_heads: 2}" % depth  # noqa: UP031
        objective, _ = build_objective(tiny_recipe("mae", f"encoder.options={size}"))
        engine = Engine(objective, parameter_groups(objective), plan_of(way, stage))
        inputs = (images(4), torch.arange(4), 0)
        for micro in range(4):  # the moments are made by the first step
            if micro == 3:
                loss, _ = engine.engine(*inputs)
                with CountLaunches() as backward:
                    engine.engine.backward(loss)
                with CountLaunches() as step:
                    engine.engine.step()
            else:
                engine.micro_step(1e-4, *inputs)
        engines.append((backward, step))
        engine.destroy()
    (_, shallow), (_, deep) = engines
    if stage == 0:  # DeepSpeed's step reads none; ours, one norm, before it
        assert deep.count == 0
        return
    assert deep.count == 1
    assert deep.launches == shallow.launches <= 15


@pytest.mark.parametrize("way", ["autocast", "bf16"])
def test_a_layers_own_rate_is_one_group_more_and_no_read(way):
    """Of its gradients one copy, and under bf16 one of its weights. No dispatch mode sees
    DeepSpeed's fused AdamW, which is one launch more (with it 62 for ViT-B, docs/step.md)."""
    found = []
    for decay in (1.0, 0.8):
        objective, _ = build_objective(tiny_recipe("mae", f"optimizer.layer_decay={decay}"))
        groups = parameter_groups(objective)
        engine = Engine(objective, groups, plan_of(way, 1))
        for _ in range(4):
            loss, _ = engine.engine(images(4), torch.arange(4), 0)
            engine.engine.backward(loss)
            with CountLaunches() as step:
                engine.update(lambda group: 1e-4 * group.get("lr_scale", 1.0))
        found.append((len(groups), step.launches, step.count))
        engine.destroy()
    (two, plain, reads), (more, layered, others) = found
    assert (two, more) == (2, 8)  # embeddings, two blocks, what is behind them
    assert reads == others == 1
    assert layered - plain == (more - two) * (2 if way == "bf16" else 1)


def test_a_norm_is_exact_over_chunks_and_names_what_is_not_finite():
    torch.manual_seed(0)
    big, small = torch.randn(3 * gradients.CHUNK + 5), torch.randn(2, 3).bfloat16()
    exact = (big.double().square().sum() + small.double().square().sum()).sqrt()
    assert total_norm([big, small]) == pytest.approx(float(exact), rel=1e-5)
    alone = small.double().square().sum().sqrt()
    assert total_norm([small]) == pytest.approx(float(alone), rel=1e-6)  # of bf16, but in fp32
    for bad in (math.inf, -math.inf, math.nan):
        small[1, 2] = bad
        assert not math.isfinite(total_norm([big, small]))


def test_which_plans_go_without_hooks():
    one = {stage: plan_of("autocast", stage) for stage in range(4)}
    assert [deepspeed_stage(plan) for plan in one.values()] == [0, 1, 2, 2]
    assert [takes_flat(plan) for plan in one.values()] == [False, True, True, True]
    two = {stage: plan_of("autocast", stage, "batch_size=16", world=2) for stage in range(4)}
    assert [deepspeed_stage(plan) for plan in two.values()] == [0, 1, 2, 3]
    assert [takes_flat(plan) for plan in two.values()] == [False, True, False, False]
    assert not takes_flat(plan_of("fp32", 1, "batch_size=16", world=2, overlap_comm=True))
    for key in ("round_robin_gradients", "offload_optimizer"):
        value = {"device": "cpu"} if key.startswith("offload") else True
        assert not takes_flat(plan_of("fp32", 2, **{key: value}))
    offloaded = plan_of("fp32", 3, offload_param={"device": "cpu"})
    assert deepspeed_stage(offloaded) == 3
    nowhere = plan_of("fp32", 3, offload_param={"device": "none"}, offload_optimizer={})
    assert deepspeed_stage(nowhere) == 2
    assert takes_flat(nowhere)


def test_which_settings_keep_deepspeeds_hooks():
    """Where a rank's part is no one piece of a flat group, or gradients are scaled, rounded or
    summed on their way; the last only on several ranks."""
    for key in ("cpu_offload", "round_robin_gradients", "parameter_alignment", "zenflow"):
        for world in (1, 2):
            plan = plan_of("fp32", 1, "batch_size=16", world=world)
            zero = plan.config["zero_optimization"] | {key: True}
            plan = replace(plan, config=plan.config | {"zero_optimization": zero})
            assert not takes_flat(plan), key
            assert deepspeed_stage(plan) == 1
    listed = {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}
    on_the_way = (
        {"prescale_gradients": True}, {"gradient_predivide_factor": 2.0}, {"torch_autocast": listed}
    )  # fmt: skip
    for world in (1, 2):
        plan = plan_of("autocast", 1, "batch_size=16", world=world)
        for more in on_the_way:
            assert takes_flat(replace(plan, config=plan.config | more)) == (world == 1), more
        assert takes_flat(replace(plan, config=plan.config | {"gradient_predivide_factor": 1.0}))
        wide = {"data_types": {"grad_accum_dtype": "fp32"}}
        for precision, flat in (("bf16", world == 1), ("autocast", True)):
            changed = replace(plan, precision=precision, config=plan.config | wide)
            assert takes_flat(changed) == flat, precision

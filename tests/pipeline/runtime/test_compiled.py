"""Compiled blocks: every gradient is the uncompiled one's (make test-torch asks other torches)."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from kernels_testing import assert_agree
from tiny import images, tiny_recipe
from torch import nn

from pipeline.method.objective import build_objective
from pipeline.runtime import loop
from pipeline.runtime.compiled import compile_blocks
from pipeline.runtime.probes import Probes

SAMPLE = torch.tensor([11, 4, 29])


def gradients(name, *, compiled, autocast, checkpointing):
    """The loss of a micro-batch, and its gradients by name."""
    objective, teacher = build_objective(tiny_recipe(name))
    for part in objective.modules():
        if checkpointing and hasattr(part, "grad_checkpointing"):
            part.grad_checkpointing = True
    if compiled:
        torch.compiler.reset()
        compile_blocks(objective)
        if teacher is not None:
            compile_blocks(teacher)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = objective(images(), SAMPLE, 2, teacher)
    loss.backward()
    if teacher is not None:  # the encoder that made the keys
        block = (teacher._copy.networks()[0] if autocast else teacher.encoder).blocks[0]
        assert (block._compiled_call_impl is not None) == compiled
    return loss.detach(), {name: p.grad for name, p in objective.named_parameters()}


@pytest.fixture
def traced(monkeypatch):
    """Blocks are traced and differentiated as in a run; the code generator would take a minute on
    a CPU."""
    compiling = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", compiling)
    torch.compiler.reset()


def graphs():
    """How many have been compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "autocast", "checkpointing"),
    [("mae", False, False), ("rmae", True, False), ("cmae", False, True), ("cmae", True, False)],
)
def test_gradients_of_compiled_blocks(name, autocast, checkpointing, traced):
    how = {"autocast": autocast, "checkpointing": checkpointing}
    loss, expected = gradients(name, compiled=False, **how)
    got_loss, got = gradients(name, compiled=True, **how)
    assert graphs() > 0
    tolerance = 2e-2 if autocast else 1e-5  # the traced formulas round to bf16 in other places
    assert_agree("loss", got_loss, loss, tolerance)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        assert_agree(key, got[key], gradient, tolerance)


def test_pictures_and_probes_compile_nothing(traced, shards):
    """Their shapes are their own, and compiling for one took longer than a hundred steps."""
    recipe = tiny_recipe("mae", "monitor.occlusion_steps=1", "monitor.knn_steps=1",
                         "monitor.images=24")  # fmt: skip
    objective, _ = build_objective(recipe)
    compile_blocks(objective)
    objective(images(), SAMPLE, 2, None)[0].backward()
    compiled, shown = graphs(), []
    assert compiled > 0
    monitor = SimpleNamespace(
        paused=contextlib.nullcontext, picture=lambda step, grid: shown.append(grid),
        probed=lambda step, metrics: shown.append(metrics),
    )  # fmt: skip
    run = SimpleNamespace(
        ranks=SimpleNamespace(device=torch.device("cpu")),
        model=SimpleNamespace(objective=objective),
        watch=SimpleNamespace(
            monitor=monitor, probes=Probes(recipe, str(shards / "train"), 0, 1, batch=7)
        ),
    )  # fmt: skip
    loop.probe(run, 1)
    loop.picture(run, 1, SimpleNamespace(image=images(), sample=SAMPLE))
    assert len(shown) == 2
    assert graphs() == compiled
    with torch.no_grad():
        objective(images(), SAMPLE, 2, None)
    assert graphs() > compiled  # nothing is left switched off

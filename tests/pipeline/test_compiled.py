"""Compiled blocks: every gradient is the uncompiled one's (make test-torch asks other torches)."""

import functools

import pytest
import torch
from kernels_testing import assert_agree
from tiny import images, tiny_recipe
from torch import nn

from pipeline.method.objective import build_objective
from pipeline.runtime.compiled import compile_blocks

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


@pytest.mark.parametrize(
    ("name", "autocast", "checkpointing"),
    [("mae", False, False), ("rmae", True, False), ("cmae", False, True), ("cmae", True, False)],
)
def test_gradients_of_compiled_blocks(name, autocast, checkpointing, monkeypatch):
    # Traced and differentiated as in a run; the code generator would take a minute on a CPU.
    traced = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    how = {"autocast": autocast, "checkpointing": checkpointing}
    loss, expected = gradients(name, compiled=False, **how)
    got_loss, got = gradients(name, compiled=True, **how)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    tolerance = 2e-2 if autocast else 1e-5  # the traced formulas round to bf16 in other places
    assert_agree("loss", got_loss, loss, tolerance)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        assert_agree(key, got[key], gradient, tolerance)

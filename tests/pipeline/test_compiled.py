"""Compiled blocks: where CUDA graphs are refused, and that no shape is compiled in vain."""

import dataclasses

import pytest
import torch
from tiny import tiny_recipe
from torch import nn

from pipeline.config.ds_config import plan_recipe
from pipeline.errors import UserError
from pipeline.runtime.compiled import RECOMPILES, SameShapes, compile_blocks


def plan_of(stage, accumulation, world=1, graphs=True):
    config = {"compile": True, "cuda_graphs": graphs, "zero_optimization": {"stage": stage}}
    config["train_micro_batch_size_per_gpu"] = 8 // world // accumulation
    return plan_recipe(config, tiny_recipe("mae"), world)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def test_the_log_says_what_is_compiled():
    lines = {graphs: plan_of(1, 1, graphs=graphs).describe()[-1] for graphs in (False, True)}
    assert lines[False] == "compile: the first steps compile the blocks"
    assert lines[True] == lines[False] + " and capture CUDA graphs of them"


def test_graphs_are_refused_without_a_gpu_and_where_gradients_would_be_overwritten(monkeypatch):
    with pytest.raises(UserError, match="cuda_graphs of the ds_config needs a CUDA device"):
        compile_blocks(Stack(), plan_of(1, 1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for stage, accumulation, world in ((0, 2, 1), (2, 2, 2)):
        with pytest.raises(UserError, match=r"2 accumulation steps needs .*stage 1"):
            compile_blocks(Stack(), plan_of(stage, accumulation, world))
    for stage, accumulation, world in ((0, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)):
        compile_blocks(Stack(), plan_of(stage, accumulation, world))


def test_blocks_compile_once_per_shape_and_have_room_for_many(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Linear, "compile", lambda self, **given: seen.append(given))
    compile_blocks(Stack(), plan_of(2, 1, graphs=False))
    assert seen == [{"dynamic": False, "mode": None}] * 2
    assert torch._dynamo.config.recompile_limit == RECOMPILES
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    compile_blocks(Stack(), plan_of(2, 1))
    assert seen[2:] == [{"dynamic": False, "mode": "reduce-overhead"}] * 2


def test_a_micro_batch_of_another_shape_is_refused():
    shapes = SameShapes()
    shapes.check((torch.zeros(4, 8), None, 3))
    shapes.check((torch.ones(4, 8), None, 4))
    with pytest.raises(UserError, match=r"shapes \[\(2, 8\)\], the first had \[\(4, 8\)\]"):
        shapes.check((torch.ones(2, 8), None, 4))


def test_graphs_are_off_unless_asked_for():
    assert not plan_recipe({}, tiny_recipe("mae"), 1).cuda_graphs
    assert dataclasses.replace(plan_of(1, 1), cuda_graphs=False).compile

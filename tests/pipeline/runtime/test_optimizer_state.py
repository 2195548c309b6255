"""A checkpoint of another model says which tensor is missing, and where; one of this model resumes
bit for bit, also where the optimizer is on the host or its groups are cut."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_recipe
from torch import nn

from pipeline.config.planning import plan_recipe
from pipeline.errors import UserError
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.optimizer_state import load_consolidated, save_consolidated


def engine_with(**tensors):
    return SimpleNamespace(
        parameters=lambda kind: tensors, buffers=dict, set_full=lambda target, kind, value: None
    )


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ({"a": 2, "b": 3}, "the file has no 'b'"),
        ({}, "the run has no 'a'"),
        ({"a": 3}, r"'a' has shape \[2\], the run needs \[3\]"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_tensor(run, sentence, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    engine = engine_with(**{name: torch.zeros(size) for name, size in run.items()})
    with pytest.raises(UserError, match=rf"model\.safetensors: {sentence}"):
        load_consolidated(engine, tmp_path)


class Sloped(nn.Module):
    """Weights in two groups; the gradient does not vanish."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(40, 8, generator=generator))
        self.bias = nn.Parameter(torch.randn(40, generator=generator))
        self.scale = nn.Parameter(torch.randn(40, generator=generator))

    def forward(self, x):
        return (self.scale * (x @ self.matrix.T + self.bias)).tanh().mean(), {}


def engine_under(zero):
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 8}
    plan = plan_recipe(config, tiny_recipe("mae"), 1)
    module = Sloped()
    groups = [
        {"name": "decay", "weight_decay": 0.1, "params": [module.matrix]},
        {"name": "no_decay", "weight_decay": 0.0, "params": [module.bias, module.scale]},
    ]
    return Engine(module, groups, plan)


def take(engine, steps):
    for step in steps:
        engine.micro_step(0.01, torch.linspace(-1, 1 + step, 32).view(4, 8))


HOST = {"device": "cpu"}


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload_optimizer": HOST},
        {"stage": 2, "offload_optimizer": HOST},
        {"stage": 3, "offload_optimizer": HOST},
        {"stage": 3, "offload_optimizer": HOST, "sub_group_size": 30},
        {"stage": 3, "offload_param": HOST, "sub_group_size": 30},
    ],
    ids=lambda zero: "-".join(map(str, zero.values())),
)
def test_a_checkpoint_resumes_bit_for_bit(zero, tmp_path):
    """DeepSpeed's AdamW on the host has beta^t outside its state, and stage 3 can cut a group."""
    init_ranks()
    engine = engine_under(zero)
    take(engine, range(7))
    assert not save_consolidated(engine, tmp_path)
    take(engine, range(7, 12))
    straight = engine.full_state() | {f"{k} {m}": v for m in engine.moments
                                      for k, v in engine.full_state(m).items()}  # fmt: skip
    engine.destroy()
    resumed = engine_under(zero)
    load_consolidated(resumed, tmp_path)
    take(resumed, range(7, 12))
    for kind in ("", *resumed.moments):
        for name, value in resumed.full_state(kind or "model").items():
            assert torch.equal(value, straight[f"{name} {kind}".strip()]), (kind, name)
    resumed.destroy()

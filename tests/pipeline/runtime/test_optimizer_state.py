"""A checkpoint that is of another model says which tensor is missing, and where."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.runtime.optimizer_state import load_consolidated


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

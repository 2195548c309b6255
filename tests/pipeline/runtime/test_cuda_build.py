"""What nvcc is told to compile for: this machine's GPUs, whatever TORCH_CUDA_ARCH_LIST holds."""

import _json
import importlib.util
import json
import os
import shutil

import pytest
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
from torch.utils import cpp_extension

from pipeline.runtime import ops
from pipeline.runtime.cuda_build import LIST, compiling_for, cuda_architectures

TORCH_IS_FOR = ["sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]
SPELLINGS = [
    None, "", " ", "9.0", "9.0a", "9.0a+PTX", "10.0a", "12.0f", "12.0f+PTX", "8.0 9.0+PTX",
    "8.0;9.0a", "8.0,9.0", " 9.0a ", "Hopper", "Ampere;9.0a", "native", "all", "sm_90", "90", "no",
]  # fmt: skip


def gpus(monkeypatch, *capabilities):
    """The GPUs that torch finds from now on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: capabilities[n])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: TORCH_IS_FOR)


def spelled(monkeypatch, value):
    monkeypatch.delenv(LIST, raising=False)
    if value is not None:
        monkeypatch.setenv(LIST, value)


def codes(flags):
    """["sm_90", "compute_90"] of nvcc's flags."""
    assert all(flag.startswith("-gencode=arch=compute_") for flag in flags)
    return sorted(flag.rpartition("code=")[2] for flag in flags)


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """The builds of DeepSpeed's fused_adam up to the compiler: what torch would tell nvcc."""
    told = []

    def load(name, sources, extra_cuda_cflags, **_):
        assert all(map(os.path.exists, sources))
        told.append(codes(cpp_extension._get_cuda_arch_flags(extra_cuda_cflags)))
        library = tmp_path / name / f"{name}.so"
        library.parent.mkdir(exist_ok=True)
        library.unlink(missing_ok=True)  # of an earlier start, and loaded
        shutil.copy(_json.__file__, library)

    real = importlib.util.spec_from_file_location
    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(
        ops.importlib.util, "spec_from_file_location", lambda name, path: real("_json", path)
    )
    return told


def start(tmp_path):
    """What another start does."""
    OpBuilder._loaded_ops.clear()
    ops._load_op(tmp_path, FusedAdamBuilder())


@pytest.mark.parametrize("value", SPELLINGS)
def test_an_h100_gets_its_code_and_the_variable_stays(value, nvcc, monkeypatch, tmp_path):
    gpus(monkeypatch, (9, 0))
    spelled(monkeypatch, value)
    start(tmp_path)
    assert nvcc == [["compute_90", "sm_90"]]
    assert os.environ.get(LIST) == value
    assert json.loads((tmp_path / "fused_adam/made_of.json").read_text())["gpus"] == "9.0+PTX"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(8, 0)], ["compute_80", "sm_80"]),
        ([(9, 0), (8, 6), (9, 0)], ["compute_90", "sm_86", "sm_90"]),
        ([(10, 0), (9, 0)], ["compute_100", "sm_100", "sm_90"]),
        ([(12, 1)], ["compute_120", "sm_120"]),  # newer than torch: what torch is for, as PTX
    ],
)
def test_all_gpus_of_a_machine_are_compiled_for(found, expected, nvcc, monkeypatch, tmp_path):
    gpus(monkeypatch, *found)
    spelled(monkeypatch, "7.5")
    start(tmp_path)
    assert nvcc == [expected]


def test_another_gpu_is_compiled_for_and_another_list_is_not(nvcc, monkeypatch, tmp_path):
    gpus(monkeypatch, (9, 0))
    for value in ("9.0a", "8.0", None):
        spelled(monkeypatch, value)
        start(tmp_path)
    assert len(nvcc) == 1
    gpus(monkeypatch, (8, 0))
    start(tmp_path)
    assert nvcc[1:] == [["compute_80", "sm_80"]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("9.0", "9.0"),
        ("9.0a", "9.0"),
        ("9.0a+PTX", "9.0+PTX"),
        ("12.0f;10.0a", "10.0;12.0"),
        ("9.0+PTX 8.0", "8.0;9.0+PTX"),
        (" 8.0, 9.0a ;", "8.0;9.0"),
        ("Hopper", "9.0+PTX"),
        ("Ampere+Tegra;9.0", "8.7;9.0"),
    ],
)
def test_without_a_gpu_the_list_counts(value, expected, nvcc, monkeypatch, tmp_path):
    gpus(monkeypatch)
    spelled(monkeypatch, value)
    assert cuda_architectures() == expected
    start(tmp_path)
    highest = expected.rpartition(";")[2].removesuffix("+PTX").replace(".", "")
    assert set(nvcc[0]) >= {f"sm_{highest}", f"compute_{highest}"}
    assert os.environ[LIST] == value


@pytest.mark.parametrize("value", [None, "", ";", "native", "all", "sm_90", "9", "9.0b", "9.0 no"])
def test_without_a_gpu_a_list_of_nothing_is_a_sentence(value, nvcc, monkeypatch, tmp_path):
    gpus(monkeypatch)
    spelled(monkeypatch, value)
    with pytest.raises(ValueError, match=f"^{LIST} is '{value or ''}': where no GPU is vis.*"):
        start(tmp_path)
    assert nvcc == []
    assert os.environ.get(LIST) == value


@pytest.mark.parametrize("before", [None, "9.0a"])
def test_a_build_that_fails_leaves_the_environment(before, monkeypatch):
    spelled(monkeypatch, before)
    monkeypatch.delenv("CPLUS_INCLUDE_PATH", raising=False)
    monkeypatch.setenv("LIBRARY_PATH", "/opt/lib")
    whole = dict(os.environ)

    @compiling_for("8.0")
    def build():
        assert os.environ["LIBRARY_PATH"].startswith("/opt/lib:/")
        raise RuntimeError(os.environ[LIST])

    with pytest.raises(RuntimeError, match=r"8\.0"):
        build()
    assert dict(os.environ) == whole

"""Which implementation runs: chosen once, said aloud, refused where it cannot run."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline import kernels
from pipeline.errors import UserError
from pipeline.kernels import backend


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(backend, "_implementation", "reference")


def test_auto_takes_the_reference_on_a_cpu():
    assert kernels.use("auto", "cpu") == "kernels: reference (auto on cpu)"
    assert kernels.implementation() == "reference"


def test_auto_takes_triton_on_cuda():
    assert kernels.use("auto", "cuda:0") == "kernels: triton (auto on cuda)"
    assert kernels.implementation() == "triton"


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU of sm_90, on which the first kernel runs."""
    backend.triton_problem.cache_clear()
    backend.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    trial = SimpleNamespace(run=lambda device: None)
    monkeypatch.setitem(sys.modules, "pipeline.kernels.trial_triton", trial)
    monkeypatch.setattr(kernels, "trial_triton", trial, raising=False)
    yield trial
    backend.triton_problem.cache_clear()
    backend.capability.cache_clear()


def test_a_first_kernel_that_runs_is_enough(gpu):
    assert kernels.use("auto", "cuda") == "kernels: triton (auto on cuda)"
    assert kernels.use("triton", "cuda") == "kernels: triton (triton on cuda)"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Failed to find C compiler. Please\nmore"), "Failed to find C compiler."),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: '/x'; TRITON_CACHE"),
        (ImportError("/c/launcher.so: failed to map segment from shared object"), "failed to map"),
        (subprocess.CalledProcessError(1, ["gcc"]), "'gcc' ended with exit code 1"),
    ],
)
def test_triton_that_does_not_run_is_said_and_the_reference_taken(error, said, gpu):
    def run(device):
        raise error

    gpu.run = run
    line = kernels.use("auto", "cuda")
    assert line.startswith("kernels: reference (auto on cuda: Triton does not run here: ")
    assert said in line
    assert kernels.implementation() == "reference"
    with pytest.raises(UserError, match=r"triton on cuda: .*; or choose kernels: reference"):
        kernels.use("triton", "cuda")


def test_a_gpu_before_sm_80_gets_the_reference(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    said = "it needs sm_80 or newer, this GPU is sm_75"
    assert kernels.use("auto", "cuda") == f"kernels: reference (auto on cuda: {said})"
    with pytest.raises(UserError, match=said):
        kernels.use("triton", "cuda")


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="set TRITON_INTERPRET=1, or choose kernels: reference"):
        kernels.use("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if backend._interpreter_problem():  # Triton and numpy of this environment do not fit
        with pytest.raises(UserError, match=r"triton on cpu: .* numpy 2\.4: pip install"):
            kernels.use("triton", "cpu")
    else:
        assert kernels.use("triton", "cpu") == "kernels: triton (triton on cpu, interpreted)"


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.4.0", False), ("3.4.0", "2.5.1", False), ("3.6.0", "2.3.9", True),
     ("3.8.0", "2.4.6", True)],
)  # fmt: skip
def test_an_interpreter_that_fails_with_this_numpy_is_a_sentence(triton, numpy, works, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "version", {"triton": triton, "numpy": numpy}.get)
    if works:
        kernels.use("triton", "cpu")
    else:
        with pytest.raises(UserError, match=r"numpy<2\.4', or choose kernels: reference"):
            kernels.use("triton", "cpu")
    assert kernels.use("triton", "cuda").startswith("kernels: triton")  # compiled all the same


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert kernels.use("auto", "cuda") == "kernels: reference (auto on cuda)"
    with pytest.raises(UserError, match="triton is not installed"):
        kernels.use("triton", "cuda")


def test_tiles_are_those_of_the_gpu_and_an_h100s_off_a_gpu(monkeypatch):
    backend.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    assert backend.capability(torch.device("cuda", 0)) == 103
    assert backend.capability(torch.device("cpu")) == 90
    backend.capability.cache_clear()


def test_unknown_implementation():
    with pytest.raises(UserError, match="auto, triton or reference, not 'fast'"):
        kernels.use("fast")


def test_nothing_imports_triton_until_it_is_chosen():
    code = (
        "import sys, torch; from pipeline import kernels; kernels.use('reference');"
        "kernels.sample_masks(torch.arange(2), seed=0, epoch=0, length=9, visible=(2, 0),"
        " policy='random');"
        "print([m for m in sys.modules if m.startswith('pipeline.') and m.endswith('triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

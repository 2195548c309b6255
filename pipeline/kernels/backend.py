"""Which implementation the public functions run: PyTorch reference or Triton kernel."""

import functools
import importlib.util
import os
from importlib.metadata import version

import torch

from pipeline.errors import UserError
from pipeline.gpu_errors import one_line

_implementation = "reference"
OLDEST = 80  # compute capability; older GPUs lack bf16 and the shared memory that the tiles need


def use(implementation: str = "auto", device: str | torch.device = "cpu") -> str:
    """Choose the implementation for this process, once, before the first step.

    implementation: `auto` (Triton on a CUDA device where it is installed and a first kernel runs,
    otherwise the reference), `triton` or `reference`. On the CPU `triton` runs under Triton's
    interpreter, which needs TRITON_INTERPRET=1 in the environment.
    Returns the line for the log. Raises UserError when the choice cannot run here.
    """
    global _implementation
    device = torch.device(device)
    note = ""
    if implementation == "auto":
        _implementation, problem = _automatic(device)
        note = f": {problem}" if problem else ""
    elif implementation == "triton":
        _need_triton(device)
        _implementation = "triton"
        note = "" if device.type == "cuda" else ", interpreted"
    elif implementation == "reference":
        _implementation = "reference"
    else:
        raise UserError(f"kernels must be auto, triton or reference, not {implementation!r}")
    return f"kernels: {_implementation} ({implementation} on {device.type}{note})"


def _automatic(device: torch.device) -> tuple[str, str]:
    """(implementation, why Triton was tried in vain or "")."""
    # AMD's GPUs, which torch calls cuda too, have never run the Triton kernels.
    if device.type != "cuda" or torch.version.hip is not None or not _installed():
        return "reference", ""
    problem = triton_problem(device)
    return "reference" if problem else "triton", problem


def _need_triton(device: torch.device) -> None:
    """UserError where the Triton kernels cannot run."""
    kind = device.type
    if not _installed():
        raise UserError("kernels: triton was asked for, but the package triton is not installed")
    if kind == "cuda":
        if problem := triton_problem(device):
            raise UserError(f"kernels: triton on {kind}: {problem}; or choose kernels: reference")
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"kernels: triton on {kind} runs only under Triton's interpreter: set "
            "TRITON_INTERPRET=1, or choose kernels: reference"
        )
    if problem := _interpreter_problem():
        raise UserError(f"kernels: triton on {kind}: {problem}, or choose kernels: reference")


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_problem(device: torch.device) -> str:
    """Why Triton's kernels do not run on a CUDA device; "" if a first one runs.

    They need a C compiler with Python's headers, and a folder for compiled libraries from which
    these can be loaded (TRITON_CACHE_DIR).
    """
    if not torch.cuda.is_available():  # nothing can be tried
        return ""
    if capability(device) < OLDEST:
        return f"it needs sm_{OLDEST} or newer, this GPU is sm_{capability(device)}"
    try:
        from pipeline.kernels import trial_triton

        trial_triton.run(device)
    except Exception as error:  # of the compiler, its linker, the cache's folder, the driver
        hint = "; TRITON_CACHE_DIR names another folder" if isinstance(error, OSError) else ""
        return f"Triton does not run here: {one_line(error)}{hint}"
    return ""


def _interpreter_problem() -> str:
    """A known reason why Triton's interpreter cannot run here; "" without one."""
    triton, numpy = (_release(name) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return (
            "the interpreter of Triton 3.6 and older fails with numpy 2.4: pip install 'numpy<2.4'"
        )
    return ""


def _release(package: str) -> tuple[int, ...]:
    """(major, minor) of an installed package."""
    return tuple(map(int, version(package).split(".")[:2]))


def implementation() -> str:
    """The implementation in use: `triton` or `reference`."""
    return _implementation


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a device, 90 for an H100: a few tiles depend on it.

    Off a GPU, under the interpreter, that of the GPU on which the tiles were measured, 90.
    """
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

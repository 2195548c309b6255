"""Which implementation the public functions run: PyTorch reference or Triton kernel."""

import functools
import importlib.util
import os
from importlib.metadata import version

import torch

from pipeline.errors import UserError
from pipeline.gpu_errors import one_line

_implementation = "reference"
OLDEST = 80  # compute capability: below it bf16, and the shared memory of the tiles, is lacking


def use(implementation: str = "auto", device: str | torch.device = "cpu") -> str:
    """Choose the implementation for this process, once, before the first step.

    implementation: `auto` (Triton on a CUDA device where it is installed and a first kernel runs,
    otherwise the reference), `triton` or `reference`. On the CPU `triton` runs under Triton's
    interpreter, which needs TRITON_INTERPRET=1 in the environment.
    Returns the line for the log. Raises UserError when the choice cannot run here.
    """
    global _implementation
    kind = torch.device(device).type
    installed = importlib.util.find_spec("triton") is not None
    problem = ""
    if implementation == "auto":
        # Of AMD's GPUs, which torch calls cuda too, none was ever seen by the Triton kernels.
        tried = kind == "cuda" and torch.version.hip is None and installed
        problem = triton_problem(torch.device(device)) if tried else ""
        chosen = "triton" if tried and not problem else "reference"
    elif implementation in ("triton", "reference"):
        chosen = implementation
    else:
        raise UserError(f"kernels must be auto, triton or reference, not {implementation!r}")
    if chosen == "triton" and not installed:
        raise UserError("kernels: triton was asked for, but the package triton is not installed")
    wrong = triton_problem(torch.device(device)) if chosen == "triton" and kind == "cuda" else ""
    if wrong:
        raise UserError(f"kernels: triton on {kind}: {wrong}; or choose kernels: reference")
    interpreted = chosen == "triton" and kind != "cuda"
    if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"kernels: triton on {kind} runs only under Triton's interpreter: set "
            "TRITON_INTERPRET=1, or choose kernels: reference"
        )
    if interpreted and (problem := _interpreter_problem()):
        raise UserError(f"kernels: triton on {kind}: {problem}, or choose kernels: reference")
    _implementation = chosen
    more = ", interpreted" if interpreted else f": {problem}" if problem else ""
    return f"kernels: {chosen} ({implementation} on {kind}{more})"


@functools.cache
def triton_problem(device: torch.device) -> str:
    """Why Triton's kernels do not run on a CUDA device; "" where a first one does.

    They need a C compiler with Python's headers, and a folder for what is compiled from which
    libraries can be loaded (TRITON_CACHE_DIR).
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
    """What keeps Triton's interpreter from running here; "" where nothing is known to."""
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

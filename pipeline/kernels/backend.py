"""Which implementation the public functions run: PyTorch reference or Triton kernel."""

import functools
import importlib.util
import os
from importlib.metadata import version

import torch

from pipeline.errors import UserError

_implementation = "reference"


def use(implementation: str = "auto", device: str | torch.device = "cpu") -> str:
    """Choose the implementation for this process, once, before the first step.

    implementation: `auto` (Triton on a CUDA device where Triton is installed, otherwise the
    reference), `triton` or `reference`. On the CPU `triton` runs under Triton's interpreter,
    which needs TRITON_INTERPRET=1 in the environment.
    Returns the line for the log. Raises UserError when the choice cannot run here.
    """
    global _implementation
    kind = torch.device(device).type
    installed = importlib.util.find_spec("triton") is not None
    if implementation == "auto":
        # Of AMD's GPUs, which torch calls cuda too, none was ever seen by the Triton kernels.
        tried = kind == "cuda" and torch.version.hip is None
        chosen = "triton" if tried and installed else "reference"
    elif implementation in ("triton", "reference"):
        chosen = implementation
    else:
        raise UserError(f"kernels must be auto, triton or reference, not {implementation!r}")
    if chosen == "triton" and not installed:
        raise UserError("kernels: triton was asked for, but the package triton is not installed")
    interpreted = chosen == "triton" and kind != "cuda"
    if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"kernels: triton on {kind} runs only under Triton's interpreter: set "
            "TRITON_INTERPRET=1, or choose kernels: reference"
        )
    if interpreted and (problem := _interpreter_problem()):
        raise UserError(f"kernels: triton on {kind}: {problem}, or choose kernels: reference")
    _implementation = chosen
    return f"kernels: {chosen} ({implementation} on {kind}{', interpreted' * interpreted})"


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

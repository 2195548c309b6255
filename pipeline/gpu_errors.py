"""Errors of CUDA and NCCL as a sentence for whoever runs the machines: which GPU, what to do."""

from __future__ import annotations

import re
import socket

# What NCCL says where another rank or the network between is gone.
_GONE = re.compile(
    "remote (peer|process)|[Cc]onnection (closed|reset|refused|timed out)|[Bb]roken pipe|"
    "[Tt]imed ?out|[Tt]imeout|[Nn]o route to host|[Nn]etwork is unreachable"
)
# Words of NCCL's → what to do.
_SHARED = "/dev/shm"  # noqa: S108 (Linux's own)
_OF_NCCL = {
    "Duplicate GPU|the same GPU": "start at most one rank per GPU, and let no two see the same one",
    f"{_SHARED}|shared memory": f"{_SHARED} is too small or not shared: docker run --shm-size 32g, "
    "or an emptyDir of medium Memory there under Kubernetes",
    "socket interface": "NCCL_SOCKET_IFNAME must name an interface of this host",
}
# Words of CUDA's → what to do.
_FAULTY = (
    "the GPU or its link is faulty: leave it out (nvidia-smi -q, and the Xid lines of dmesg, say "
    "more); the same command resumes on another one"
)
_KERNEL = (
    "a kernel read or wrote where it must not, or the GPU is faulty (Xid lines of dmesg); "
    "CUDA_LAUNCH_BLOCKING=1 shows which kernel"
)
_OF_CUDA = {
    "uncorrectable ECC error|uncorrectable NVLink error|hardware stack error|hardware error|"
    "GPU is lost|fallen off the bus": _FAULTY,
    "illegal memory access|unspecified launch failure|misaligned address|illegal instruction|"
    "device-side assert": _KERNEL,
    "CUDA error: out of memory": "another process holds its memory (nvidia-smi shows which)",
    "no kernel image is available": "this torch has no code for this GPU: install one that has",
    "busy or unavailable": "another process holds it (compute mode Exclusive), or it must be reset",
    "driver version is insufficient|unsupported display driver": "update the driver, or install a "
    "torch for an older CUDA",
    "system not yet initialized": "nvidia-fabricmanager does not run on this host",
}


def _said(words: dict[str, str], text: str) -> str:
    return next((what for pattern, what in words.items() if re.search(pattern, text)), "")


def nccl_fault(error: BaseException) -> str:
    """A fault of NCCL's on this host as a sentence; "" where it lost contact to another rank, and
    for any other error."""
    text = str(error)
    if type(error).__name__ != "DistBackendError" or "NCCL error in:" not in text:
        return ""
    head, _, last = text.partition("Last error:")
    told = " ".join(last.split()) or head.splitlines()[0].split(", ", 1)[-1]
    if "ncclRemoteError" in text or _GONE.search(told):
        return ""
    advice = _said(_OF_NCCL, told) or _said(_OF_CUDA, told) or "NCCL_DEBUG=INFO shows more"
    return f"NCCL on {socket.gethostname()}: {told}; {advice}"


def cuda_fault(error: BaseException) -> str:
    """An error of CUDA's as a sentence that names the GPU; "" for any other error."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = next((line for line in lines if re.search(r"CUDA error:|Error \[CUDA\]:", line)), "")
    if not told:
        return ""
    advice = _said(_OF_CUDA, told)
    return f"{told} on {_gpu()} of {socket.gethostname()}{'; ' * bool(advice)}{advice}"


def _gpu() -> str:
    """This process's GPU, by the number that it has here and by the driver's name for it."""
    import torch

    try:
        number = torch.cuda.current_device()
        about = torch.cuda.get_device_properties(number)
    except (RuntimeError, AssertionError):  # nothing can be asked any more
        return "a GPU"
    return f"cuda:{number} ({about.name}, GPU-{getattr(about, 'uuid', '?')})"


def one_line(error: BaseException) -> str:
    """An error's first line, of a traceback's also the last; the class of one without words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    traced = any("Traceback (" in line for line in lines)
    return f"{lines[0]} {lines[-1]}" if traced else lines[0]

"""Errors of CUDA and NCCL as a sentence for whoever runs the machines: which GPU, what to do."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path
from types import ModuleType

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
    "driver version is insufficient|unsupported display driver|driver on your system is too old": (
        "update the driver, or install a torch for an older CUDA"
    ),
    "system not yet initialized": "nvidia-fabricmanager does not run on this host",
}


def _said(words: dict[str, str], text: str) -> str:
    return next((what for pattern, what in words.items() if re.search(pattern, text)), "")


def nccl_fault(error: BaseException) -> str:
    """A fault of NCCL's on this host as a sentence; "" where it lost contact with another rank, and
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
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd))
        return f"'{command[:80]}' ended with exit code {error.returncode}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    traced = any("Traceback (" in line for line in lines)
    return f"{lines[0]} {lines[-1]}" if traced else lines[0]


def driver_version(proc: Path = Path("/proc")) -> str:
    """NVIDIA's kernel driver, "" where there is none."""
    try:
        words = (proc / "driver/nvidia/version").read_text().split("\n")[0].split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdecimal() and "." in word), "")


def why_no_gpu(torch: ModuleType, proc: Path = Path("/proc")) -> str:
    """Why torch sees no GPU although the machine has NVIDIA's driver; "" where it has none."""
    if not driver_version(proc):
        return ""
    if not torch.version.cuda:
        return "this torch is built without CUDA: install the CUDA build (make setup does)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        told = one_line(error)
    else:
        told = "it finds none"
    advice = _said(_OF_CUDA, told) or "see nvidia-smi"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        advice += f", and CUDA_VISIBLE_DEVICES, which is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    return f"torch's CUDA {torch.version.cuda} does not start on its driver ({told}): {advice}"


def no_code(torch: ModuleType, capability: tuple[int, int]) -> str:
    """Why this torch cannot use a GPU of a compute capability; "" where it can.

    Code runs on GPUs of its own major version from its minor version on (of its own alone where it
    ends in "a"), PTX (`compute_…`) on all later ones.
    """
    architectures = torch.cuda.get_arch_list()
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if not found:  # AMD's
            return ""
        kind, special, of = found[1], found[4], (int(found[2]), int(found[3]))
        if of == capability or (kind == "compute" and not special and of < capability):
            return ""
        if special != "a" and of[0] == capability[0] and of[1] < capability[1]:
            return ""
    if not architectures:
        return ""
    return (
        f"torch {torch.__version__} has no code for sm_{capability[0]}{capability[1]} (but for "
        f"{', '.join(architectures)}): install a torch that has"
    )

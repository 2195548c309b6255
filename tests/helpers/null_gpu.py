"""A GPU that computes nothing (null_gpu.c), for a process of its own on a machine without a GPU.

The real CUDA build of torch, Triton's compiler and DeepSpeed run their host code on it: launches
are exact, times are the host's, figures mean nothing. `environment` is what the process needs.
"""

import ctypes
import importlib.util
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
VARIABLE = "RELAXMIM_NULL_GPU"
# What is about this machine's own devices.
OF_OTHERS = ("TRITON_INTERPRET", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")


class NoCompilerError(RuntimeError):
    """The stand-in cannot be built here; one sentence."""


def headers() -> list[Path]:
    """Folders of cuda_runtime_api.h as torch's wheels bring it, and of what Triton adds."""
    site = Path(importlib.util.find_spec("torch").origin).parents[1]
    folders = [*site.glob("nvidia/*/include"), site / "triton/backends/nvidia/include"]
    found = [folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()]
    if len(found) < 2:
        raise NoCompilerError("torch is here without CUDA's headers")
    return found


def build(folder: Path) -> Path:
    """Compile the stand-in into a folder; the library."""
    library = folder / "libcuda.so.1"  # the name by which Triton and NVRTC ask for the driver
    command = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-w",
               *(f"-I{path}" for path in headers()), str(SOURCE), "-Wl,-soname,libcuda.so.1",
               "-o", str(library), "-ldl"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NoCompilerError(f"no C compiler ({error})") from None
    if done.returncode:
        raise NoCompilerError(f"null_gpu.c does not compile: {done.stderr[-2000:]}")
    return library


def environment(folder: Path) -> dict[str, str]:
    """Variables under which a process sees the stand-in as its one GPU; nothing is compiled into
    this environment's own caches."""
    library = build(folder)
    link = folder / "libcuda.so"  # by which Triton 3.4 links
    if not link.is_symlink():
        link.symlink_to(library.name)
    clean = {k: v for k, v in os.environ.items() if k not in OF_OTHERS}
    return clean | {
        "LD_PRELOAD": str(library),
        VARIABLE: str(library),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "CXX": "none",  # DeepSpeed's ops are not compiled: torch's fused AdamW
    }


def here() -> bool:
    """Whether this process runs on the stand-in."""
    return VARIABLE in os.environ


def counts() -> tuple[int, int, int, int]:
    """(launches, copies, waits of the host, reads of the device) of this process so far."""
    out = (ctypes.c_long * 4)()
    ctypes.CDLL(os.environ[VARIABLE]).null_gpu_counts(out)
    return tuple(out)  # type: ignore[return-value]

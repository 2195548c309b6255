"""How DeepSpeed's CUDA ops are compiled: for which GPUs, and by which headers and libraries.

TORCH_CUDA_ARCH_LIST does not say for which: an environment sets it for other extensions, in
spellings that DeepSpeed's builders fail on ("9.0a"), or without the GPU that is here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

LIST = "TORCH_CUDA_ARCH_LIST"


def cuda_architectures() -> str:
    """Those of this machine's GPUs, as DeepSpeed and torch both read them: "8.0;9.0+PTX".

    Where no GPU is visible, as on a build node, those of TORCH_CUDA_ARCH_LIST; ValueError where
    it names none.
    """
    found = {torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())}
    if found:
        # A GPU newer than those that torch is for gets their code, as PTX.
        newest = max(map(_capability, torch.cuda.get_arch_list()), default=max(found))
        found = {min(gpu, newest) for gpu in found}
        return _listed(found, {max(found)})
    return _given(os.environ.get(LIST, ""))


@contextlib.contextmanager
def compiling_for(architectures: str) -> Iterator[None]:
    """The environment of a build for these architectures; afterwards it is what it was."""
    values = {
        LIST: architectures,
        # Where compiler and linker look last: a slim toolkit has no headers of CUDA's libraries,
        # which torch's wheels bring, and a wrapper of nvcc in /usr/local/bin has none beside it.
        "CPLUS_INCLUDE_PATH": _after("CPLUS_INCLUDE_PATH", *_headers()),
        "LIBRARY_PATH": _after("LIBRARY_PATH", "/usr/local/cuda/lib64"),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _after(name: str, *folders: str) -> str:
    """What a search path holds, then these folders."""
    return os.pathsep.join(filter(None, [os.environ.get(name), *folders]))


def _headers() -> list[str]:
    return [str(folder) for folder in Path(torch.__file__).parents[1].glob("nvidia/*/include")]


def _given(given: str) -> str:
    """The architectures that a list names, in any spelling of a number, or by torch's names."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    parts = [re.sub(r"(?<=\d)[af](?=$|\+)", "", part) for part in re.split(r"[;,\s]+", given)]
    try:
        with compiling_for(";".join(filter(None, parts))):
            flags = _get_cuda_arch_flags()
    except (ValueError, IndexError):  # unknown; no GPU for "" and "native"
        raise ValueError(
            f"{LIST} is {given!r}: where no GPU is visible it must name capabilities, such as "
            "9.0 or 8.0;9.0+PTX"
        ) from None
    codes = [flag.rpartition("code=")[2] for flag in flags]
    return _listed(
        {_capability(code) for code in codes if code.startswith("sm_")},
        {_capability(code) for code in codes if code.startswith("compute_")},
    )


def _capability(code: str) -> tuple[int, int]:
    """(9, 0) of sm_90 or compute_90a."""
    major, minor = re.fullmatch(r"[a-z]+_(\d+)(\d)[a-z]?", code).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def _listed(binaries: set[tuple[int, int]], ptx: set[tuple[int, int]]) -> str:
    return ";".join(f"{a}.{b}{'+PTX' * ((a, b) in ptx)}" for a, b in sorted(binaries))

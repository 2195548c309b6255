"""The GPUs that DeepSpeed's CUDA ops are compiled for, whatever TORCH_CUDA_ARCH_LIST holds.

An environment sets that list for other extensions, in spellings that DeepSpeed's builders fail on
("9.0a"), or without the GPU that is here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

VARIABLE = "TORCH_CUDA_ARCH_LIST"


def cuda_architectures() -> str:
    """Those of this machine's GPUs, as DeepSpeed and torch both read them: "8.0;9.0+PTX".

    Where no GPU is visible, as on a build node, those of TORCH_CUDA_ARCH_LIST; ValueError where
    it names none.
    """
    found = {torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())}
    if found:
        newest = max(map(_capability, torch.cuda.get_arch_list()), default=max(found))
        found = {
            min(gpu, newest) for gpu in found
        }  # newer ones compile the PTX of what torch is for
        return _listed(found, {max(found)})
    return _given(os.environ.get(VARIABLE, ""))


@contextlib.contextmanager
def compiling_for(architectures: str) -> Iterator[None]:
    """TORCH_CUDA_ARCH_LIST holds these architectures, then what it held before."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = architectures
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _given(given: str) -> str:
    """The architectures that a list names, in any spelling of a number, or by torch's names."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    parts = [re.sub(r"(?<=\d)[af](?=$|\+)", "", part) for part in re.split(r"[;,\s]+", given)]
    try:
        with compiling_for(";".join(filter(None, parts))):
            flags = _get_cuda_arch_flags()
    except (ValueError, IndexError):  # unknown; no GPU for "" and "native"
        raise ValueError(
            f"{VARIABLE} is {given!r}: where no GPU is visible it must name capabilities, such as "
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

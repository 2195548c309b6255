"""Compile the kernels for GPUs that are not here, and read what the compiler made of them.

The public functions are called as training calls them; every kernel launch is recorded instead of
run, with the arguments, strides and settings it would have had on a device, and then compiled by
Triton for a given compute capability. Needs TRITON_INTERPRET unset.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pipeline.kernels import backend
from pipeline.kernels.cases import Case, Sizes

CAPABILITIES = (80, 90, 100)
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the public function asked for it."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Compiled:
    """What the cubin and the PTX say. Widths: bits of a memory instruction -> how many of them."""

    registers: int
    spills: int  # bytes of local memory per thread
    shared: int  # bytes per program
    warps: int
    loads: Counter[int]
    stores: Counter[int]

    def occupancy(self, capability: int) -> float:
        """Resident warps of a multiprocessor over its 64, as the CUDA occupancy rules give it."""
        per_warp = -(-self.registers // 8) * 8 * 32
        by_registers = 65536 // (per_warp * self.warps)
        by_shared = SHARED_PER_SM[capability] // (self.shared + 1024)
        return min(32, by_registers, by_shared, 64 // self.warps) * self.warps / 64


@contextmanager
def recorded(capability: int = 90) -> Iterator[list[Launch]]:
    """Record kernel launches of the Triton implementation, as for a GPU of this compute
    capability, instead of running them."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs, grid))

    run, before, found = JITFunction.run, backend._implementation, backend.capability
    JITFunction.run, backend._implementation = record, "triton"
    backend.capability = lambda device: capability  # type: ignore[assignment]
    try:
        yield launches
    finally:
        JITFunction.run, backend._implementation, backend.capability = run, before, found


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile a recorded launch for one compute capability (80, 90, 100)."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.kwargs, bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=target, options=options.__dict__)
    ptx = kernel.asm["ptx"]
    registers, spills = _resources(kernel.asm["cubin"])
    return Compiled(
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        loads=_widths(ptx, "ld") + _asynchronous(ptx),
        stores=_widths(ptx, "st"),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread of the one kernel in a cubin.

    The kernels keep nothing in local memory by intention: whatever is there was spilled.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(path)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", log)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump reported no resources: {log}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local


def _widths(ptx: str, instruction: str) -> Counter[int]:
    """Bits moved by each global load or store of the PTX."""
    found = re.findall(rf"\b{instruction}\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)", ptx)
    return Counter(int(vector or 1) * int(bits) for vector, bits in found)


def _asynchronous(ptx: str) -> Counter[int]:
    """Bits of each cp.async, a load from global to shared memory."""
    found = re.findall(
        r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^]]*\],\s*\[[^]]*\],\s*(\w+)", ptx
    )
    return Counter(int(count, 0) * 8 for count in found)


SIZES = {
    "vit-b16": Sizes(16),
    "vit-l14": Sizes(16, patch=14, width=1024, keep=64),
    "demo": Sizes(16, side=64, patch=8, width=192, decoder=128, keep=16),
}  # the batch does not matter


def run_case(case: Case, dtype: torch.dtype, size: str, autocast: bool = False) -> None:
    """The case's call at a model's sizes, forward and backward. autocast: in bf16."""
    call = case.inputs(replace(SIZES[size], dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call()
    if case.gradient:
        out.sum().backward()

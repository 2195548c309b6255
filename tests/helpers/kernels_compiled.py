"""Compile the kernels for GPUs that are not here, and read what the compiler made of them.

The public functions are called as training calls them; every kernel launch is recorded instead of
run, with the arguments, strides and settings it would have had on a device, and then compiled by
Triton for a given compute capability. Needs TRITON_INTERPRET unset.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pipeline import kernels
from pipeline.kernels import backend

CAPABILITIES = (80, 90, 100)
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


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
def recorded() -> Iterator[list[Launch]]:
    """Record kernel launches of the Triton implementation instead of running them."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs, grid))

    run, before = JITFunction.run, backend._implementation
    JITFunction.run, backend._implementation = record, "triton"
    try:
        yield launches
    finally:
        JITFunction.run, backend._implementation = run, before


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


def cases(dtype: torch.dtype, size: str = "vit-b16") -> dict[str, Callable[[], None]]:
    """Calls of every op, forward and backward, at a model's sizes (the batch does not matter)."""
    batch, side, patch, width, decoder, keep = {
        "vit-b16": (16, 224, 16, 768, 512, 49),
        "vit-l14": (16, 224, 14, 1024, 512, 64),
        "demo": (16, 64, 8, 192, 128, 16),
    }[size]
    length, values = (side // patch) ** 2, 3 * patch * patch
    image = torch.zeros(batch, side, side, 3, dtype=torch.uint8)
    positions = torch.arange(length, dtype=torch.int32).repeat(batch, 1)
    visible, region = positions[:, :keep].contiguous(), positions[:, keep:].contiguous()

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    def sample(policy: str, second: int) -> None:
        kernels.sample_masks(torch.arange(batch), seed=5, epoch=3, length=length,
                             visible=(keep, second), policy=policy)  # fmt: skip

    def embed() -> None:
        weight, bias = leaf(width, 3, patch, patch), leaf(width)
        position = torch.zeros(length, width, dtype=dtype)
        kernels.embed_visible(image, visible, weight, bias, position, **IMAGENET).sum().backward()

    def place() -> None:
        tokens, mask_token = leaf(batch, keep + 1, decoder), leaf(decoder)
        position = torch.zeros(length + 1, decoder, dtype=dtype)
        kernels.place_tokens(tokens, positions, mask_token, position, prefix=1).sum().backward()

    def loss(relaxed: bool) -> None:
        prediction = leaf(batch, length - keep, values)
        other = leaf(batch, length - keep, values) if relaxed else None
        weight = torch.ones(region.shape) if relaxed else None
        kernels.patch_loss(prediction, image, region, patch=patch, other=other, weight=weight,
                           **IMAGENET).sum().backward()  # fmt: skip

    def infonce(negatives: str) -> None:
        query, key = leaf(batch, length, width), leaf(batch, length, width)
        kernels.token_infonce(query, key, temperature=0.2, negatives=negatives,
                              offset=0)[0].backward()  # fmt: skip

    def jitter(whole: bool) -> None:
        parameters = kernels.jitter_parameters(torch.arange(batch), seed=0, epoch=0, view=0)
        where = {} if whole else {"visible": visible, "patch": patch}
        kernels.color_jitter(image, *parameters, **where)

    return {
        "sample_masks complement": lambda: sample("complement", 0),
        "sample_masks independent": lambda: sample("independent", length - keep),
        "embed_visible": embed,
        "place_tokens": place,
        "patch_loss": lambda: loss(False),
        "patch_loss relaxed": lambda: loss(True),
        "token_infonce position": lambda: infonce("position"),
        "color_jitter whole": lambda: jitter(True),
        "color_jitter visible": lambda: jitter(False),
    }

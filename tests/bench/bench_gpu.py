"""Time every kernel on a CUDA device against its PyTorch reference and a device copy.

Usage: python tests/bench/bench_gpu.py [--batch 256] [--dtype bf16]. Behind `make bench-gpu`.
Without a CUDA device it says so and exits with 2. ViT-B/16 at 224 x 224; forward, and backward
where there is one. `copy`: the time to copy as many bytes as the op must at least move.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kernels_traffic import measured
from torch import Tensor

from pipeline import kernels
from pipeline.kernels.cases import Sizes, all_cases

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def calls(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """One call of every case on random inputs by name, also with backward where there is one."""
    found: dict[str, Callable[[], Any]] = {}
    for case in all_cases().values():
        forward = case.inputs(sizes)
        found[case.name] = forward
        if case.gradient:
            found[f"{case.name} with backward"] = backward(forward)
    return found


def backward(function: Callable[[], Tensor]) -> Callable[[], None]:
    """The call and its backward, from a gradient of ones."""
    upstream = torch.ones_like(function())
    return lambda: function().backward(upstream)


def least_bytes(sizes: Sizes) -> dict[str, int]:
    """Bytes an op must at least move, where the traffic table has it."""
    table = measured(sizes)
    return {name: sum(t.minimum for t in launches) for name, (_, _, launches) in table.items()}


def timings(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Microseconds of each call by implementation, medians as Triton's do_bench takes them."""
    from triton.testing import do_bench

    out: dict[str, dict[str, float]] = {}
    for implementation in ("reference", "triton"):
        kernels.use(implementation, "cuda")
        for name, call in calls(replace(sizes, device="cuda")).items():
            milliseconds = do_bench(call, return_mode="median")
            out.setdefault(name, {})[implementation] = 1000 * milliseconds
    for name, count in least_bytes(sizes).items():
        source = torch.empty(count // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = do_bench(lambda to=target, of=source: to.copy_(of), return_mode="median")
        if name in out:
            out[name]["copy"] = 1000 * copy
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench-gpu times kernels on a CUDA device, and there is none here",
              file=sys.stderr)  # fmt: skip
        return 2
    found = timings(Sizes(batch=options.batch, dtype=DTYPES[options.dtype]))
    print(f"{torch.cuda.get_device_name()}, batch {options.batch}, {options.dtype}: microseconds\n")
    print(f"{'op':30} {'reference':>10} {'triton':>10} {'copy':>10}")
    for name, row in found.items():
        cells = [f"{row[c]:.1f}" if c in row else "-" for c in ("reference", "triton", "copy")]
        print(f"{name:30} {cells[0]:>10} {cells[1]:>10} {cells[2]:>10}")
    print(
        json.dumps({name: {k: round(v, 1) for k, v in row.items()} for name, row in found.items()})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time every kernel on a CUDA device beside its PyTorch reference, eager and compiled, and a copy.

Usage: python tests/bench/bench_gpu.py [--batch 256] [--dtype bf16]. Behind `make bench-gpu`.
Without a CUDA device it says so and exits with 2. ViT-B/16 at 224 x 224; forward, and forward with
backward where there is one. `copy`: the time to copy as many bytes as the op must at least move;
`of copy`: that over the kernel's time, 1 for a kernel that only moves its bytes.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import kernels
from pipeline.gpu_errors import one_line
from pipeline.kernels.cases import Sizes, all_cases, ops

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WAYS = ("triton", "eager", "compiled")  # the kernel, its reference, that by torch.compile
Call = Callable[[], Any]
Row = dict[str, float]


def calls(sizes: Sizes) -> dict[str, tuple[Call, bool]]:
    """(call of a case on random inputs, whether to run backward too) by name."""
    found: dict[str, tuple[Call, bool]] = {}
    for case in all_cases().values():
        forward = case.inputs(sizes)
        found[case.name] = forward, False
        if case.gradient:
            found[f"{case.name} with backward"] = forward, True
    return found


def leaves_of(output: Tensor) -> list[Tensor]:
    """The leaves that a result has gradients for, in the order of its graph."""
    seen, found, waiting = set(), [], [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [behind for behind, _ in reversed(node.next_functions)]
    return found


def first_tensor(output: Any) -> Tensor:
    """A result that has a gradient: the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def with_backward(function: Call) -> Call:
    """The call and its backward from a gradient of ones; gradients are returned, not added up."""
    output = first_tensor(function())
    leaves, upstream = leaves_of(output), torch.ones_like(output)
    return lambda: torch.autograd.grad(first_tensor(function()), leaves, upstream)


class Moved:
    """The book of `as_launch` (pipeline/kernels/cases.py): bytes alone."""

    def __init__(self) -> None:
        self.closed, self.bytes = False, 0

    def add(self, flops: int, moved: int) -> None:
        """One launch."""
        self.bytes += moved


def least_bytes(sizes: Sizes) -> dict[str, int]:
    """Bytes that a call must at least move, inputs and outputs once, as the roofline books them."""
    found: dict[str, int] = {}
    for name, module in ops().items():
        if not hasattr(module, "as_launch"):
            continue
        op = getattr(kernels, name)
        for case in module.CASES:
            for backward in (False, True)[: 1 + case.gradient]:
                book = Moved()
                setattr(kernels, name, module.as_launch(book, op))
                try:
                    with FakeTensorMode(allow_non_fake_inputs=True):
                        function = case.inputs(sizes)
                        (with_backward(function) if backward else function)()
                finally:
                    setattr(kernels, name, op)
                # with_backward has called it once before, to find its leaves
                both = case.name + " with backward" * backward
                found[both] = book.bytes - (found[case.name] if backward else 0)
    return {name: count for name, count in found.items() if count}


def microseconds(call: Call, device: str, times: int = 20) -> float:
    """Median of a call's time on the device, its launches queued behind a pause; on the CPU one
    call's. A call in a step is launched while the device works too; what launching costs is
    counted elsewhere (bench_launches)."""
    if device == "cuda":
        pause, flushed = 4_000_000, torch.empty(1 << 28, dtype=torch.uint8, device=device)
        for _ in range(3):
            call()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(times)]
        for begin, end in marks:
            flushed.zero_()  # no input is in the L2 cache
            torch.cuda._sleep(pause)  # cycles, about 2 ms
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
        return 1000 * statistics.median(begin.elapsed_time(end) for begin, end in marks)
    started = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - started)


def time_way(way: str, function: Call, backward: bool, device: str, backend: str) -> float:
    """Microseconds of a call in one of WAYS. backend: torch.compile's."""
    kernels.use("triton" if way == "triton" else "reference", device)
    if way == "compiled":
        torch.compiler.reset()
        function = torch.compile(function, dynamic=False, backend=backend)
    return microseconds(with_backward(function) if backward else function, device)


def time_copy(count: int, device: str) -> float:
    """Microseconds of a copy that reads and writes `count` bytes together."""
    source = torch.empty(max(1, count // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return microseconds(lambda: target.copy_(source), device)


def timings(
    sizes: Sizes,
    *,
    backend: str = "inductor",
    every: int = 1,
    left: Callable[[], float] = lambda: float("inf"),
    note: Callable[[dict[str, Row]], None] = lambda rows: None,
    failed: list[str] | None = None,
) -> dict[str, Row]:
    """Microseconds of each call by way, and of a copy of its least bytes.

    backend: torch.compile's. every: time one of so many calls. left: seconds that remain; without
    any, the compiled references, which take longest and come last, are left out. note: is told of
    the rows as they grow. failed: gets what fails, and why; without it that is raised.
    """
    least, device = least_bytes(replace(sizes, device="cpu")), sizes.device
    rows: dict[str, Row] = {}
    for way in WAYS:
        for name, (function, backward) in list(calls(sizes).items())[::every]:
            row = rows.setdefault(name, {})
            if way == "compiled" and left() < 15:
                continue
            try:
                row[way] = time_way(way, function, backward, device, backend)
            except Exception as error:
                if failed is None:
                    raise
                traceback.print_exc()
                failed.append(f"{name}, {way}: {one_line(error)}")
                continue
            if way == "triton" and name in least:
                row["copy"] = time_copy(least[name], device)
                row["of copy"] = row["copy"] / row["triton"]
            note(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench-gpu times kernels on a CUDA device, and there is none here",
              file=sys.stderr)  # fmt: skip
        return 2
    found = timings(Sizes(batch=options.batch, dtype=DTYPES[options.dtype], device="cuda"))
    print(f"{torch.cuda.get_device_name()}, batch {options.batch}, {options.dtype}: microseconds\n")
    columns = (*WAYS, "copy", "of copy")
    print(f"{'op':30}" + "".join(f"{column:>10}" for column in columns))
    for name, row in found.items():
        cells = [f"{row[c]:.3g}" if c in row else "-" for c in columns]
        print(f"{name:30}" + "".join(f"{cell:>10}" for cell in cells))
    print(
        json.dumps({name: {k: round(v, 3) for k, v in row.items()} for name, row in found.items()})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

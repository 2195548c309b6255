"""Report on the Triton kernels without a GPU: what the compiler made of them, what they move.

Usage: python tests/bench/kernels_report.py [--quick]. Behind `make -s kernels-report`; the last
line is JSON. --quick compiles ViT-B/16 only, in bf16, and in fp32 for sm_80. autocast: fp32 under
torch.autocast in bf16, where that changes a kernel.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

os.environ.pop("TRITON_INTERPRET", None)  # the kernels are compiled here, not interpreted

import torch
from kernels_compiled import CAPABILITIES, SIZES, Compiled, compile_for, recorded, run_case
from kernels_traffic import measured, ratios

from pipeline.kernels.cases import Sizes, all_cases

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "autocast": torch.float32}
Row = tuple[str, str, str, str, int, Compiled]


def compile_case(case: str, dtype: str, size: str, capabilities: tuple[int, ...]) -> list[Row]:
    """Compile every launch of one call; equal rows (the norms of queries and of keys) once."""
    torch.set_num_threads(1)
    rows = {}
    for capability in capabilities:
        with recorded(capability) as launches:
            run_case(all_cases()[case], DTYPES[dtype], size, dtype == "autocast")
        for launch in launches:
            compiled = compile_for(launch, capability)
            name = launch.kernel.__name__.removesuffix("_kernel")
            if name.endswith("infonce_backward"):
                name += " dq" if launch.kwargs["OWNS_ROWS"] else " dk"
            rows[name, capability] = (name, case, dtype, size, capability, compiled)
    return list(rows.values())


def compile_all(quick: bool) -> list[Row]:
    """All rows of the table; two processes, as compiling is most of the work."""
    jobs = []
    for size in list(SIZES)[:1] if quick else SIZES:
        for dtype in DTYPES:
            capabilities = (80,) if quick and dtype == "fp32" else CAPABILITIES
            for case in all_cases().values():
                if dtype == "bf16" or (case.typed if dtype == "fp32" else case.rounds):
                    jobs.append((case.name, dtype, size, capabilities))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(compile_case, *job) for job in jobs]
        return [row for part in parts for row in part.result()]


def widths(counts: dict[int, int]) -> str:
    """`128x6 32x2`: six instructions of 128 bits and two of 32."""
    return " ".join(f"{bits}x{counts[bits]}" for bits in sorted(counts, reverse=True)) or "-"


def print_compiled(rows: list[Row]) -> None:
    print("Compiled by Triton and ptxas. Spills and shared memory in bytes; occupancy: resident")
    print("warps of 64 by registers and shared memory; loads, stores: bits x instructions (PTX).\n")
    header = ("kernel", "call", "dtype", "size", "sm", "regs", "spill", "shared", "occ.")
    form = "{:31} {:24} {:8} {:8} {:>4} {:>5} {:>6} {:>7} {:>6}  {:28} {}"
    print(form.format(*header, "loads", "stores"))
    for name, case, dtype, size, capability, c in rows:
        figures = (c.registers, c.spills, c.shared, f"{c.occupancy(capability):.0%}")
        memory = (widths(c.loads), widths(c.stores))
        print(form.format(name, case, dtype, size, capability, *figures, *memory))


def print_traffic(sizes: Sizes) -> None:
    print(
        f"\nBytes moved, ViT-B/16 at 224 x 224, bf16, batch {sizes.batch}, in MB. MAE, reference:"
    )
    print("aten ops' inputs and outputs, counted as they run. requested: all programs' loads and")
    print("stores and the small ops around them; moved: distinct 32-byte sectors, the bus traffic")
    print("while the L2 cache keeps what programs share; least: inputs once, outputs once.\n")
    form = "{:28} {:>9} {:>9} {:>9} {:>8} {:>8} {:>14} {:>11}"
    names = ("MAE", "reference", "requested", "moved", "least", "requested/MAE", "moved/least")
    print(form.format("op", *names))
    for op, (chain, ours, launches) in measured(sizes).items():
        requested = sum(t.requested + t.around for t in launches)
        moved, least = sum(t.moved for t in launches), sum(t.minimum for t in launches)
        sizes_mb = [f"{x / 1e6:.1f}" for x in (chain, ours, requested, moved, least)]
        print(form.format(op, *sizes_mb, f"{requested / chain:.3f}", f"{moved / least:.3f}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ViT-B/16 only; fp32 on sm_80 only")
    quick = parser.parse_args().quick
    rows = compile_all(quick)
    print_compiled(rows)
    print_traffic(Sizes())
    ratio, of_minimum = ratios(Sizes())
    summary = {
        "spills": sum(c.spills for *_, c in rows),
        "compiled": len(rows),
        "bytes_ratio": {name: round(value, 4) for name, value in ratio.items()},
        "moved_over_least": {name: round(value, 4) for name, value in of_minimum.items()},
    }
    if quick:
        named = {f"{name} {dtype} {size} sm_{sm}": c for name, _, dtype, size, sm, c in rows}
        summary["widest"] = {row: [max(c.loads), max(c.stores)] for row, c in named.items()}
        summary["spilling"] = {row: c.spills for row, c in named.items() if c.spills}
        summary["shared"] = max(c.shared for c in named.values())
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())

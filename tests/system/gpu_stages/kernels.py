"""Kernels: their tests compiled, their numerics at real sizes, their speed, a profile of one."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import shutil
import subprocess
import sys
import traceback
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
from bench_gpu import calls, first_tensor, leaves_of, timings
from kernels_testing import TOLERANCE
from torch import Tensor

from gpu_stages.common import ROOT, Fault, Skip, Where
from pipeline import kernels
from pipeline.gpu_errors import one_line
from pipeline.kernels.cases import Sizes, all_cases

Agreement = dict[str, float]


def kernel_tests(where: Where) -> dict[str, Any]:
    """The kernel tests on the device; in a rehearsal one of them under Triton's interpreter."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    if where.device == "cuda":
        command = [str(ROOT / "tests/kernels/run_on_gpu.py")]
        if importlib.util.find_spec("xdist"):
            command += ["-n", "6"]
    else:
        command = ["-m", "pytest", str(ROOT / "tests/kernels/test_kernel_philox.py")]
    report = where.folder / "kernels.xml"
    command = [sys.executable, *command, f"--junitxml={report}", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=ROOT, check=False)
    if not report.is_file():
        raise Fault("pytest wrote no report; see the log")
    found = read_junit(report)
    where.note(found)
    if found["failed"]:
        raise Fault(f"{len(found['failed'])} of {found['tests']} tests: {found['failed'][0]}")
    if found["tests"] == found["skipped"]:
        raise Fault(f"none of {found['tests']} tests ran")
    return found


def read_junit(path: Path) -> dict[str, Any]:
    """{tests, skipped, failed: [names]} of a pytest report."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"tests": len(cases), "skipped": skipped, "failed": failed}


# ---- numerics ------------------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a call's result."""
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output):
        output = vars(output).values()
    return [tensor for part in output for tensor in tensors(part)]


def results(call: Any, leaves: list[Tensor] | None) -> list[Tensor]:
    """Outputs of a call, then the gradient of every leaf under a fixed upstream gradient."""
    output = call()
    found = tensors(output)
    if leaves:
        first = first_tensor(output)
        # Random: sums of a slope would cancel, and show the order of their terms.
        upstream = torch.randn(first.shape, generator=torch.Generator().manual_seed(7))
        found += torch.autograd.grad(first, leaves, upstream.to(first))
    return [tensor.detach() for tensor in found]


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; of bytes: the largest difference, in bytes."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    apart = (got.double() - expected.double()).abs().max().item()
    if not got.is_floating_point():
        return apart
    return apart / max(expected.double().abs().max().item(), 1e-4)


def allowed(got: Tensor) -> float:
    """Colours, other integers and masks are exact. Sums over more rows than in the unit tests get
    four times their tolerance."""
    return 4 * TOLERANCE[got.dtype] if got.is_floating_point() else 0.0


def both_ways(case: Any, where: Where, dtype: torch.dtype) -> list[list[Tensor]]:
    """Results of a case by its kernels and by its reference, on the same inputs."""
    torch.manual_seed(0)
    call = case.inputs(where.sizes(64, dtype))
    kernels.use("reference", where.device)
    leaves = leaves_of(first_tensor(call())) if case.gradient else None
    pair = []
    for way in ("triton", "reference"):
        kernels.use(way, where.device)
        pair.append(results(call, leaves))
    return pair


def numerics(where: Where) -> dict[str, Any]:
    """Kernel against reference on the same inputs: every case in bf16 and fp32, real sizes."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Agreement] = {}
    wrong: list[str] = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for case in all_cases().values():
            if not case.typed and name == "bf16":
                continue
            try:
                pair = both_ways(case, where, dtype)
            except Exception as error:  # the other cases are tried all the same
                traceback.print_exc()
                wrong.append(f"{case.name} in {name}: {one_line(error)}")
                continue
            rows = list(zip(*pair, strict=True))
            worst = max(distance(*row) for row in rows)
            most = max(allowed(got) for got, _ in rows)
            found[f"{case.name}, {name}"] = {"distance": worst, "allowed": most}
            if not all(distance(*row) <= allowed(row[0]) for row in rows):
                wrong.append(f"{case.name} in {name} is {worst:.3g} off, {most:.3g} is allowed")
            where.note({"agreement": found})
    if wrong:
        raise Fault("; ".join(wrong))
    return {"agreement": found}


# ---- speed ---------------------------------------------------------------------------------------


def timed(where: Where) -> dict[str, Any]:
    """What kernel_speed times: (call, whether with backward) by name."""
    return calls(where.sizes(256))


def kernel_speed(where: Where) -> dict[str, Any]:
    """Every call eager, by its kernel, by torch.compile, beside a copy of its bytes."""
    backend = "inductor" if where.gpu else "eager"
    failed: list[str] = []
    rows = timings(
        where.sizes(256), backend=backend, every=4 if where.tiny else 1, left=where.left,
        note=lambda rows: where.note({"microseconds": rows}), failed=failed,
    )  # fmt: skip
    if failed:
        raise Fault("; ".join(failed))
    return {"microseconds": rows}


def slowest(rows: dict[str, dict[str, float]]) -> str:
    """The call that is furthest from a copy of its bytes, among those that take time."""
    timed = {name: row for name, row in rows.items() if "of copy" in row and row["triton"] > 20}
    return min(timed or rows, key=lambda name: rows[name].get("of copy", float("inf")))


def profile_slowest(where: Where) -> dict[str, Any]:
    """Nsight Compute's figures of the slowest call's kernels, where it is installed."""
    rows = where.found("kernel_speed").get("microseconds", {})
    if not any("of copy" in row for row in rows.values()):
        raise Skip("no kernel was timed")
    name = slowest(rows)
    if shutil.which("ncu") is None:
        call_once(name, where.sizes(256), where.device)  # what ncu would look at
        raise Skip(f"no ncu here; {name} would be profiled")
    command = [
        "ncu", "--csv", "--page", "details", "--section", "SpeedOfLight", "--section", "Occupancy",
        "--section", "LaunchStats", "--clock-control", "none", "--launch-count", "3",
        "--kernel-name", f"regex:{'|'.join(kernel_names(name))}",
        sys.executable, "-m", "gpu_stages.kernels", name,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          timeout=max(5, where.left() - 5))  # fmt: skip
    figures = read_ncu(done.stdout)
    if not figures:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise Fault(f"ncu told nothing of {name}: {last[0]}")
    return {"call": name, "kernels": figures}


def kernel_names(call: str) -> list[str]:
    """Triton's names of the kernels that a call launches."""
    return [f"{name}_kernel" for name in all_cases()[call.removesuffix(" with backward")].kernels]


def read_ncu(text: str) -> dict[str, dict[str, str]]:
    """Kernel → metric → value with its unit, from ncu --csv (other programs' lines before it)."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name"):
            value = f"{row['Metric Value']} {row['Metric Unit'] or ''}".strip()
            found.setdefault(row["Kernel Name"], {})[row["Metric Name"]] = value
    return found


def call_once(name: str, sizes: Sizes, device: str) -> None:
    """Run a call by its kernels: what ncu looks at."""
    kernels.use("triton", device)
    call, backward = calls(sizes)[name]
    results(call, leaves_of(first_tensor(call())) if backward else None)


if __name__ == "__main__":
    call_once(sys.argv[1], Sizes(256, device="cuda"), "cuda")
    torch.cuda.synchronize()

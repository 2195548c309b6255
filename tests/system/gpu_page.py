"""The page of a GPU check: tables and bars in Markdown, from its result.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shard_tools.atomic import write_atomic

BEGIN, END = "<!-- figures of make gpu-check -->", "<!-- end -->"
WIDTH = 30  # of the longest bar
HEAD = {"device", "date", "rehearsal", "seconds", "stages", "results"}  # of a result
PHASES = ("masks", "embed", "encoder", "teacher", "decoder", "heads", "loss", "backward",
          "optimizer", "EMA", "rest")  # fmt: skip


def number(value: Any, digits: int = 3) -> str:
    """A figure with so many significant digits; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def percent(value: Any) -> str:
    """A share in percent; a dash for none."""
    return "-" if value is None else f"{value:.2%}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def bars(values: dict[str, float], unit: str) -> list[str]:
    """A bar per value, the longest WIDTH blocks."""
    longest, wide = max((*values.values(), 1e-12)), max(map(len, values))
    lines = [
        f"{name:{wide}} {'█' * max(1, round(WIDTH * value / longest)):{WIDTH}} {number(value)}"
        for name, value in values.items()
    ]
    return ["```", f"{unit}", *lines, "```"]


def measured(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those that have a speed: some are left out, some failed, and of some it is no number."""
    return {title: row for title, row in rows.items() if row.get("images_per_second")}


def step_lines(found: dict[str, Any]) -> list[str]:
    """images/s, MFU, memory and launches; then milliseconds and launches by phase."""
    rows = measured(found.get("steps", {}))
    if not rows:
        return []
    lines = [f"## A step, {found['batch']} images of ViT-B/16", ""]
    lines += bars({title: row["images_per_second"] for title, row in rows.items()}, "images/s")
    head = ["step", "images/s", "ms", "GPU busy", "host", "MFU", "peak GB", "launches", "copies",
            "waits"]  # fmt: skip
    body = []
    for title, row in rows.items():
        mfu = percent(row.get("mfu"))
        keys = ("peak_gb", "launches", "copies", "waits")
        body.append([title, number(row["images_per_second"]), number(row["ms"]),
                     number(row.get("busy_ms")), number(row.get("host_ms")), mfu,
                     *(number(row.get(key)) for key in keys)])  # fmt: skip
    lines += ["", *table(head, body), ""]
    if any("host_ms" in row for row in rows.values()):
        lines += ["GPU busy: a step's kernels together, ms. host: ms of a step of 8 images, which "
                  "the host bounds.", ""]  # fmt: skip
    usual = measured(found.get("usual_steps", {}))
    if usual:
        body = [
            [title, number(row["images_per_second"]), number(row["ms"]), percent(row.get("mfu"))]
            for title, row in usual.items()
        ]
        head = [f"{found['usual']} images", "images/s", "ms", "MFU"]
        lines += [*table(head, body), ""]
    if found.get("ratios"):
        told = (f"{name} {number(value)}" for name, value in found["ratios"].items())
        lines += [f"Ratios: {'; '.join(told)}.", ""]
    ours = {t: row for t, row in rows.items() if row.get("ms_by_phase", {}).keys() - {"rest"}}
    if ours:
        body = []
        for phase in PHASES:
            cells = (
                f"{number(row['ms_by_phase'].get(phase))} / "
                f"{number(row.get('launches_by_phase', {}).get(phase))}"
                for row in ours.values()
            )
            body.append([phase, *cells])
        lines += ["ms / launches by phase:", "", *table(["phase", *ours], body), ""]
    return lines + busy_lines(rows)


def busy_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Milliseconds of GPU time of a step by kind of kernel."""
    busy = {title: row["busy_by_kind"] for title, row in rows.items() if "busy_by_kind" in row}
    if not busy:
        return []
    kinds = sorted({k for row in busy.values() for k in row},
                   key=lambda kind: -sum(row.get(kind) or 0 for row in busy.values()))  # fmt: skip
    body = [[kind, *(number(row.get(kind)) for row in busy.values())] for kind in kinds]
    return ["ms by kind of kernel:", "", *table(["kernels", *busy], body), ""]


def kernel_lines(found: dict[str, Any]) -> list[str]:
    """Microseconds of every call by way, and how near a copy the kernel comes."""
    rows = found.get("microseconds", {})
    if not rows:
        return []
    lines = ["## Kernels, microseconds", ""]
    near = {name: 100 * row["of copy"] for name, row in rows.items() if row.get("of copy")}
    if near:
        lines += bars(near, "% of a device copy's bandwidth")
    columns = ["eager", "compiled", "triton", "copy"]
    body = [[name, *(number(row.get(c)) for c in columns)] for name, row in rows.items()]
    return [*lines, "", *table(["call", *columns], body), ""]


def curve_lines(found: dict[str, Any]) -> list[str]:
    """Every recipe's last loss in fp32, and how far each other way ends up."""
    curves = found.get("curves", {})
    if not curves:
        return []
    columns = list(dict.fromkeys(c for row in curves.values() for c in row["columns"]))
    body = []
    for name, row in curves.items():
        cells = (row["columns"].get(column) for column in columns)
        body.append([name, f"{number(row['fp32'][0])} → {number(row['fp32'][-1])}",
                     *(percent(cell["distance"]) if cell else "-" for cell in cells)])  # fmt: skip
    lines = ["## Loss curves: autocast and bf16 against fp32, mean distance", ""]
    return [*lines, *table(["recipe", "loss in fp32", *columns], body), ""]


def agreement_lines(found: dict[str, Any]) -> list[str]:
    """The largest distance of kernel and reference for each call."""
    rows = found.get("agreement", {})
    if not rows:
        return []
    body = [[name, number(r["distance"], 2), number(r["allowed"], 2)] for name, r in rows.items()]
    return ["## Kernel against reference", "", *table(["call", "largest", "allowed"], body), ""]


def loader_lines(found: dict[str, Any]) -> list[str]:
    """Images/s by workers, and what bounds each recipe."""
    rates = found.get("images_per_second", {})
    if not rates:
        return []
    told = ", ".join(f"{number(rate)} with {n} workers" for n, rate in rates.items())
    lines = ["## The loader", "", f"Images/s on {found['cores']} cores: {told}.", ""]
    for name, row in found.get("bound", {}).items():
        lines.append(f"- {name}: bound by {row['by']}; {number(row['cores_needed'])} cores feed it")
    return [*lines, ""]


def pretrain_lines(found: dict[str, Any]) -> list[str]:
    """A run as it is shipped: images/s, of the step's alone, waiting."""
    if "images_per_second" not in found:
        return []
    share = f", {percent(found['of_step'])} of the step's alone" if "of_step" in found else ""
    return ["## A run of pipeline/pretrain.py", "", f"MAE, batch {found['batch']}, JPEG files from "
            f"shards: {number(found['images_per_second'])} images/s{share}; "
            f"{percent(found['waiting'])} of the time waits for the loader.", ""]  # fmt: skip


def evaluation_lines(found: dict[str, Any]) -> list[str]:
    """top-1 of every protocol on four colours."""
    if "top1" not in found:
        return []
    told = ", ".join(f"{title} {number(value)}" for title, value in found["top1"].items())
    return ["## Evaluation", "", f"Top-1 of four colours, %: {told}; features "
            f"{number(found['features_apart'], 1)} off the CPU's.", ""]  # fmt: skip


# Those of Nsight Compute's figures that are on the page; all are in result.json.
PROFILED = (
    "Duration", "DRAM Throughput", "L2 Cache Throughput", "L1/TEX Cache Throughput",
    "Compute (SM) Throughput", "Registers Per Thread", "Dynamic Shared Memory Per Block",
    "Achieved Occupancy",
)  # fmt: skip


def ncu_lines(found: dict[str, Any]) -> list[str]:
    """Nsight Compute's figures of the slowest call, a column for each of its kernels."""
    if "kernels" not in found:
        return []
    kernels = found["kernels"].values()
    body = [[name, *(row.get(name, "-") for row in kernels)] for name in PROFILED]
    head = f"## Nsight Compute: {found['call']}"
    return [head, "", *table(["", *found["kernels"]], body), ""]


PARTS = {
    "step": step_lines, "pretrain": pretrain_lines, "loader": loader_lines,
    "kernel_speed": kernel_lines, "recipes": curve_lines, "numerics": agreement_lines,
    "evaluation": evaluation_lines, "ncu": ncu_lines,
}  # fmt: skip


def page(result: dict[str, Any]) -> str:
    """The page of a result, finished or not."""
    device = result["device"] or "no device yet"
    machine = [f"torch {result['torch']}"] if result.get("torch") else []
    machine += [f"{result['cores']} cores"] if result.get("cores") else []
    lines = [f"# {device}, {result['date'][:10]}", ""]
    if result["rehearsal"]:
        lines += ["A rehearsal: the smallest sizes, and figures that mean nothing.", ""]
    lines += [f"{', '.join(machine)}; {number(result['seconds'])} s.", ""]
    lines += [result["note"], ""] if "note" in result else []
    results = result["results"]
    body = [
        [name, status, number(results[name].get("seconds"))]
        for name, status in result["stages"].items()
    ]
    lines += [*table(["stage", "became", "s"], body), ""]
    for name, part in PARTS.items():
        lines += part(results.get(name, {}))
    return "\n".join(lines).rstrip() + "\n"


def write_into(document: Path, source: Path) -> int:
    """Put the page of a result between the marks of a document; the exit code."""
    try:
        result = json.loads(source.read_text())
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        print(f"error: {error.filename}: cannot be read ({error.strerror})", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {source}: is not a result of a check ({error})", file=sys.stderr)
        return 2
    if not isinstance(result, dict) or not result.keys() >= HEAD:
        print(f"error: {source}: is not a result of a check, which has {', '.join(sorted(HEAD))}",
              file=sys.stderr)  # fmt: skip
        return 2
    if result["rehearsal"] or result.get("null"):
        print(f"error: {source}: is a rehearsal on {result['device']}; its figures mean nothing "
              "and go into no document", file=sys.stderr)  # fmt: skip
        return 2
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"error: {document}: needs the lines {BEGIN} and {END}, between which the page goes",
              file=sys.stderr)  # fmt: skip
        return 2
    try:
        inside = page(result).replace("\n#", "\n##").replace("# ", "## ", 1)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        print(f"error: {source}: no page can be made of it ({type(error).__name__}: {error}): it "
              "is of another version of the check, or damaged", file=sys.stderr)  # fmt: skip
        return 2
    try:
        write_atomic(document, f"{before}{BEGIN}\n\n{inside}\n{END}{after}")
    except OSError as error:
        print(f"error: {document}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"{document}: has the figures of {result['device']}, {result['date']}")
    return 0

"""A training step's speed: MAE, R-MAE and C-MAE, eager, compiled and as CUDA graphs, beside MAE
written plainly and facebookresearch/mae's model, at equal batch, on images that are on the device
already."""

from __future__ import annotations

import time
import traceback
from itertools import product
from typing import Any

import torch
from launches import busy_by_kind, device_counts, launches_by_phase
from phases import Phases

from gpu_stages.common import Fault, Where, join, release, seconds_of, synchronise
from gpu_stages.contestants import FACEBOOK, OURS, PEERS, Contestant, contestant
from pipeline.config.peaks import peak_flops

# What matters most comes first, what is compiled last.
ORDER = (
    "mae", "plain MAE", FACEBOOK, "rmae", "cmae", "mae, graphs", "mae, compiled, graphs",
    "plain MAE, compiled", "mae, compiled", "rmae, compiled, graphs", "cmae, compiled, graphs",
    "mae, bf16, compiled, graphs",
)  # fmt: skip
RACED = ("mae", "mae, compiled", "mae, compiled, graphs")  # against PEERS
FEW = 8  # images of a step that the host bounds on any GPU
# MAE's own micro-batch, 4096 images on 64 GPUs: the host bounds it on a large GPU.
USUAL, OF_USUAL = 64, ("mae", FACEBOOK, "mae, graphs", "mae, compiled, graphs")


def compiled_titles() -> list[str]:
    """Contestants whose first steps compile."""
    return [title for title in ORDER if "compiled" in title]


def phase_milliseconds(one: Contestant, device: str, steps: int) -> dict[str, float]:
    """Milliseconds per step of each phase: on a GPU of its own time, by events."""
    if device == "cpu":
        phases, unit = Phases(time.perf_counter), 1e3
    else:

        def event() -> torch.cuda.Event:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            return mark

        phases, unit = Phases(event, lambda a, b: a.elapsed_time(b)), 1.0
    with one.watching(phases):
        phases.restart()
        for _ in range(steps):
            one.step()
        phases.close()
        synchronise(device)
        return {name: unit * total / steps for name, total in phases.sums().items()}


def speed(one: Contestant, where: Where, batch: int) -> dict[str, Any]:
    """images/s, ms, MFU and peak memory of a contestant."""
    warm, timed = (1, 1) if where.tiny else (5, 15)
    for _ in range(warm):
        one.step()
    seconds = seconds_of(one.step, where.device, timed)
    found: dict[str, Any] = {"images_per_second": batch / seconds, "ms": 1e3 * seconds}
    if where.device == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    peak = peak_flops(where.facts["device"], "bf16")
    if peak:
        found["mfu"] = one.flops * batch / seconds / peak
    return found


def details(one: Contestant, where: Where) -> dict[str, Any]:
    """ms and launches by phase, GPU time by kind of kernel, the host's time of a contestant."""
    found: dict[str, Any] = {"tflop_per_image": one.flops / 1e12}
    found["ms_by_phase"] = phase_milliseconds(one, where.device, 1 if where.tiny else 3)
    found["launches_by_phase"] = launches_by_phase(one.step, one.watching, where.device)
    counts = device_counts(one.step, where.device)
    if counts.busy:
        found["busy_ms"] = sum(counts.busy.values())
        found["busy_by_kind"] = busy_by_kind(counts.busy)
        longest = sorted(counts.busy, key=lambda name: -counts.busy[name])[:25]
        found["busiest"] = {name[:160]: counts.busy[name] for name in longest}
    found |= {"launches": counts.launches, "copies": counts.copies, "waits": counts.waits}
    if one.few is not None:
        for _ in range(1 if where.tiny else 4):
            one.few()
        found["host_ms"] = 1e3 * seconds_of(one.few, where.device, 1 if where.tiny else 10)
    return found


def warm(where: Where, title: str, batch: int) -> None:
    """Two steps of a contestant: what they compile, later processes find."""
    one = contestant(title, where, batch, FEW)
    try:
        for _ in range(2):
            one.step()
        synchronise(where.device)
    finally:
        one.close()


def why_not(title: str, where: Where) -> str:
    """Why a contestant is left out; nothing where it is not."""
    if title in OURS and OURS[title].compile and not where.gpu:
        return "inductor compiles the blocks, on a GPU only"
    if title in OURS and OURS[title].cuda_graphs and where.device == "cpu":
        return "CUDA graphs are of a GPU"
    if title == FACEBOOK and where.mae is None:
        return "no checkout is given (MAE=…)"
    if where.left() < (25 if "compiled" in title else 12):
        return "no time left"
    return ""


def race(where: Where, title: str, batch: int, short: bool) -> dict[str, Any]:
    """What is found of a contestant; short: its speed alone."""
    if reason := why_not(title, where):
        return {"skipped": reason}
    release(where.device)
    one, begun = None, time.monotonic()
    try:
        one = contestant(title, where, batch, FEW)
        row = speed(one, where, batch)
        row |= {} if short else details(one, where)
        print(f"{title}, {batch}: {row['images_per_second']:.0f} images/s; "
              f"{time.monotonic() - begun:.1f} s to find out", flush=True)  # fmt: skip
    except Exception as error:
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {error}"}
    finally:
        if one is not None:
            one.close()
    return row


def step_speed(where: Where) -> dict[str, Any]:
    """Every contestant in turn; one that fails does not end the others."""
    join()
    batch = 8 if where.tiny else where.batch
    rows: dict[str, dict[str, Any]] = {}
    usual: dict[str, dict[str, Any]] = {}
    found = {"batch": batch, "steps": rows, "usual": USUAL, "usual_steps": usual}
    for title in ORDER:
        rows[title] = race(where, title, batch, short=False)
        where.note(found | {"ratios": ratios(rows)})
    for title in OF_USUAL if not where.tiny else ():
        usual[title] = race(where, title, USUAL, short=True)
        where.note(found | {"ratios": ratios(rows)})
    failed = [
        f"{title}: {row['failed']}"
        for part in (rows, usual) for title, row in part.items() if "failed" in row
    ]  # fmt: skip
    if failed:
        raise Fault("; ".join(failed))
    return found | {"ratios": ratios(rows)}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the figures are held against: our images/s over the peers', MFU over MAE's."""
    found = {}
    for ours, theirs in product(RACED, PEERS):
        if all("images_per_second" in rows.get(name, {}) for name in (ours, theirs)):
            speed = rows[ours]["images_per_second"] / rows[theirs]["images_per_second"]
            found[f"{ours} / {theirs}"] = speed
    for ending in ("", ", compiled, graphs"):
        of_mae = rows.get(f"mae{ending}", {}).get("mfu")
        for name in (f"rmae{ending}", f"cmae{ending}"):
            if of_mae and "mfu" in rows.get(name, {}):
                found[f"{name}: MFU / mae's"] = rows[name]["mfu"] / of_mae
    return found

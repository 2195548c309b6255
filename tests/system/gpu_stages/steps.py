"""A training step's speed: MAE, R-MAE and C-MAE beside MAE written plainly, compiled, and
facebookresearch/mae's model, at equal batch, on images that are on the device already."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from bench_step import facebook_mae, flops, peer_step, run_facebook, run_plain
from launches import busy_by_kind, device_counts, launches_by_phase
from peer_mae import PlainMAE
from phases import Phases, watching

from gpu_stages.common import ROOT, Fault, Where, join, release, seconds_of, synchronise
from pipeline import kernels
from pipeline.config.ds_config import plan_recipe, read_ds_config
from pipeline.estimate import PEAKS, dry_run
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime import engine as engines

# Title → recipe, ds_config, whether its blocks are compiled, and replayed as CUDA graphs.
OURS = {
    "mae": ("mae", "zero2", False, False),
    "rmae": ("rmae", "zero2", False, False),
    "cmae": ("cmae", "zero2", False, False),
    "mae, ZeRO-0": ("mae", "zero0", False, False),
    "mae, bf16 weights": ("mae", "zero2-bf16", False, False),
    "mae, compiled": ("mae", "zero2", True, False),
    "rmae, compiled": ("rmae", "zero2", True, False),
    "cmae, compiled": ("cmae", "zero2", True, False),
    "mae, bf16 weights, compiled": ("mae", "zero2-bf16", True, False),
    "mae, CUDA graphs": ("mae", "zero2", True, True),
}
# MAE of others: AdamW of torch, autocast, no DeepSpeed.
PEERS = ("plain MAE", "plain MAE, compiled", "facebookresearch/mae")
COMPILED = [title for title in (*OURS, *PEERS) if title.endswith(("compiled", "graphs"))]
# What matters most comes first, what is compiled last.
ORDER = (
    "mae", "plain MAE", "facebookresearch/mae", "rmae", "cmae", "mae, bf16 weights", "mae, ZeRO-0",
    "mae, compiled", "plain MAE, compiled", "mae, CUDA graphs", "rmae, compiled", "cmae, compiled",
    "mae, bf16 weights, compiled",
)  # fmt: skip
RACED = ("mae", "mae, compiled", "mae, CUDA graphs", "mae, bf16 weights, compiled")  # with PEERS
HOST = ("mae", "plain MAE", "facebookresearch/mae", "rmae", "cmae")  # whose host time is taken
FEW = 8  # images of a step that the host bounds on any GPU
SMALL: dict[str, Any] = {"side": 16, "patch": 4, "encoder": (16, 2, 2), "decoder": (8, 1, 2)}


@dataclass(frozen=True)
class Contestant:
    """A step of `batch` images; what to watch of its phases; FLOPs per image; how it is ended."""

    step: Callable[[], Any]
    watching: Callable[[Phases], AbstractContextManager[Any]]
    flops: float
    close: Callable[[], None] = lambda: None


def peak_flops(name: str) -> float | None:
    """FLOP/s of dense bf16 products by a device's name (estimate.PEAKS); None where unknown."""
    known = {"A100": "a100", "H100": "h100", "H200": "h100", "B200": "b200"}
    key = next((known[word] for word in known if word in name), None)
    return None if key is None else PEAKS[key]["bf16"] * 1e12


_flops: dict[str, float] = {}


def flops_per_image(where: Where, name: str) -> float:
    """Of a recipe's step, forward and backward, on tensors without data; counted once."""
    if name not in _flops:
        _flops[name] = dry_run(where.recipe(name), 2, "autocast").flops / 2
    return _flops[name]


def ours(
    where: Where, recipe_name: str, config: str, compiled: bool, graphs: bool, batch: int
) -> Contestant:
    """A recipe's step by the engine."""
    work = flops_per_image(where, recipe_name)
    kernels.use("auto", where.device)
    recipe = where.recipe(recipe_name, f"batch_size={batch}", "data.partitions=4")
    objective, teacher = build_objective(recipe)
    settings = read_ds_config(ROOT / f"ds_configs/{config}.json")
    settings |= {"train_micro_batch_size_per_gpu": batch, "compile": compiled,
                 "cuda_graphs": graphs}  # fmt: skip
    engine = engines.Engine(
        objective, parameter_groups(objective), plan_recipe(settings, recipe, 1)
    )
    if teacher is not None:
        teacher.to(where.device)
    image, sample = where.images(recipe, batch), where.numbers(0, batch)

    def step() -> None:
        engine.micro_step(1e-4, image, sample, 0, teacher)
        if teacher is not None:
            teacher.update(objective, 0.996, engine.masters)

    @contextmanager
    def watched(phases: Phases) -> Iterator[None]:
        with watching(phases, objective, teacher, engine.engine):
            yield

    return Contestant(step, watched, work, engine.destroy)


def peer(where: Where, title: str, batch: int) -> Contestant:
    """MAE written plainly, or facebookresearch/mae's, with our weights and masks."""
    objective, _ = build_objective(where.recipe("mae"))
    forward: Callable = run_plain
    if title == "facebookresearch/mae":
        if where.mae is None:
            raise Fault("no checkout is given (MAE=…)")
        model, forward = facebook_mae(where.mae, **(small_facebook() if where.tiny else {})), \
            run_facebook  # fmt: skip
    else:
        model = PlainMAE(**(SMALL if where.tiny else {}))
    if title.endswith("compiled"):
        model.compile(dynamic=False, backend="inductor" if where.gpu else "eager")
    kernels.use("reference")  # masks of its images, once
    count = flops(peer_step(2, PlainMAE(**(SMALL if where.tiny else {})), run_plain, objective)) / 2
    step = peer_step(batch, model, forward, objective, where.device, autocast=True)
    return Contestant(step, lambda phases: nullcontext(), count)


def small_facebook() -> dict[str, Any]:
    """SMALL in the words of MaskedAutoencoderViT."""
    (width, depth, heads), (narrow, blocks, few) = SMALL["encoder"], SMALL["decoder"]
    return {
        "img_size": SMALL["side"], "patch_size": SMALL["patch"], "mlp_ratio": 4,
        "embed_dim": width, "depth": depth, "num_heads": heads, "decoder_embed_dim": narrow,
        "decoder_depth": blocks, "decoder_num_heads": few,
        "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6),
    }  # fmt: skip


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


def measure(one: Contestant, where: Where, batch: int) -> dict[str, Any]:
    """images/s, ms, ms and launches by phase, MFU, peak memory of a contestant."""
    warm, timed = (1, 1) if where.tiny else (6, 15)
    for _ in range(warm):
        one.step()
    seconds = seconds_of(one.step, where.device, timed)
    found: dict[str, Any] = {"images_per_second": batch / seconds, "ms": 1e3 * seconds}
    if where.device == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    found["tflop_per_image"] = one.flops / 1e12
    peak = peak_flops(where.facts["device"])
    if peak:
        found["mfu"] = one.flops * batch / seconds / peak
    found["ms_by_phase"] = phase_milliseconds(one, where.device, 1 if where.tiny else 3)
    found["launches_by_phase"] = launches_by_phase(one.step, one.watching, where.device)
    counts = device_counts(one.step, where.device)
    if counts.busy:
        found["busy_ms"] = sum(counts.busy.values())
        found["busy_by_kind"] = busy_by_kind(counts.busy)
        longest = sorted(counts.busy, key=lambda name: -counts.busy[name])[:25]
        found["busiest"] = {name[:160]: counts.busy[name] for name in longest}
    return found | {"launches": counts.launches, "copies": counts.copies, "waits": counts.waits}


def host_milliseconds(title: str, where: Where) -> float:
    """Milliseconds of a step of so few images that the host bounds it."""
    one = contestant(title, where, FEW)
    try:
        for _ in range(1 if where.tiny else 4):
            one.step()
        return 1e3 * seconds_of(one.step, where.device, 1 if where.tiny else 10)
    finally:
        one.close()


def contestant(title: str, where: Where, batch: int) -> Contestant:
    """The step of a title in ORDER."""
    return ours(where, *OURS[title], batch) if title in OURS else peer(where, title, batch)


def warm(where: Where, title: str, batch: int) -> None:
    """Two steps of a contestant: what they compile, later processes find."""
    one = contestant(title, where, batch)
    try:
        for _ in range(2):
            one.step()
        synchronise(where.device)
    finally:
        one.close()


def why_not(title: str, where: Where) -> str:
    """Why a contestant is left out; nothing where it is not."""
    if title in OURS and title in COMPILED and not where.gpu:
        return "inductor compiles the blocks, on a GPU only"
    if title == "facebookresearch/mae" and where.mae is None:
        return "no checkout is given (MAE=…)"
    if where.left() < (25 if title in COMPILED else 12):
        return "no time left"
    return ""


def step_speed(where: Where) -> dict[str, Any]:
    """Every contestant in turn; one that fails does not end the others."""
    join()
    batch = 8 if where.tiny else where.batch
    rows: dict[str, dict[str, Any]] = {}
    for title in ORDER:
        if reason := why_not(title, where):
            rows[title] = {"skipped": reason}
            continue
        release(where.device)
        one = None
        try:
            one = contestant(title, where, batch)
            rows[title] = measure(one, where, batch)
            print(f"{title}: {rows[title]['images_per_second']:.0f} images/s, "
                  f"{rows[title]['launches']} launches", flush=True)  # fmt: skip
        except Exception as error:
            traceback.print_exc()
            rows[title] = {"failed": f"{type(error).__name__}: {error}"}
        finally:
            if one is not None:
                one.close()
            del one
        if title in HOST and "ms" in rows[title]:
            release(where.device)
            rows[title]["host_ms"] = host_milliseconds(title, where)
        where.note({"batch": batch, "steps": rows, "ratios": ratios(rows)})
    failed = [f"{title}: {row['failed']}" for title, row in rows.items() if "failed" in row]
    if failed:
        raise Fault("; ".join(failed))
    return {"batch": batch, "steps": rows, "ratios": ratios(rows)}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the figures are held against: our images/s over the peers', MFU over MAE's."""
    found = {}
    for ours_, theirs in product(RACED, PEERS):
        if all("images_per_second" in rows.get(name, {}) for name in (ours_, theirs)):
            speed = rows[ours_]["images_per_second"] / rows[theirs]["images_per_second"]
            found[f"{ours_} / {theirs}"] = speed
    for ending in ("", ", compiled"):
        of_mae = rows.get(f"mae{ending}", {}).get("mfu")
        for name in (f"rmae{ending}", f"cmae{ending}"):
            if of_mae and "mfu" in rows.get(name, {}):
                found[f"{name}: MFU / mae's"] = rows[name]["mfu"] / of_mae
    return found

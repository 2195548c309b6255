"""What needs shards: kill and resume of a real run, and whether the loader keeps up."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.shared.processes import LAUNCHER
from gpu_stages.common import ROOT, Fault, Where
from pipeline.data.batch import LoaderConfig
from pipeline.data.crops import Crop
from pipeline.data.loader import train_loader
from shard_tools.cores import cores

NEAR = 1e-3  # relative, of a loss on a GPU, whose sums are not ordered; a CPU's is exact


def shards(where: Where, times: int = 1) -> Path:
    """Shards of pictures as large as ImageNet's (500 x 375, about 100 KB), each so many times, made
    once."""
    folder = where.folder / ("data" if times == 1 else "many")
    if (folder / "shards/manifest.json").is_file():
        return folder / "shards"
    count, size = (24, (48, 36)) if where.tiny else (256, (500, 375))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8))
        picture = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = draw.integers(-14, 15, picture.shape, np.int16)
        picture = np.clip(picture + grain, 0, 255).astype(np.uint8)
        first = folder / f"images/{number:04d}.jpg"
        Image.fromarray(picture).save(first, quality=90)
        for again in range(1, times):
            first.with_stem(f"{first.stem}-{again}").hardlink_to(first)
    size, workers = ("8KiB", "0") if where.tiny else ("4MiB" if times == 1 else "64MiB", "8")
    command = [sys.executable, "-m", "shard_tools.make_shards", folder / "images",
               folder / "shards", "--unlabelled", "--resume", "--shard-size", size,
               "--workers", workers]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    return folder / "shards"


# ---- kill and resume -----------------------------------------------------------------------------


def alone() -> dict[str, str]:
    """The environment without the ranks of this process: of a run of its own."""
    return {key: value for key, value in os.environ.items() if key not in LAUNCHER}


def losses(run: Path) -> dict[int, float]:
    """Step → loss of every line that was written to the end."""
    path, found = run / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[int(row["step"])] = float(row["loss"])
    return found


def resume(where: Where) -> dict[str, Any]:
    """C-MAE by pipeline/pretrain.py under ZeRO-2, killed between two checkpoints and resumed: the
    steps that it takes again must have the losses that they had."""
    run, data = where.folder / "run", shards(where)
    command = [sys.executable, str(ROOT / "pipeline/pretrain.py"), "--recipe", "cmae_vits",
               "--ds_config", "zero2", "--data", str(data), "--output", str(run)]  # fmt: skip
    overrides = ["batch_size=64", "data.partitions=8", "data.workers=4"]
    if where.tiny:
        from tiny import tiny_overrides

        overrides = tiny_overrides("cmae")
    overrides += ["monitor.log_steps=1", "monitor.save_steps=10", "optimizer.epochs=1000",
                  "optimizer.warmup_epochs=1"]  # fmt: skip
    for override in overrides:
        command += ["--set", override]
    first = subprocess.Popen(command, cwd=ROOT, env=alone())
    try:
        while first.poll() is None and max(losses(run), default=0) < 14:
            time.sleep(0.01)
    finally:
        first.kill()
        first.wait()
    before = losses(run)
    saved = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-????????")]
    if not saved or max(before, default=0) <= max(saved):
        raise Fault(
            f"the run to be killed ended with {first.returncode} at step {max(before, default=0)}, "
            f"saved were {sorted(saved)}; see the log"
        )
    last = max(before)
    done = subprocess.run([*command, "--max-steps", str(last)], cwd=ROOT, env=alone(), check=False)
    after = losses(run)
    again = range(max(saved) + 1, last + 1)
    missing = [step for step in again if step not in after]
    apart = [abs(after[s] - before[s]) / max(abs(before[s]), 1e-6) for s in again if s in after]
    found = {"killed_after": last, "resumed_from": max(saved), "apart": max(apart, default=0.0)}
    where.note(found)
    if missing or done.returncode or not found["apart"] <= (NEAR if where.device == "cuda" else 0):
        raise Fault(f"resumed at step {max(saved)}: exit code {done.returncode}, losses up to "
                    f"{found['apart']:.2g} off")  # fmt: skip
    return found


# ---- a run as it is ------------------------------------------------------------------------------


def pretrain(where: Where) -> dict[str, Any]:
    """MAE by pipeline/pretrain.py under ZeRO-2 as it is shipped, from JPEG files in shards:
    images/s of the run, and the share of its time that waits for the loader.

    Three epochs of 64 steps. Of each the first quarter is left out: there the graph is captured,
    and the loader gets ahead.
    """
    run, epochs = where.folder / "pretrain", 3
    if where.tiny:
        from tiny import tiny_overrides

        batch, steps, data = 8, 3, shards(where)
        overrides = [*tiny_overrides("mae"), "monitor.log_steps=1"]
    else:
        batch, steps = where.batch, 64
        data = shards(where, times=steps * batch // 256)
        overrides = [f"batch_size={batch}", "data.partitions=8", f"monitor.log_steps={steps // 4}"]
    command = [sys.executable, str(ROOT / "pipeline/pretrain.py"), "--recipe", "mae",
               "--ds_config", "zero2", "--data", str(data), "--output", str(run),
               "--max-steps", str(epochs * steps)]  # fmt: skip
    for override in overrides:
        command += ["--set", override]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=alone(), check=False)
    if done.returncode:
        raise Fault(f"pipeline/pretrain.py ended with {done.returncode}; see the log")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if (row["step"] - 1) % steps >= steps // 4]
    found = {
        "images_per_second": statistics.harmonic_mean(row["images_per_second"] for row in rows),
        "waiting": statistics.fmean(row["data_wait"] for row in rows),
        "batch": batch,
        "whole_seconds": time.monotonic() - begun,
    }
    step = where.found("step").get("steps", {}).get("mae, compiled, graphs", {})
    if "images_per_second" in step:
        found["of_step"] = found["images_per_second"] / step["images_per_second"]
    return found


# ---- the loader ----------------------------------------------------------------------------------


def rate(folder: Path, workers: int, batch: int, side: int, images: int, pin: bool) -> float:
    """Images per second once the workers are going."""
    config = LoaderConfig(
        folder, batch_size=batch, micro_batch=batch, crop=Crop(side, (0.2, 1.0), (3 / 4, 4 / 3)),
        partitions=8, workers=workers, pin_memory=pin,
    )  # fmt: skip
    warm = 2 * max(1, workers)
    steps = warm + max(2, images // batch)
    begun = 0.0
    for number, _ in enumerate(train_loader(config, 0, 1, range(steps))):
        if number == warm - 1:
            begun = time.perf_counter()
    return (steps - warm) * batch / (time.perf_counter() - begun)


def loader(where: Where) -> dict[str, Any]:
    """Images/s of the loader by workers, and the cores that keep each recipe's step fed."""
    folder, every = shards(where), max(1, cores())
    side, batch = (16, 8) if where.tiny else (224, 64)
    found: dict[str, Any] = {"cores": every, "images_per_second": {}}
    for workers in (1,) if where.tiny else sorted({1, max(1, every // 2), every}):
        images = 16 if where.tiny else 1500 * workers
        speed = rate(folder, workers, batch, side, images, where.device == "cuda")
        found["images_per_second"][str(workers)] = speed
        where.note(found)
    most = max(found["images_per_second"].values())
    per_core = max(speed / int(n) for n, speed in found["images_per_second"].items())
    found["bound"] = {}
    steps = where.found("step").get("steps", {})
    for name in ("mae", "rmae", "cmae"):
        ways = [steps.get(f"{name}{ending}", {}) for ending in ("", ", compiled, graphs")]
        need = max((row.get("images_per_second", 0.0) for row in ways), default=0.0)
        if need:
            found["bound"][name] = {
                "by": "loader" if most < need else "GPU or host",
                "cores_needed": need / per_core,
            }
    return found

"""The eval stage on the device: every protocol by its command, on small labelled shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gpu_stages.common import ROOT, Fault, Skip, Where

CLASSES, SIDE = 4, 64
SAME = 1e-3  # largest distance of fp32 features to the CPU's, over the largest value


def pictures(folder: Path, each: int, seed: int) -> None:
    """JPEGs of CLASSES classes that differ in colour: folder/CLASS/NUMBER.jpg."""
    draw = np.random.default_rng(seed)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        colour = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (190, 190, 60)][label])
        for number in range(each):
            noise = draw.normal(0, 30, (SIDE, SIDE, 3))
            picture = Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))
            picture.save(folder / f"class{label}/{number:03d}.jpg", quality=90)


def shards(where: Where) -> Path:
    """train and val shards of pictures."""
    folder = where.folder / "eval-data"
    for part, each in (("train", 32), ("val", 8)):
        pictures(folder / f"images/{part}", each, seed=len(part))
        command = [sys.executable, "-m", "shard_tools.make_shards", folder / f"images/{part}",
                   folder / part, "--shard-size", "64KiB", "--workers", "0"]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def commands(where: Where, data: Path) -> dict[str, list[str]]:
    """Title → command; each writes `where.folder`/eval/<title>, a file or a folder."""
    both = ["--train", str(data / "train"), "--val", str(data / "val")]
    small = ["--epochs", "8", "--warmup-epochs", "1", "--batch-size", "32"]
    images = ["--images", str(data / "val"), "--precision", "fp32"]
    found = {
        "finetune": ["finetune", *both, *small, "--base-lr", "0.01", "--mixup", "0.8"],
        "embed": ["embed", *images],
        "embed on the CPU": ["embed", *images],
        "knn": ["knn", *both],
        "few-shot": ["finetune", *both, *small, "--fraction", "0.25", "--ds_config", "zero0"],
        "linprobe": ["linprobe", *both, *small],
        "linprobe, cached": ["linprobe", *both, "--protocol", "cached"],
        "attentive": ["attentive", *both, "--steps", "60", "--batch-size", "32"],
    }
    few = ("finetune", "embed", "embed on the CPU", "knn")
    return {title: words for title, words in found.items() if not where.tiny or title in few}


def run_all(where: Where, data: Path) -> dict[str, Path]:
    """Run the commands side by side (in a rehearsal one by one); where each has written."""
    encoder = ["--encoder", "random", "--arch", "vit_tiny_patch16_224", "--workers", "1",
               "--options", f"{{img_size: {SIDE}, depth: 2}}"]  # fmt: skip
    running, written, wrong = {}, {}, []
    for title, (tool, *words) in commands(where, data).items():
        written[title] = where.folder / "eval" / title.replace(", ", "-").replace(" ", "-")
        if not title.startswith("embed"):
            written[title] = written[title].with_suffix(".json")
        command = [sys.executable, str(ROOT / f"eval/{tool}.py"), *words, *encoder,
                   "--output", str(written[title])]  # fmt: skip
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if title.endswith("on the CPU") else {}
        running[title] = subprocess.Popen(command, cwd=ROOT, env=os.environ | hidden)
        if where.tiny:
            running[title].wait()
    for title, process in running.items():
        if process.wait():
            wrong.append(f"{title} ended with exit code {process.returncode}")
    if wrong:
        raise Fault("; ".join(wrong))
    return written


def evaluate(where: Where) -> dict[str, Any]:
    """Every protocol tells four colours apart; fp32 features are the CPU's."""
    if where.device == "cuda" and not where.gpu:
        raise Skip("the stand-in for a GPU has no cuDNN")
    written = run_all(where, shards(where))
    gpu, cpu = (np.load(written.pop(name) / "embeddings.npy") for name in
                ("embed", "embed on the CPU"))  # fmt: skip
    apart = float(np.abs(gpu - cpu).max() / np.abs(cpu).max())
    top1 = {title: float(json.loads(path.read_text())["top1"]) for title, path in written.items()}
    where.note({"top1": top1, "features_apart": apart})
    if not apart <= SAME:
        raise Fault(f"features are {apart:.2g} off the CPU's")
    chance = 100 / CLASSES
    lost = [title for title, value in top1.items() if not value > 1.5 * chance]  # nan too
    if lost:
        raise Fault(f"near chance: {', '.join(lost)} of {top1}")
    return {"top1": top1, "features_apart": apart}

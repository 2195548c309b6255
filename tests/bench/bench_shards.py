"""Sharding speed of one process against webdataset's ShardWriter, on 500x375 JPEGs of ~100 KB.

    python tests/bench/bench_shards.py            (make bench-shards)

The corpus is cut from photographs inside installed packages. The contestants take turns on the
same samples and write to the same disk; a round gives one ratio of CPU time each, the table shows
medians with their quartiles. The last line is one JSON object: the writer alone (equal work: no
checksum, no checks), and make_shards as it runs by default, which also reads, decodes and hashes
every image.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from shard_tools.demo_images import PHOTOGRAPHS, photograph
from shard_tools.sharding.images import ImageSettings
from shard_tools.sharding.sources import Item
from shard_tools.sharding.writer import ShardJob, write_shard
from shard_tools.tar import ShardWriter

WIDTH, HEIGHT, QUALITY = 500, 375, 95


def corpus(count: int, folder: Path) -> list[Item]:
    """`count` JPEG files of WIDTH x HEIGHT pixels: mirrored, shifted crops of the photographs."""
    draw = np.random.default_rng(0)
    images = [photograph(*place) for place in PHOTOGRAPHS.values()]
    items = []
    for number in range(count):
        image = images[number % len(images)]
        side = draw.uniform(0.9, 1.0)
        width, height = image.width * side, image.height * side
        left, top = draw.uniform(0, image.width - width), draw.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        piece = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        piece.save(buffer, "JPEG", quality=QUALITY)
        name = f"{number:06d}.jpg"
        (folder / name).write_bytes(buffer.getvalue())
        items.append(Item(name, number % len(images), name, 0, buffer.tell()))
    return items


def contestants(items: list[Item], root: Path, output: Path) -> dict[str, Callable[[], object]]:
    """Each writes all samples into `output` once."""
    data = [(root / item.file).read_bytes() for item in items]
    about = json.dumps({"name": "n01440764/x.JPEG", "width": WIDTH, "height": HEIGHT}).encode()
    samples = [(item.label, jpg) for item, jpg in zip(items, data, strict=True)]

    def shardwriter() -> None:
        with webdataset.ShardWriter(
            str(output / "w-%06d.tar"), maxcount=10**9, maxsize=10**12, verbose=0
        ) as sink:
            for number, (label, jpg) in enumerate(samples):
                key = f"{number:09d}"
                sink.write({"__key__": key, "jpg": jpg, "cls": label, "json": about})

    def ours(checksum: bool) -> None:
        handle = os.open(output / "o.tar", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        writer = ShardWriter(handle, checksum=checksum)
        for number, (label, jpg) in enumerate(samples):
            writer.write(f"{number:09d}", {"jpg": jpg, "cls": b"%d" % label, "json": about})
        writer.close()
        os.close(handle)

    def whole(check: str) -> None:
        classes = tuple(PHOTOGRAPHS)
        settings = ImageSettings(check=check)
        write_shard(
            ShardJob(0, "s.tar", 0, items, str(root), classes, settings, "fail", output, "")
        )

    return {
        "shardwriter": shardwriter,
        "ours": lambda: ours(False),
        "ours + sha256": lambda: ours(True),
        "make_shards, headers": lambda: whole("headers"),
        "make_shards, decode": lambda: whole("decode"),
    }


def measure(run: Callable[[], object], images: int) -> float:
    """Images per CPU second of this process (user + system), so that neighbours do not count."""
    start = time.process_time()
    run()
    return images / (time.process_time() - start)


def bench(images: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Images per second of each contestant in each round; the first, warming round is not kept."""
    root, output = folder / "corpus", folder / "output"
    root.mkdir()
    items = corpus(images, root)
    size = sum(item.size for item in items) / len(items) / 1e3
    print(f"{images} JPEGs of {WIDTH}x{HEIGHT}, {size:.0f} KB on average; one process")
    results: dict[str, list[float]] = {}
    output.mkdir()
    runs = contestants(items, root, output)
    for number in range(rounds + 1):
        for name, run in runs.items():
            rate = measure(run, images)
            if number:
                results.setdefault(name, []).append(rate)
        os.sync()  # or the disk would write one contestant's pages during the next one's turn
    return results


def table(results: dict[str, list[float]]) -> dict[str, float]:
    """Print medians and quartiles; returns the median ratio to ShardWriter by contestant."""
    ratios = {}
    print(f"{'':22} {'images/CPU s':>12} {'x ShardWriter':>14} {'quartiles':>14}")
    for name, rates in results.items():
        ratio = [a / b for a, b in zip(rates, results["shardwriter"], strict=True)]
        ratios[name] = statistics.median(ratio)
        low, _, high = statistics.quantiles(ratio, n=4)
        rate = statistics.median(rates)
        print(f"{name:22} {rate:12.0f} {ratios[name]:14.2f} {low:7.2f}-{high:.2f}")
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Sharding speed against webdataset's ShardWriter, one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=400, help="images per turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-shards-", dir=options.folder))
    try:
        ratios = table(bench(options.images, options.rounds, folder))
    finally:
        shutil.rmtree(folder)
    print("ours, ShardWriter: samples in memory, fields jpg, cls, json, no checksum, no checks;")
    print(
        "make_shards: reads the files, checks each (headers; decode = the default), sha256, fsync"
    )
    figures = {
        "vs_shardwriter": round(ratios["ours"], 2),
        "vs_shardwriter_checked": round(ratios["make_shards, decode"], 2),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

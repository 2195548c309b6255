"""The loader's bookkeeping at up to two thousand million samples, on shards that hold no pixels.

    python tests/bench/bench_scale.py            (make bench-scale)

A made-up folder has a real manifest.json, a real index.bin (a sparse file: its rows are zero and
their checksums right) and 10,000 samples a shard; its tars are empty, so that reading and decoding
are left out and all else runs as it does. One rank of eight with twelve workers is measured, at
the start and resumed in the middle of an epoch; a node has eight of them. Memory is anonymous and
shared memory by proportional set size (page cache, which any process may use, is left out), less
what the same rank and workers take for a tiny folder. Planning is measured at two sizes and
continued linearly to 14 million files. The last line is one JSON object, for the largest folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.data.batch import LoaderConfig
from pipeline.data.crops import Crop
from pipeline.data.loader import train_loader
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from shard_tools.index_file import BLOCK, SAMPLE, IndexHeader, header_bytes
from shard_tools.manifest import INDEX, MANIFEST, SHARDS, Shard, _checksum
from shard_tools.shard_table import ShardTable

SIZES = (1_280_000, 14_000_000, 100_000_000, 400_000_000, 2_000_000_000)
SHARD = 10_000  # samples
RANKS, WORKERS, BATCH, MICRO = 8, 12, 4096, 128
PLANNED = (100_000, 300_000, 900_000)  # files
METHODS = ("fork", "forkserver", "spawn")


class EmptyReader(Reader):
    """Finds a sample as Reader does, and fills its crop with one grey."""

    def decode_all(self, samples: np.ndarray, chosen: object, outs: object) -> np.ndarray:
        return np.zeros(len(samples), np.bool_)

    def decode(self, sample: int, choose: object, out: np.ndarray) -> None:
        row = self.manifest.lazy_index.row(sample)
        assert self.manifest.path(self.shard(sample)).endswith(".tar")
        out[:] = row["label"]


def make_folder(folder: Path, samples: int) -> None:
    """Shards of `samples` empty images."""
    folder.mkdir()
    counts = [min(SHARD, samples - start) for start in range(0, samples, SHARD)]
    names = [f"shard-{number:06d}.tar" for number in range(len(counts))]
    for name in names:
        os.mknod(folder / name)
    zero = bytes(BLOCK * SAMPLE.itemsize)
    last = zero[: ((samples - 1) % BLOCK + 1) * SAMPLE.itemsize]
    blocks = -(-samples // BLOCK)
    digests = hashlib.sha256(zero).digest() * (blocks - 1) + hashlib.sha256(last).digest()
    head = header_bytes(samples, digests)
    with open(folder / INDEX, "wb") as file:
        file.write(head)
        file.seek(IndexHeader.SIZE + samples * SAMPLE.itemsize)
        file.write(digests)
    shards = [
        Shard(name, count, 0, f"{number:064x}")
        for number, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    table = ShardTable.of(shards).encode()
    (folder / SHARDS).write_bytes(table)
    content = {
        "version": 2, "folder": ".", "samples": samples, "classes": [], "made": {},
        "shards_sha256": hashlib.sha256(table).hexdigest(),
        "index_sha256": head[24:56].hex(), "names_sha256": "",
    }  # fmt: skip
    content["checksum"] = _checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def memory(pid: int | str) -> int:
    """Bytes of anonymous and shared memory of a process, shared pages in proportion."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return (int(fields["Pss_Anon"]) + int(fields["Pss_Shmem"])) * 1024


def descendants(pid: int | str) -> list[int]:
    """The processes that a process has started, and those that they have."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [int(word) for path in children for word in path.read_text().split()]
    return [*pids, *(below for child in pids for below in descendants(child))]


def since_start() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def turn(folder: Path, method: str, workers: int) -> dict[str, float]:
    """One rank: seconds to its first batch, of the process (with `import torch`) and of a loader
    in the middle of epoch 5; its memory."""
    import pipeline.data.loader

    pipeline.data.loader.Reader = EmptyReader  # type: ignore[misc]
    config = LoaderConfig(
        folder, BATCH, MICRO, Crop(8), workers=workers, start_method=method, partitions=64
    )  # type: ignore[arg-type]
    found: dict[str, float] = {}
    first = 0
    for name in ("first_s", "resume_s"):
        begun = time.perf_counter()
        loader = train_loader(config, 3, RANKS, range(first, first + 10**6))
        batches = iter(loader)
        assert next(batches).step == first
        found[name] = time.perf_counter() - begun if first else since_start()
        first = loader.manifest.samples // BATCH * 11 // 2  # next: in the middle of epoch 5
        for _ in range(3 * workers):  # so that every worker has served
            next(batches)
        held = {pid: memory(pid) for pid in (os.getpid(), *descendants("self"))}
        found["rank_bytes"] = max(found.get("rank_bytes", 0), sum(held.values()))
        found["worker_bytes"] = sum(held[w.pid] for w in loader._workers) / max(workers, 1)
        loader.close()
    return found


def order_seconds(samples: int) -> float:
    """Seconds of one of twelve workers to find the samples of a batch of 128: over all of the
    windows that it passes, each of which it makes although it serves a twelfth of it."""
    sizes = np.full(samples // SHARD, SHARD)
    order = Order(sizes, 0, BATCH, partitions=64, window=8)
    per_step = BATCH // RANKS // MICRO
    window = min(8 * SHARD, samples // 64) * 64 // BATCH  # steps
    tasks = range(0, 2 * window * per_step, WORKERS)
    order.samples(0, 0, 0, 1)  # the permutation of the shards, once per epoch
    begun = time.process_time()
    for task in tasks:
        step, micro = divmod(task, per_step)
        order.samples(0, step % order.steps, micro * MICRO, (micro + 1) * MICRO)
    return (time.process_time() - begun) / len(tasks)


def child(*arguments: object, module: str = "bench_scale") -> dict[str, float]:
    """Run a part of the bench in a process of its own."""
    home = str(Path(__file__).parent)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}; {module}.main()", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, arguments))}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def at(samples: int, base: dict[str, dict[str, float]], methods: list[str]) -> dict[str, float]:
    """Measure one size; prints its lines."""
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name) / "s", samples)
        rows = {}
        for method in methods:
            found = child("--turn", Path(name) / "s", "--method", method)
            node = RANKS * (found["rank_bytes"] - base[method]["rank_bytes"])
            order = order_seconds(samples)
            rows[method] = {
                "samples": samples, "node_gb": round(node / 1e9, 2),
                "first_batch_s": round(found["first_s"], 2),
                "resume_s": round(found["resume_s"], 2), "order_ms": round(1e3 * order, 4),
            }  # fmt: skip
            print(
                f"{samples:>13,}{method:>12}{node / 1e9:>10.2f}{found['rank_bytes'] / 1e6:>10.0f}"
                f"{found['worker_bytes'] / 1e6:>10.1f}{found['first_s']:>8.2f}"
                f"{found['resume_s']:>8.2f}{1e3 * order:>10.4f}", flush=True,
            )  # fmt: skip
    return rows[methods[0]]


def draw(rows: list[dict[str, float]], plans: dict[int, float], path: Path) -> None:
    """Growth over the samples, as a picture with logarithmic axes; dotted: linear growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3))
    samples = [row["samples"] for row in rows]
    curves = [
        (key, samples, [max(row[key], 1e-3) for row in rows])
        for key in ("node_gb", "first_batch_s", "order_ms")
    ]
    curves.append(("plan_gb", list(plans), [size / 1e9 for size in plans.values()]))
    for axis, (title, x, y) in zip(axes, curves, strict=True):
        axis.loglog(x, y, "o-", x, [y[0] * s / x[0] for s in x], ":")
        axis.set(xlabel="samples", title=title, ylim=(min(y) / 3, max(y) * 3))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=SIZES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fork"])
    parser.add_argument("--plot", type=Path, default=Path("build/bench/scale.png"))
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", default="fork", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return print(json.dumps(turn(args.turn, args.method, WORKERS)))
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name) / "s", 64 * 256)
        base = {m: child("--turn", Path(name) / "s", "--method", m) for m in args.methods}
    titles = ("node GB", "rank MB", "worker MB", "first s", "resume s", "order ms")
    print(f"{'samples':>13}{'start':>12}{titles[0]:>10}{titles[1]:>10}{titles[2]:>10}"
          f"{titles[3]:>8}{titles[4]:>9}{titles[5]:>9}")  # fmt: skip
    for method, found in base.items():
        print(f"{'(base)':>13}{method:>12}{'':>10}{found['rank_bytes'] / 1e6:>10.0f}"
              f"{found['worker_bytes'] / 1e6:>10.1f}")  # fmt: skip
    rows = [at(samples, base, args.methods) for samples in args.samples]
    plans = {files: child(files, module="scale_plan")["bytes"] for files in PLANNED}
    few, many = PLANNED[0], PLANNED[-1]
    plan = plans[few] + (plans[many] - plans[few]) / (many - few) * (14_000_000 - few)
    draw(rows, plans | {14_000_000: plan}, args.plot)
    last = {k: v for k, v in rows[-1].items() if k != "resume_s"}
    print(json.dumps({**last, "plan_gb_14m": round(plan / 1e9, 2)}))


if __name__ == "__main__":
    import bench_scale  # so that a spawned worker finds EmptyReader by a name it can import

    bench_scale.main()

"""How long training waits for its data when the shards lie in a slow store.

    python tests/bench/bench_store.py            (make bench-store)

Shards of small images with ballast are served on loopback at 1.2 times the bytes per second that
the steps need, each answer late by a latency, into an empty $RELAXMIM_CACHE. A step is a pause of
fixed length. The waits of the steps of the first window are the price of an empty cache and shown
apart; the rest of the epoch counts. The last line is one JSON object: the share of the time that
went into waiting, the same where all shards lie in the cache already (what a busy machine adds),
and the store's bytes per second over the need.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from loader_helpers import jpeg
from slow_store import SlowStore

from pipeline.data.batch import LoaderConfig
from pipeline.data.crops import Crop
from pipeline.data.loader import train_loader
from shard_tools.index_shards import main as index_shards

PARTITIONS, WINDOW, SHARE = 4, 4, 4  # shards shuffled together, samples of a partition in a batch
IN_SHARD, WINDOWS, BALLAST = 48, 3, 20_000  # samples; windows per partition and epoch; bytes
BATCH, WARM = PARTITIONS * SHARE, 8  # steps that fill the pipeline of the second run
SHARDS = PARTITIONS * WINDOW * WINDOWS
STEPS = SHARDS * IN_SHARD // BATCH  # of an epoch


def write_shards(folder: Path) -> None:
    """Tars of 32x32 JPEGs, each beside a field of random bytes that nobody reads."""
    draw, pictures = np.random.default_rng(0), [jpeg(seed, (32, 32)) for seed in range(16)]
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for place in range(IN_SHARD):
                key = f"{number}-{place}"
                fields = {"jpg": pictures[place % 16], "bin": draw.bytes(BALLAST)}
                for name, data in fields.items():
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    if index_shards([str(folder), "--workers", "1", "--unlabelled"]):
        raise SystemExit("error: the shards cannot be indexed")


def waits(url: str, cache: Path, step_seconds: float, workers: int, steps: int) -> list[float]:
    """Seconds that each step waited for its batch."""
    config = LoaderConfig(
        url, batch_size=BATCH, micro_batch=BATCH, crop=Crop(32, (0.5, 1.0), (3 / 4, 4 / 3)),
        partitions=PARTITIONS, window=WINDOW, workers=workers, cache=cache,
    )  # fmt: skip
    loader, found = iter(train_loader(config, 0, 1, range(steps))), []
    for _ in range(steps):
        start = time.monotonic()
        next(loader)
        found.append(time.monotonic() - start)
        time.sleep(step_seconds)
    loader.close()
    return found


def share(found: list[float], step_seconds: float) -> float:
    """Of the time of these steps, the part that went into waiting."""
    return round(sum(found) / (sum(found) + len(found) * step_seconds), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step", type=float, default=0.25, help="seconds of a step")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of each answer")
    parser.add_argument("--over", type=float, default=1.2, help="the store's bandwidth / the need")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shards, cache = Path(name, "shards"), Path(name, "cache")
        shards.mkdir()
        write_shards(shards)
        size = sum(path.stat().st_size for path in shards.glob("*.tar"))
        need = size / STEPS / args.step
        with SlowStore(args.over * need, args.latency) as store:
            store.put(shards)
            threading.Thread(target=store.serve_forever, daemon=True).start()
            print(f"{SHARDS} shards of {size / SHARDS / 1e6:.1f} MB, {STEPS} steps of "
                  f"{args.step:g} s: {need / 1e6:.1f} MB/s, the store has {args.over:g} times as "
                  f"much, answers {args.latency * 1000:.0f} ms late", flush=True)  # fmt: skip
            found = waits(store.url, cache, args.step, args.workers, STEPS)
            control = waits(store.url, cache, args.step, args.workers, STEPS // WINDOWS)
            store.shutdown()
    first = STEPS // WINDOWS
    for number in range(WINDOWS):
        part = found[number * first : (number + 1) * first]
        print(f"window {number + 1}: waited {sum(part):.1f} s of "
              f"{sum(part) + len(part) * args.step:.1f} s, at most {max(part):.2f} s")  # fmt: skip
    print(f"again, with all of it in the cache: waited {sum(control[WARM:]):.1f} s")
    waited = {"data_wait": found[first:], "from_cache": control[WARM:]}
    last = {name: share(part, args.step) for name, part in waited.items()}
    print(json.dumps({**last, "store_over_need": args.over}))


if __name__ == "__main__":
    sys.exit(main())

"""How near the loader's batches come to a true shuffle.

    python shard_tools/shuffle_quality.py data/shards/train

A batch takes as many samples from each of `partitions` stretches of the shuffled row of shards,
and there from `window` shards. On shards that are sorted by class a batch then holds more equal
labels than one drawn from all samples. The measure is the chance that two samples of a batch have
the same label, over that of any two samples: 1 is a true shuffle.

With f the chance that two samples of a batch come from one window (one partition, and no border
of a window between them), w shards in a window, and S, D the chances of equal labels in one shard
and in two:

    ratio = [f (S / w + (1 - 1 / w) D) + (1 - f) D] / T,    T = S / n + (1 - 1 / n) D
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import numpy as np

from pipeline.errors import check_range
from pipeline.help_text import HelpFormatter
from shard_tools import cli
from shard_tools.manifest import Manifest, read_manifest

LIMIT = 1.3  # above it a run warns
_SHARDS, _SAMPLES = 512, 32  # that a run looks at: a few blocks of the index each


@dataclass(frozen=True)
class Mixture:
    """Chances that two samples have the same label: in the same shard, in two shards.

    pairs: how many of one shard were compared; shards, samples: of the whole folder (shards that
    have samples).
    """

    same: float
    other: float
    pairs: int
    shards: int
    samples: int

    @property
    def overall(self) -> float:
        return self.same / self.shards + (1 - 1 / self.shards) * self.other

    def ratio(self, batch_size: int, partitions: int, window: int) -> float:
        """Equal labels in a batch, over those of a true shuffle."""
        f, w = self._window(batch_size, partitions, window)
        inside = self.same / w + (1 - 1 / w) * self.other
        return (f * inside + (1 - f) * self.other) / self.overall

    def error(self, batch_size: int, partitions: int, window: int) -> float:
        """Standard error of `ratio` from the number of pairs that were compared."""
        f, w = self._window(batch_size, partitions, window)
        return f / w / self.overall * math.sqrt(self.overall / self.pairs)

    def cure(self, batch_size: int, partitions: int) -> int | None:
        """The smallest window with a ratio of at most LIMIT; None where no window has it."""
        widest = math.ceil(self.shards / partitions) + 1
        if self.ratio(batch_size, partitions, widest) > LIMIT:
            return None
        windows = range(1, widest + 1)
        return next(w for w in windows if self.ratio(batch_size, partitions, w) <= LIMIT)

    def _window(self, batch_size: int, partitions: int, window: int) -> tuple[float, float]:
        """The chance that two samples of a batch come from one window, and its shards."""
        share = batch_size / partitions
        w = max(min(window, self.shards / partitions), 1)
        x = share / (w * self.samples / self.shards)  # of a window that a batch takes
        together = 1 - x / 3 if x <= 1 else 1 / x - 1 / (3 * x * x)  # no border between two
        return (share - 1) / max(batch_size - 1, 1) * together, w


def measure(manifest: Manifest, shards: int = _SHARDS, samples: int = _SAMPLES) -> Mixture | None:
    """Look at the labels of `samples` samples in each of `shards` shards, which are drawn (evenly
    spread ones would miss that neighbours share a class); None where there are no labels or too
    few samples to tell."""
    filled = np.flatnonzero(manifest.table.samples)
    if not manifest.classes or not len(filled):
        return None
    chosen = np.random.default_rng(0).permutation(filled)[:shards]
    total: dict[int, int] = {}
    count = pairs = equal = 0
    for shard in chosen:
        size = int(manifest.table.samples[shard])
        positions = np.unique(np.linspace(0, size - 1, min(samples, size)).astype(int))
        labels = manifest.rows(manifest.starts[shard] + positions)["label"]
        known, counts = np.unique(labels[labels >= 0], return_counts=True)
        for label, number in zip(known.tolist(), counts.tolist(), strict=True):
            total[label] = total.get(label, 0) + number
        equal += int((counts * (counts - 1)).sum())
        pairs += int(counts.sum() * (counts.sum() - 1))
        count += int(counts.sum())
    everything = sum(number * (number - 1) for number in total.values())
    across = count * (count - 1) - pairs
    if not pairs or (not across and len(filled) > 1) or not everything:
        return None
    other = (everything - equal) / across if across else 0.0
    return Mixture(equal / pairs, other, pairs // 2, len(filled), manifest.samples)


def warning(manifest: Manifest, batch_size: int, partitions: int, window: int) -> str:
    """What a run should know of its shuffle; empty where it is good, or nothing can be told."""
    mixture = measure(manifest)
    numbers = batch_size, partitions, window
    if mixture is None or mixture.ratio(*numbers) - 3 * mixture.error(*numbers) <= LIMIT:
        return ""
    cure = mixture.cure(batch_size, partitions)
    how = (
        f"data.window: {cure} cures it"
        if cure
        else "no data.window cures it; write the shards again in random order (make_shards.py), or "
        "use more data.partitions"
    )
    return (
        f"{manifest.home}: shards are sorted by class, and a batch holds "
        f"{mixture.ratio(*numbers):.2f} times as many images of the same class as in a true "
        f"shuffle (data.partitions {partitions}, data.window {window}); {how}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="How close the loader's batches come to a true shuffle, by data.window: how "
        "often two images of a batch share a label, over how often any two images of the folder do "
        "(1 is a true shuffle; above it, batches hold too many images of the same class).",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", help="folder of shards, or its URL")
    parser.add_argument(
        "--batch-size", type=int, default=4096, help="images of a step on all ranks together"
    )
    parser.add_argument("--partitions", type=int, default=64, help="data.partitions of the recipe")
    parser.add_argument("--window", type=int, default=8, help="data.window of the recipe")
    return cli.run(report, cli.parse(parser, argv))


def report(options: argparse.Namespace) -> int:
    """Print the ratio for the window given and those around it; 0."""
    b, p, w = options.batch_size, options.partitions, options.window
    for name, value in (("batch-size", b), ("partitions", p), ("window", w)):
        check_range(f"--{name}", value, at_least=1)
    if b % p:
        raise cli.ToolError(f"--batch-size {b}: must be a multiple of the {p} partitions")
    manifest = read_manifest(options.folder)
    if b > manifest.samples:
        raise cli.ToolError(
            f"--batch-size {b}: {options.folder} has {cli.counted(manifest.samples, 'image')}, "
            "less than one batch; give the batch_size of the recipe that trains on them"
        )
    mixture = measure(manifest, 4096, 256)
    if mixture is None:
        raise cli.ToolError(f"{options.folder}: has no labels by which to judge the shuffle")
    print(
        f"pairs of equal labels in a batch of {b}, relative to a true shuffle (1), with "
        f"{cli.counted(p, 'partition')}:"
    )
    for window in sorted({1, 2, 4, 8, 16, 32, 64, w}):
        mark = "  <- --window" if window == w else ""
        print(f"window {window:>3}  {mixture.ratio(b, p, window):7.3f}{mark}")
    if text := warning(manifest, b, p, w):
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

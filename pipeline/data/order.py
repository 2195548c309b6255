"""The order of samples: a pure function of (seed, epoch, step).

An epoch's order: permute the shards by (seed, epoch); concatenate their samples; cut into P equal
partitions; shuffle inside windows of shards; the global batch of a step takes B / P samples from
each partition. Rank r of W serves partitions [r P / W, (r + 1) P / W). Hence each sample comes
once per epoch, every rank has the same number of steps, any world size that divides P and any
number of workers give the same global batches, a run is resumed by its step alone, and a rank
touches only the shards of its partitions.

Random numbers come from Philox, a counter-based generator, keyed by (seed, epoch) and the number
of what they are for; only its raw bits are used, so the order does not depend on numpy's version.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from pipeline.errors import UserError

SHARDS, WINDOWS, DRAWS, CROPS, SECOND_CROPS = range(5)  # streams of random numbers


class _Generator(threading.local):
    """One Philox per thread: setting its state is four times as fast as making another."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.state = self.philox.state


_generator = _Generator()


def random_bits(seed: int, epoch: int, stream: int, number: int, count: int) -> np.ndarray:
    """`count` random uint64: Philox4x64-10, key (seed, epoch), counter (…, number, stream)."""
    state = _generator.state
    state["state"]["key"][:] = (seed, epoch)
    state["state"]["counter"][:] = (0, 0, number, stream)
    _generator.philox.state = state
    return _generator.philox.random_raw(count)


def steps_per_epoch(samples: int, batch_size: int, partitions: int) -> int:
    """Global batches in an epoch: samples of the smallest partition // (batch_size / partitions).

    The remainder, fewer samples than one batch, is left out of the epoch, others in each epoch.
    """
    _check_batch(batch_size, partitions)
    return (samples // partitions) // (batch_size // partitions)


def global_batch(
    shard_sizes: Sequence[int], *, seed: int, epoch: int, step: int, batch_size: int,
    partitions: int, window: int,
) -> np.ndarray:  # fmt: skip
    """Sample numbers (int64 [batch_size]) of global batch `step` (counted within the epoch).

    Rank r of W takes the r-th of W equal contiguous pieces. Raises UserError where `step` lies
    outside the epoch or the batch cannot be cut into partitions.
    """
    order = _known_order(tuple(shard_sizes), seed, batch_size, partitions, window)
    return order.samples(epoch, step, 0, batch_size)[0]


@dataclass(frozen=True, eq=False)
class Order:
    """Which sample stands where: shard sizes, and the recipe's numbers that fix the order.

    draws: > 0 makes an epoch of that many draws with replacement (for tiny data sets).
    """

    sizes: tuple[int, ...]
    seed: int
    batch_size: int
    partitions: int = 64
    window: int = 8
    draws: int = 0
    _epochs: dict[int, dict[int, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_batch(self.batch_size, self.partitions)
        if self.window < 1:
            raise UserError(f"window {self.window}: must be at least one shard")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}: must lie between 0 and 2**63 - 1")
        if not self.steps:
            what = f"an epoch of {self.draws} draws" if self.draws else f"{sum(self.sizes)} samples"
            raise UserError(
                f"batch_size {self.batch_size}: {what} cannot fill one batch; "
                "use a smaller batch_size or set samples_per_epoch"
            )

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return steps_per_epoch(self.draws or sum(self.sizes), self.batch_size, self.partitions)

    def samples(
        self, epoch: int, step: int, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and randomness keys, int64, of places [first, last) of a global batch."""
        if not 0 <= step < self.steps:
            raise UserError(f"step {step}: an epoch has the steps 0 to {self.steps - 1}")
        share = self.batch_size // self.partitions
        samples, keys = [], []
        for number in range(first // share, -(-last // share)):
            start, stop = max(first - number * share, 0), min(last - number * share, share)
            places = np.arange(step * share + start, step * share + stop)
            part = self.places(epoch, number, places)
            samples.append(part[0])
            keys.append(part[1])
        return np.concatenate(samples), np.concatenate(keys)

    def places(self, epoch: int, number: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and keys at `places` of partition `number` (taken modulo its length)."""
        samples = self._partition(epoch, number)
        places = places % len(samples)
        if not self.draws:
            return samples[places], samples[places]
        return samples[places], places + number * self.draws // self.partitions

    def _partition(self, epoch: int, number: int) -> np.ndarray:
        """partition_order, remembered for this epoch and the one before."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = {}
        known = self._epochs[epoch]
        if number not in known:
            known[number] = partition_order(self, epoch, number)
        return known[number]


_known_order = lru_cache(maxsize=4)(Order)


def partition_order(order: Order, epoch: int, number: int) -> np.ndarray:
    """Sample numbers of one partition of an epoch in the order they are served: int64 [~ N / P]."""
    total = order.draws or sum(order.sizes)
    low = number * total // order.partitions
    high = (number + 1) * total // order.partitions
    if order.draws:
        bits = random_bits(order.seed, epoch, DRAWS, number, high - low)
        return (bits % np.uint64(sum(order.sizes))).astype(np.int64)
    shards, ends = _shard_order(order, epoch)
    first, last = np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left")
    sizes, starts = np.array(order.sizes), np.cumsum([0, *order.sizes])
    pieces = []
    for place in range(first, last + 1):
        shard = shards[place]
        begin = ends[place] - sizes[shard]  # of this shard in the epoch's concatenation
        inside = np.arange(max(low - begin, 0), min(high - begin, sizes[shard]))
        pieces.append(starts[shard] + inside)
    windows = [
        np.concatenate(pieces[start : start + order.window])
        for start in range(0, len(pieces), order.window)
    ]
    bits = random_bits(order.seed, epoch, WINDOWS, number, high - low)
    cuts = np.cumsum([len(window) for window in windows])[:-1]
    return np.concatenate(
        [
            window[np.argsort(noise, kind="stable")]
            for window, noise in zip(windows, np.split(bits, cuts), strict=True)
        ]
    )


@lru_cache(maxsize=4)
def _shard_order(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The epoch's permutation of the (non-empty) shards and where each ends once concatenated."""
    noise = random_bits(order.seed, epoch, SHARDS, 0, len(order.sizes))
    shards = np.argsort(noise, kind="stable")
    sizes = np.array(order.sizes, np.int64)[shards]
    shards = shards[sizes > 0]
    return shards, np.cumsum(sizes[sizes > 0])


def _check_batch(batch_size: int, partitions: int) -> None:
    if partitions < 1:
        raise UserError(f"partitions {partitions}: must be at least 1")
    if batch_size < 1 or batch_size % partitions:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of the {partitions} partitions; "
            f"use a multiple of {partitions}, or a number of partitions that divides it"
        )

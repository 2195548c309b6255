"""The order of samples: a pure function of (seed, epoch, step).

An epoch's order: permute the shards by (seed, epoch); concatenate their samples; cut into P equal
partitions; shuffle inside windows of shards; the global batch of a step takes B / P samples from
each partition. Rank r of W serves partitions [r P / W, (r + 1) P / W). Hence each sample comes
once per epoch, every rank has the same number of steps, any world size that divides P and any
number of workers give the same global batches, a run is resumed by its step alone, and a rank
touches only the shards of its partitions.

Random numbers come from Philox, a counter-based generator, keyed by (seed, epoch) and the number
of what they are for; only its raw bits are used, so the order does not depend on numpy's version.
A place in that stream is reached at once, and so is any step: a process holds the permutation of
the shards and, per partition, the window that it serves, never what grows with the samples.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import UserError
from shard_tools.shard_table import ShardTable

SHARDS, WINDOWS, DRAWS, CROPS, SECOND_CROPS = range(5)  # streams of random numbers


class _Generator(threading.local):
    """One Philox per thread: setting its state is four times as fast as making another."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.state = self.philox.state


_generator = _Generator()


def random_bits(
    seed: int, epoch: int, stream: int, number: int, count: int, skip: int = 0
) -> np.ndarray:
    """`count` random uint64 from place `skip` of a stream: Philox4x64-10, key (seed, epoch),
    counter (…, number, stream)."""
    state = _generator.state
    state["state"]["key"][:] = (seed, epoch)
    state["state"]["counter"][:] = (skip // 4, 0, number, stream)  # four of them at a time
    _generator.philox.state = state
    return _generator.philox.random_raw(count + skip % 4)[skip % 4 :]


def steps_per_epoch(samples: int, batch_size: int, partitions: int) -> int:
    """Global batches in an epoch: samples of the smallest partition // (batch_size / partitions).

    The remainder, fewer samples than one batch, is left out of the epoch, others in each epoch.
    """
    _check_batch(batch_size, partitions)
    return (samples // partitions) // (batch_size // partitions)


class _Window(NamedTuple):
    """Places [first, last) of a partition and the samples there, in the order they are served."""

    epoch: int
    first: int
    last: int
    samples: np.ndarray  # uint32 where that suffices, else int64


@dataclass(frozen=True, eq=False)
class Order:
    """Which sample is where: shard sizes (int64 [shards]), and the recipe's numbers that fix
    the order.

    draws: > 0 makes an epoch of that many draws with replacement (for tiny data sets).
    """

    sizes: np.ndarray
    seed: int
    batch_size: int
    partitions: int = 64
    window: int = 8
    draws: int = 0
    _windows: dict[int, list[_Window]] = field(default_factory=dict, init=False, repr=False)
    _epoch: dict[int, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def of(cls, table: ShardTable, *numbers: int) -> Order:
        """The order of the shards of a manifest, whose arrays it shares; numbers: see `numbers`."""
        order = cls(table.samples, *numbers)
        order.__dict__["starts"] = table.starts[:-1]
        return order

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", np.asarray(self.sizes, np.int64))
        _check_batch(self.batch_size, self.partitions)
        if self.window < 1:
            raise UserError(f"window {self.window}: must be at least one shard")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}: must be between 0 and 2**63 - 1")
        if not self.steps:
            what = f"an epoch of {self.draws} draws" if self.draws else f"{self.total} samples"
            raise UserError(
                f"batch_size {self.batch_size}: {what} cannot fill one batch; "
                "use a smaller batch_size or set samples_per_epoch"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self.sizes, *self.numbers)  # without what is remembered

    @property
    def numbers(self) -> tuple[int, ...]:
        """All that fixes the order besides the sizes, as Order takes them."""
        return self.seed, self.batch_size, self.partitions, self.window, self.draws

    @cached_property
    def total(self) -> int:
        """Samples of the data set."""
        return int(self.sizes.sum())

    @cached_property
    def steps(self) -> int:
        """Steps of one epoch."""
        return steps_per_epoch(self.draws or self.total, self.batch_size, self.partitions)

    def samples(
        self, epoch: int, step: int, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and randomness keys, int64, of places [first, last) of a global batch."""
        if not 0 <= step < self.steps:
            raise UserError(f"step {step}: an epoch has the steps 0 to {self.steps - 1}")
        share = self.batch_size // self.partitions
        begin, samples, keys = step * share, [], []
        for number in range(first // share, -(-last // share)):
            start = begin + max(first - number * share, 0)
            stop = begin + min(last - number * share, share)
            samples.append(self._serve(epoch, number, start, stop))
            if self.draws:
                keys.append(np.arange(start, stop) + self._bounds(number)[0])
        served = np.concatenate(samples).astype(np.int64)
        return served, np.concatenate(keys) if self.draws else served.copy()

    def places(self, epoch: int, number: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and keys at `places` of partition `number` (taken modulo its length)."""
        low, high = self._bounds(number)
        places = places % (high - low)
        samples = np.array([self._serve(epoch, number, p, p + 1)[0] for p in places], np.int64)
        return samples, (places + low if self.draws else samples.copy())

    def _bounds(self, number: int) -> tuple[int, int]:
        """Where a partition begins and ends in the epoch's row of samples (or draws)."""
        total = self.draws or self.total
        return number * total // self.partitions, (number + 1) * total // self.partitions

    def _serve(self, epoch: int, number: int, start: int, stop: int) -> np.ndarray:
        """Samples at places [start, stop) of a partition."""
        if self.draws:
            bits = random_bits(self.seed, epoch, DRAWS, number, stop - start, start)
            return bits % np.uint64(self.total)
        pieces = []
        while start < stop:
            window = self._window(epoch, number, start)
            pieces.append(window.samples[start - window.first : stop - window.first])
            start = window.last
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _window(self, epoch: int, number: int, place: int) -> _Window:
        """The window that holds a place. The last two of a partition are remembered: the loader
        asks for what comes next, and for remote shards for what comes some steps later."""
        known = self._windows.setdefault(number, [])
        for window in known:
            if window.first <= place < window.last and window.epoch == epoch:
                return window
        del known[:-1]
        known.append(_make_window(self, epoch, number, place))
        return known[-1]

    def shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the (non-empty) shards and where each ends once
        concatenated; remembered for two epochs."""
        known = self._epoch.get(epoch)
        if known is None:
            noise = random_bits(self.seed, epoch, SHARDS, 0, len(self.sizes))
            shards = np.argsort(noise, kind="stable").astype(np.int32)
            sizes = self.sizes[shards]
            known = shards[sizes > 0], np.cumsum(sizes[sizes > 0])
            if len(self._epoch) > 1:  # the loader asks for this epoch and for the next one
                del self._epoch[min(self._epoch)]
            self._epoch[epoch] = known
        return known

    @cached_property
    def starts(self) -> np.ndarray:
        """First sample of each shard: int64 [shards]."""
        return np.cumsum(self.sizes) - self.sizes


def _make_window(order: Order, epoch: int, number: int, place: int) -> _Window:
    """Shuffle the window of shards that holds a place of a partition.

    The windows of a partition are cut from its row of shards; each is sorted by its own piece of
    the partition's random numbers.
    """
    shards, ends = order.shard_order(epoch)
    low, high = order._bounds(number)
    first, last = np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left")
    inside = np.searchsorted(ends, low + place, "right") - first
    begin = first + inside // order.window * order.window
    those = slice(begin, min(begin + order.window, last + 1))
    stops, sizes = ends[those], order.sizes[shards[those]]
    begins = np.maximum(stops - sizes, low)  # in the epoch's row of samples
    # From a place in that row to the number of the sample.
    shifts = order.starts[shards[those]] - (stops - sizes)
    stops = np.minimum(stops, high)
    kind = np.uint32 if order.total <= 2**32 else np.int64
    row = np.concatenate(
        [np.arange(a + d, b + d, dtype=kind) for a, b, d in zip(begins, stops, shifts, strict=True)]
    )
    start, stop = int(begins[0]) - low, int(stops[-1]) - low
    noise = random_bits(order.seed, epoch, WINDOWS, number, stop - start, start)
    return _Window(epoch, start, stop, row[_stable_argsort(noise)])


def _stable_argsort(noise: np.ndarray) -> np.ndarray:
    """As np.argsort(noise, kind="stable"), but several times as fast where no two are equal."""
    order = np.argsort(noise)
    ordered = noise[order]
    if (ordered[1:] == ordered[:-1]).any():
        return np.argsort(noise, kind="stable")
    return order


def _check_batch(batch_size: int, partitions: int) -> None:
    if partitions < 1:
        raise UserError(f"partitions {partitions}: must be at least 1")
    if batch_size < 1 or batch_size % partitions:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of the {partitions} partitions; "
            f"use a multiple of {partitions}, or a number of partitions that divides it"
        )

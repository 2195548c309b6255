"""Shards → uint8 batches, in the order of pipeline/order.py.

A worker process reads a sample's bytes at its offset, decodes, crops and flips it into a uint8
batch; normalisation belongs to the device. The state of the data is one integer, the step.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.decode import Box, CentreCrop, Choose, Crop, DecodeError, decoder
from pipeline.order import CROPS, Order, global_batch, random_bits, steps_per_epoch
from shard_tools.manifest import Manifest, ManifestError, read_manifest

__all__ = [
    "Batch", "Box", "CentreCrop", "Crop", "Loader", "Order", "SampleError",
    "eval_loader", "global_batch", "steps_per_epoch", "train_loader",
]  # fmt: skip

log = logging.getLogger(__name__)
_REPLACEMENTS = 16  # samples tried in place of one that will not decode
_NUMBERS = ("label", "sample", "key")  # the small tensors of a batch
_OPEN_SHARDS = 256  # file handles that one worker keeps


class SampleError(ValueError):
    """A sample that will not decode, in one sentence that names it, its shard and the reason."""


@dataclass
class Batch:
    """One micro-batch of one rank.

    image uint8 [b, H, W, 3]; label int64 [b] (-1 = none); sample int64 [b], numbers in the
    manifest; key int64 [b], what keys each sample's randomness within the epoch (= sample, but
    the number of the draw where an epoch is drawn with replacement); epoch and step, the
    optimizer step counted from 0 over the whole run; skipped: how many samples of this
    micro-batch would not decode and were replaced; faults: a sentence for each of them.
    """

    image: torch.Tensor
    label: torch.Tensor
    sample: torch.Tensor
    key: torch.Tensor
    epoch: int = 0
    step: int = 0
    skipped: int = 0
    faults: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the DataLoader's pinning thread)."""
        names = ("image", *_NUMBERS)
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})

    def __getstate__(self) -> dict[str, Any]:
        # From worker to main process: only the image is worth a piece of shared memory.
        return self.__dict__ | {name: getattr(self, name).numpy() for name in _NUMBERS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {name: torch.from_numpy(state[name]) for name in _NUMBERS}


class _Reader:
    """Reads and decodes samples of a manifest; lives in a worker process."""

    def __init__(self, manifest: Manifest, image_size: int, interpolation: str, how: str) -> None:
        self.manifest, self.interpolation = manifest, interpolation
        self.image_size = image_size
        self.decoder, _ = decoder(how)  # by name: a worker may be a fresh process
        self.handles: OrderedDict[int, int] = OrderedDict()
        self.starts: list[int] = manifest.starts.tolist()
        _ = manifest.index  # read and checked once, before the workers start

    def read(self, sample: int) -> bytes:
        """The image bytes of a sample."""
        shard, row = self.shard(sample), self.manifest.index[sample]
        offset, length = int(row["offset"]), int(row["length"])
        data = os.pread(self._handle(shard), length, offset)
        if len(data) != length:
            raise ManifestError(
                f"{self.manifest.path(shard)}: sample {sample} ends after {len(data)} of "
                f"{length} bytes; the shard changed since its manifest was written"
            )
        return data

    def shard(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return bisect_right(self.starts, sample) - 1

    def decode(self, sample: int, choose: Choose, out: np.ndarray) -> None:
        """Write the chosen crop of a sample into `out`; SampleError if it will not decode."""
        try:
            decoder(self.decoder)[1](self.read(sample), choose, out, self.interpolation)
        except DecodeError as error:
            where = self.manifest.path(self.shard(sample))
            raise SampleError(f"sample {sample} of {where} will not decode: {error}") from error

    def empty(self, count: int) -> torch.Tensor:
        """An uninitialised uint8 batch [count, S, S, 3]; in a worker, memory that the main
        process can map, which saves a copy."""
        shape = (count, self.image_size, self.image_size, 3)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)

    def labels(self, samples: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.manifest.index["label"][samples].astype(np.int64))

    def _handle(self, shard: int) -> int:
        if shard in self.handles:
            self.handles.move_to_end(shard)
            return self.handles[shard]
        path = self.manifest.path(shard)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ManifestError(f"{path}: this shard cannot be read ({error.strerror})") from error
        if len(self.handles) >= _OPEN_SHARDS:
            os.close(self.handles.popitem(last=False)[1])
        self.handles[shard] = handle
        return handle


class _Train(Dataset):
    """Micro-batch number t of a rank: step t // micro-batches per step."""

    def __init__(
        self, reader: _Reader, order: Order, crop: Crop, micro_batch: int, rank: int, world: int,
        on_error: str,
    ) -> None:  # fmt: skip
        self.reader, self.order, self.crop = reader, order, crop
        self.micro_batch, self.first = micro_batch, rank * order.batch_size // world
        self.per_step = order.batch_size // (world * micro_batch)
        self.on_error = on_error

    def __getitem__(self, task: int) -> Batch | Exception:
        try:
            return self._batch(task)
        except (SampleError, ManifestError) as error:
            return error  # raised again by the Loader, so that it stays one sentence

    def _batch(self, task: int) -> Batch:
        step, micro = divmod(task, self.per_step)
        epoch, within = divmod(step, self.order.steps)
        first = self.first + micro * self.micro_batch
        samples, keys = self.order.samples(epoch, within, first, first + self.micro_batch)
        image, faults = self.reader.empty(self.micro_batch), []
        pixels = image.numpy()
        for place in range(self.micro_batch):
            try:
                self._decode(epoch, samples[place], keys[place], pixels[place])
            except SampleError as error:
                if self.on_error == "fail":
                    raise
                faults.append(str(error))
                samples[place], keys[place] = self._replace(
                    epoch, within, first + place, pixels[place], error
                )
        return Batch(
            image, self.reader.labels(samples), torch.from_numpy(samples), torch.from_numpy(keys),
            epoch, step, len(faults), tuple(faults),
        )  # fmt: skip

    def _decode(self, epoch: int, sample: int, key: int, out: np.ndarray) -> None:
        bits = random_bits(self.order.seed, epoch, CROPS, int(key), Crop.UNIFORMS)
        uniform = ((bits >> np.uint64(11)) * 2.0**-53).tolist()
        self.reader.decode(int(sample), self.crop.choose(uniform), out)

    def _replace(
        self, epoch: int, step: int, place: int, out: np.ndarray, error: SampleError
    ) -> tuple[int, int]:
        """Decode the next good sample of the same partition instead: the same one for any world
        size, and one whose shard this rank reads anyway."""
        number, inside = divmod(place, self.order.batch_size // self.order.partitions)
        inside += step * (self.order.batch_size // self.order.partitions)
        for offset in range(1, _REPLACEMENTS + 1):
            sample, key = self.order.places(epoch, number, np.array([inside + offset]))
            try:
                self._decode(epoch, sample[0], key[0], out)
                return sample[0], key[0]
            except SampleError:
                continue
        raise SampleError(f"{error}, nor will the {_REPLACEMENTS} samples after it") from error


class _Eval(Dataset):
    """Batch number t of a rank's contiguous share of the samples."""

    def __init__(
        self, reader: _Reader, crop: CentreCrop, batch_size: int, low: int, high: int
    ) -> None:
        self.reader, self.crop, self.batch_size = reader, crop, batch_size
        self.low, self.high = low, high

    def __getitem__(self, task: int) -> Batch | Exception:
        first = self.low + task * self.batch_size
        samples = np.arange(first, min(first + self.batch_size, self.high))
        image = self.reader.empty(len(samples))
        pixels = image.numpy()
        try:
            for place, sample in enumerate(samples):
                self.reader.decode(int(sample), self.crop, pixels[place])
        except (SampleError, ManifestError) as error:
            return error
        numbers = torch.from_numpy(samples)
        return Batch(image, self.reader.labels(samples), numbers, numbers)


def _quiet_worker(_: int) -> None:
    # The launcher signals every process of the group; the rank, not its workers, decides when
    # to stop. Workers end when the rank closes the loader or is gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Loader:
    """Iterates over batches (once); `len()` is their number, `skipped` counts bad samples so far.

    Raises SampleError or ManifestError from the loop. `close()` ends the workers; leaving the
    loop at its end or by an exception does too, and so does the end of the process.
    """

    def __init__(
        self, dataset: Any, tasks: range, workers: int, pin_memory: bool, reader: _Reader
    ) -> None:
        self.tasks, self.skipped, self.decoder = tasks, 0, reader.decoder
        self.manifest = reader.manifest
        self._iterator: Iterator[Any] | None = None
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=tasks,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_quiet_worker,
            pin_memory=pin_memory,
        )
        _open_loaders.add(self)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = iter(self._loader)
        try:
            # Not a for loop: it would keep the iterator, and so the workers, alive after close().
            while self._iterator is not None:
                item = next(self._iterator, None)
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                self.skipped += item.skipped
                for fault in item.faults:
                    log.warning("skipped: %s", fault)
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._iterator = None  # its destructor stops and joins them


_open_loaders: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Before multiprocessing's own exit handler, which would wait for workers that ignore SIGTERM.
    for loader in list(_open_loaders):
        loader.close()


def train_loader(
    folder: str | Path,
    *,
    batch_size: int,
    micro_batch: int,
    rank: int,
    world: int,
    seed: int,
    start_step: int,
    total_steps: int,
    crop: Crop,
    workers: int,
    partitions: int = 64,
    window: int = 8,
    on_error: Literal["fail", "skip"] = "fail",
    samples_per_epoch: int = 0,
    decode: str = "auto",
    pin_memory: bool = False,
) -> Loader:
    """Micro-batches of this rank for the optimizer steps [start_step, total_steps).

    batch_size is global; a step has batch_size / (world · micro_batch) micro-batches per rank.
    window: shards that are shuffled together. on_error: `skip` replaces a sample that will not
    decode by the next one of its partition, counts and logs it. samples_per_epoch: > 0 makes an
    epoch of that many draws with replacement. Raises ManifestError for a folder that is not a
    shard folder and ValueError for numbers that do not fit together.
    """
    _check_ranks(rank, world, workers)
    if partitions % world:
        raise ValueError(
            f"{partitions} partitions cannot be shared by {world} ranks; "
            f"use a world size that divides {partitions}, or a multiple of {world} as partitions"
        )
    if micro_batch < 1 or batch_size % (world * micro_batch):
        raise ValueError(
            f"batch_size {batch_size} cannot be split over {world} ranks in micro-batches of "
            f"{micro_batch}; use a multiple of {world * micro_batch}"
        )
    if not 0 <= start_step <= total_steps:
        raise ValueError(f"start_step {start_step}: must lie between 0 and {total_steps}")
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error {on_error!r}: must be 'fail' or 'skip'")
    manifest = read_manifest(folder)
    sizes = tuple(shard.samples for shard in manifest.shards)
    order = Order(sizes, seed, batch_size, partitions, window, samples_per_epoch)
    reader = _Reader(manifest, crop.image_size, crop.interpolation, decode)
    dataset = _Train(reader, order, crop, micro_batch, rank, world, on_error)
    tasks = range(start_step * dataset.per_step, total_steps * dataset.per_step)
    return Loader(dataset, tasks, workers, pin_memory, reader)


def eval_loader(
    folder: str | Path,
    *,
    batch_size: int,
    rank: int,
    world: int,
    image_size: int,
    workers: int,
    resize: int | None = None,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    decode: str = "auto",
    pin_memory: bool = False,
) -> Loader:
    """Centre crops, each sample exactly once over all ranks, in manifest order, without padding.

    batch_size is per rank; the last batch may be smaller, and ranks may have different numbers of
    batches. resize: pixels of the shorter side before the crop, by default image_size · 256 / 224.
    A sample that will not decode raises SampleError: a score over fewer images is another score.
    """
    _check_ranks(rank, world, workers)
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")
    manifest = read_manifest(folder)
    crop = CentreCrop(image_size, resize or round(image_size * 256 / 224), interpolation)
    reader = _Reader(manifest, image_size, interpolation, decode)
    low, high = (manifest.samples * r // world for r in (rank, rank + 1))
    dataset = _Eval(reader, crop, batch_size, low, high)
    return Loader(dataset, range(-(-(high - low) // batch_size)), workers, pin_memory, reader)


def _check_ranks(rank: int, world: int, workers: int) -> None:
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}: ranks run from 0 to world - 1")
    if workers < 0:
        raise ValueError(f"workers {workers}: must be 0 or more")

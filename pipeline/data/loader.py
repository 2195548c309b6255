"""Shards → uint8 batches, in the order of pipeline/data/order.py.

A worker process reads a sample's bytes at its offset, decodes, crops and flips it into a uint8
batch; normalisation belongs to the device. The state of the data is one integer, the step.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from pipeline.data.crops import CentreCrop, Crop, Interpolation, shorter_side, side_at
from pipeline.data.jpeg import Choose
from pipeline.data.order import (
    CROPS,
    SECOND_CROPS,
    Order,
    random_bits,
)
from pipeline.data.reader import Reader, SampleError
from pipeline.data.shard_cache import GIB, ShardCache
from pipeline.data.shared import share
from pipeline.data.slots import Slots, lent
from pipeline.data.worker_faults import PREFETCH, SHARED, shared_bytes, worker_fault
from pipeline.errors import UserError
from shard_tools import shuffle_quality
from shard_tools.manifest import Manifest, ManifestError, is_remote, read_manifest

# Changes a crop, uint8 [S, S, 3], in place: (pixels, epoch, key, number of the view).
Augment = Callable[[np.ndarray, int, int, int], None]

StartMethod = Literal["fork", "forkserver", "spawn"]

log = logging.getLogger(__name__)
_REPLACEMENTS = 16  # samples tried in place of one that will not decode
_NUMBERS = ("label", "sample", "key")  # the small tensors of a batch
_AHEAD = 32  # steps ahead of which a remote shard is fetched at least


@dataclass
class Batch:
    """One micro-batch of one rank.

    image uint8 [b, H, W, 3]; label int64 [b] (-1 = none); sample int64 [b], numbers in the
    manifest; key int64 [b], what keys each sample's randomness within the epoch (= sample, but
    the number of the draw where an epoch is drawn with replacement); epoch and step, the
    optimizer step counted from 0 over the whole run; bad_samples: how many samples of this
    micro-batch would not decode and were replaced; faults: a sentence for each of them; second
    uint8 [b, H, W, 3], another crop of each image, where it was asked for.
    """

    image: torch.Tensor
    label: torch.Tensor
    sample: torch.Tensor
    key: torch.Tensor
    epoch: int = 0
    step: int = 0
    bad_samples: int = 0
    faults: tuple[str, ...] = ()
    second: torch.Tensor | None = None
    slot: tuple[int, int] | None = None  # between processes: where the images are

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the DataLoader's pinning thread)."""
        names = ("image", *_NUMBERS) + (() if self.second is None else ("second",))
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})

    def __getstate__(self) -> dict[str, Any]:
        # From worker to main process: only the image is worth a piece of shared memory.
        state = self.__dict__ | {name: getattr(self, name).numpy() for name in _NUMBERS}
        if self.slot is not None:
            state |= {"image": tuple(self.image.shape), "second": self.second is not None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {name: torch.from_numpy(state[name]) for name in _NUMBERS}
        if self.slot is not None:
            shape = 1 + state["second"], *state["image"]
            self.image, *others = lent(*self.slot, shape)
            self.second, self.slot = (others or [None])[0], None


@dataclass(frozen=True)
class LoaderConfig:
    """What training batches are made of, the same on every rank.

    folder: shards (a path, URL, or their manifest). batch_size is global; a step has
    batch_size / (world · micro_batch) micro-batches per rank. window: shards that are shuffled
    together. on_error: `skip` replaces a sample that will not decode by the next one of its
    partition, counts and logs it. samples_per_epoch: > 0 makes an epoch of that many draws with
    replacement. sizes: (step before which a phase ends, side of its crops) of a run whose crops
    change their size; none: all have the crop's, which no phase exceeds. second_crop: fill
    Batch.second. augment: applied to each crop in the worker. workers: processes per rank. cache,
    cache_bytes: where remote shards are kept on this node (default $RELAXMIM_CACHE) and how many
    bytes of them. start_method: of the workers, by default Python's own; the batches and the memory
    are the same (spawn: see `_context`).
    """

    folder: str | Path | Manifest
    batch_size: int
    micro_batch: int
    crop: Crop
    seed: int = 0
    partitions: int = 64
    window: int = 8
    on_error: Literal["fail", "skip"] = "fail"
    samples_per_epoch: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    second_crop: bool = False
    augment: Augment | None = None
    workers: int = 0
    decode: str = "auto"
    cache: str | Path | None = None
    cache_bytes: int = 100 * GIB
    pin_memory: bool = False
    start_method: StartMethod | None = None


class _Train(Dataset):
    """Micro-batch number t of a rank: step t // micro-batches per step."""

    def __init__(
        self, reader: Reader, order: Order, config: LoaderConfig, rank: int, world: int, until: int
    ) -> None:
        self.until, self.ahead = until, _steps_ahead(order, reader.manifest, config, world)
        self.begun = False
        self.reader, self.order, self.crop = reader, order, config.crop
        self.sizes = config.sizes or ((until, config.crop.image_size),)
        self.micro_batch, self.first = config.micro_batch, rank * order.batch_size // world
        self.per_step = order.batch_size // (world * config.micro_batch)
        self.on_error, self.augment = config.on_error, config.augment
        self.streams = (CROPS, SECOND_CROPS) if config.second_crop else (CROPS,)
        self.images = config.micro_batch * len(self.streams)  # in a batch

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"order": self.order.numbers}  # its sizes are in the manifest

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.order = Order.of(self.reader.manifest.table, *state["order"])

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
        self._fetch_ahead(step, first, samples)
        shape = len(self.streams), self.micro_batch
        room, slot = self.reader.room(*shape, side=side_at(self.sizes, step))
        images, faults = list(room), []
        pixels = [image.numpy() for image in images]
        chosen = [[self._choose(epoch, s, key) for s in self.streams] for key in keys.tolist()]
        for place in np.flatnonzero(~self.reader.decode_all(samples, chosen, pixels)).tolist():
            try:
                self._decode(epoch, samples[place], keys[place], [p[place] for p in pixels])
            except SampleError as error:
                if self.on_error == "fail":
                    raise
                faults.append(str(error))
                samples[place], keys[place] = self._replace(
                    epoch, within, first + place, [p[place] for p in pixels], error
                )
        if self.augment is not None:
            for place, key in enumerate(keys.tolist()):
                for view in range(len(self.streams)):
                    self.augment(pixels[view][place], epoch, key, view)
        return Batch(
            images[0], self.reader.labels(samples), torch.from_numpy(samples),
            torch.from_numpy(keys), epoch, step, len(faults), tuple(faults),
            images[1] if len(images) > 1 else None, slot,
        )  # fmt: skip

    def _fetch_ahead(self, step: int, first: int, samples: np.ndarray) -> None:
        """Remote shards: begin to fetch what will be read in some steps, and at the start of a
        process before it what `samples`, the first batch, lie in."""
        cache = self.reader.cache
        if cache is None:
            return
        later = divmod(min(step + self.ahead, self.until - 1), self.order.steps)
        soon, _ = self.order.samples(*later, first, first + self.micro_batch)
        for batch in (soon,) if self.begun else (samples, soon):
            for shard in dict.fromkeys(self.reader.shard(sample) for sample in batch.tolist()):
                cache.fetch_ahead(shard)
        self.begun = True

    def _decode(self, epoch: int, sample: int, key: int, outs: list[np.ndarray]) -> None:
        """Write the crops of a sample, one per stream of random numbers."""
        for stream, out in zip(self.streams, outs, strict=True):
            self.reader.decode(int(sample), self._choose(epoch, stream, int(key)), out)

    def _choose(self, epoch: int, stream: int, key: int) -> Choose:
        bits = random_bits(self.order.seed, epoch, stream, key, Crop.UNIFORMS)
        return self.crop.choose(((bits >> np.uint64(11)) * 2.0**-53).tolist())

    def _replace(
        self, epoch: int, step: int, place: int, outs: list[np.ndarray], error: SampleError
    ) -> tuple[int, int]:
        """Decode the next good sample of the same partition instead: the same one for any world
        size, and one whose shard this rank reads anyway."""
        number, inside = divmod(place, self.order.batch_size // self.order.partitions)
        inside += step * (self.order.batch_size // self.order.partitions)
        for offset in range(1, _REPLACEMENTS + 1):
            sample, key = self.order.places(epoch, number, np.array([inside + offset]))
            try:
                self._decode(epoch, sample[0], key[0], outs)
                return sample[0], key[0]
            except SampleError:
                continue
        raise SampleError(f"{error}, nor will the {_REPLACEMENTS} samples after it") from error


class _Eval(Dataset):
    """Batch number t of a rank's contiguous share of the samples."""

    def __init__(
        self, reader: Reader, crop: CentreCrop, batch_size: int, low: int, high: int
    ) -> None:
        self.reader, self.crop, self.batch_size = reader, crop, batch_size
        self.low, self.high, self.images = low, high, batch_size

    def __getitem__(self, task: int) -> Batch | Exception:
        first = self.low + task * self.batch_size
        samples = np.arange(first, min(first + self.batch_size, self.high))
        image, slot = self.reader.room(len(samples), side=self.crop.image_size)
        pixels = image.numpy()
        try:
            chosen = [[self.crop]] * len(samples)
            for place in np.flatnonzero(~self.reader.decode_all(samples, chosen, [pixels])):
                self.reader.decode(int(samples[place]), self.crop, pixels[place])
        except (SampleError, ManifestError) as error:
            return error
        numbers = torch.from_numpy(samples)
        return Batch(image, self.reader.labels(samples), numbers, numbers, slot=slot)


def _context(start_method: StartMethod | None) -> str:
    """Where fresh processes are asked for, one is made, which imports torch and then forks the
    workers: a worker of spawn has 265 MB of its own for that import, one of forkserver 33 MB."""
    method = start_method or multiprocessing.get_start_method()
    fresh = method == "spawn" and "forkserver" in multiprocessing.get_all_start_methods()
    return "forkserver" if fresh else method


def _quiet_worker(_: int) -> None:
    # The launcher signals every process of the group; the rank, not its workers, decides when
    # to stop. Workers end when the rank closes the loader or is gone.
    gc.freeze()  # a collection would write to what a fork inherits, and so copy all of it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started inside has these signals blocked, so that none ends it before it ignores
    them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Loader:
    """Iterates over batches (once); `len()` is their number, `bad_samples` counts those so far
    that would not decode and were replaced.

    Raises SampleError or ManifestError from the loop, UserError for a lost worker. `close()` ends
    the workers; leaving the loop at its end or by an exception does too, and so does the end of
    the process.
    """

    def __init__(
        self, dataset: Any, tasks: range, workers: int, pin_memory: bool, reader: Reader,
        start_method: StartMethod | None = None,
    ) -> None:  # fmt: skip
        self.tasks, self.bad_samples, self.decoder = tasks, 0, reader.decoder
        self.reader, self.manifest = reader, reader.manifest
        self._sizes = workers, dataset.images, reader.image_size
        if workers and hasattr(os, "memfd_create"):  # Linux
            reader.slots = Slots(workers, PREFETCH + 2, dataset.images * reader.image_size**2 * 3)
        self._iterator: Iterator[Any] | None = None
        self._workers: list[Any] = []
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=tasks,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_quiet_worker,
            multiprocessing_context=_context(start_method) if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # so that the global one is left as it is
        )
        _open_loaders.add(self)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Batch]:
        with self.explaining():
            self._start()
        try:
            # Not a for loop: it would keep the iterator, and so the workers, alive after close().
            while self._iterator is not None:
                with self.explaining():
                    item = next(self._iterator, None)
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                self.bad_samples += item.bad_samples
                for fault in item.faults:
                    log.warning("skipped: %s", fault)
                yield item
        finally:
            self.close()

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the loss of a worker into a UserError. torch raises it wherever the main process
        is, so a training loop has this around all of it."""
        try:
            yield
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            for worker in self._workers:  # its pipe breaks before its end is known
                worker.join(1 if isinstance(error, ConnectionError | EOFError) else 0)
            codes = [worker.exitcode for worker in self._workers if worker.exitcode is not None]
            told = worker_fault(error, *self._sizes, codes)
            if told is None:
                raise
            raise told from error

    def _start(self) -> None:
        others = set(multiprocessing.active_children())
        with _signals_blocked():
            self._iterator = iter(self._loader)
        self._workers = [c for c in multiprocessing.active_children() if c not in others]

    def close(self) -> None:
        """End the worker processes and what fetches ahead."""
        self.reader.close()
        if self._iterator is None and not self._workers:
            return  # again, by the end of an interpreter that knows no signals any more
        with _deaths_unwatched():
            if any(worker.exitcode for worker in self._workers):
                self._abandon()
            self._iterator = None  # its destructor asks them to stop, unless a traceback holds it
            for worker in self._workers:
                worker.join(2)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
        self._workers = []

    def _abandon(self) -> None:
        """Kill the workers that are left: the one that has died may have held a lock, for which
        they, and torch in asking them to stop, would wait for ever."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        iterator: Any = self._iterator
        if iterator is None or iterator._shutdown:
            return
        iterator._shutdown = True
        if iterator._worker_pids_set:
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        for queue in (*iterator._index_queues, iterator._worker_result_queue):
            queue.cancel_join_thread()


@contextlib.contextmanager
def _deaths_unwatched() -> Iterator[None]:
    """Hold off torch's handler of SIGCHLD, which raises for every worker that is killed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


_open_loaders: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Before multiprocessing's own exit handler, which would wait for workers that ignore SIGTERM.
    for loader in list(_open_loaders):
        loader.close()


def train_loader(config: LoaderConfig, rank: int, world: int, steps: range) -> Loader:
    """Micro-batches of rank `rank` of `world` for the optimizer steps range(first, last).

    Raises ManifestError for a folder that is not a shard folder and UserError for numbers that do
    not fit together.
    """
    _check_ranks(rank, world, config.workers)
    _check_split(config, world, steps)
    crop = config.crop
    images = config.micro_batch * (1 + config.second_crop)
    _check_shared_memory(config.workers, images, crop.image_size)
    manifest = _open(config.folder, config.workers, config.start_method)
    order = Order.of(
        manifest.table, config.seed, config.batch_size,
        config.partitions, config.window, config.samples_per_epoch,
    )  # fmt: skip
    remote = _cache(manifest, config.cache, config.cache_bytes)
    _warn_of_small_cache(order, manifest, world, config.cache_bytes)
    if rank == 0 and not order.draws:
        numbers = config.batch_size, config.partitions, config.window
        if text := shuffle_quality.warning(manifest, *numbers):
            log.warning("%s", text)
    reader = Reader(manifest, crop.image_size, crop.interpolation, config.decode, remote)
    dataset = _Train(reader, order, config, rank, world, steps.stop)
    tasks = range(steps.start * dataset.per_step, steps.stop * dataset.per_step)
    return Loader(dataset, tasks, config.workers, config.pin_memory, reader, config.start_method)


def _check_split(config: LoaderConfig, world: int, steps: range) -> None:
    if config.partitions % world:
        raise UserError(
            f"{config.partitions} partitions cannot be shared by {world} ranks; use a world size "
            f"that divides {config.partitions}, or a multiple of {world} as partitions"
        )
    if config.micro_batch < 1 or config.batch_size % (world * config.micro_batch):
        raise UserError(
            f"batch_size {config.batch_size} cannot be split over {world} ranks in micro-batches "
            f"of {config.micro_batch}; use a multiple of {world * config.micro_batch}"
        )
    if not 0 <= steps.start <= steps.stop or steps.step != 1:
        raise UserError(f"steps {steps.start} to {steps.stop}: the first must be before the last")
    if config.on_error not in ("fail", "skip"):
        raise UserError(f"on_error {config.on_error!r}: must be 'fail' or 'skip'")


def eval_loader(
    folder: str | Path | Manifest,
    *,
    batch_size: int,
    rank: int,
    world: int,
    image_size: int,
    workers: int,
    resize: int | None = None,
    interpolation: Interpolation = "bicubic",
    interleave: bool = False,
    decode: str = "auto",
    cache: str | Path | None = None,
    cache_bytes: int = 100 * GIB,
    pin_memory: bool = False,
    start_method: StartMethod | None = None,
) -> Loader:
    """Centre crops, each sample exactly once over all ranks, in manifest order, without padding.

    batch_size is per rank; the last batch may be smaller, and ranks may have different numbers of
    batches. interleave: the whole set is cut into batches, of which a rank takes every world-th,
    so that the batches do not depend on the number of ranks; else a rank takes one piece of the
    set. resize: pixels of the shorter side before the crop, by default crops.shorter_side.
    A sample that will not decode raises SampleError: a score over fewer images is another score.
    """
    _check_ranks(rank, world, workers)
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1")
    _check_shared_memory(workers, batch_size, image_size)
    manifest = _open(folder, workers, start_method)
    crop = CentreCrop(image_size, resize or shorter_side(image_size), interpolation)
    remote = _cache(manifest, cache, cache_bytes)
    reader = Reader(manifest, image_size, interpolation, decode, remote)
    low, high = (manifest.samples * r // world for r in (rank, rank + 1))
    if interleave:
        low, high = 0, manifest.samples
    dataset = _Eval(reader, crop, batch_size, low, high)
    tasks = range(-(-(high - low) // batch_size))
    tasks = tasks[rank::world] if interleave else tasks
    return Loader(dataset, tasks, workers, pin_memory, reader, start_method)


def _open(
    folder: str | Path | Manifest, workers: int, start_method: StartMethod | None
) -> Manifest:
    """The manifest; with workers, one that any number of processes can share."""
    if workers and _context(start_method) == "forkserver":
        multiprocessing.set_forkserver_preload([__name__])
        with _signals_blocked():
            forkserver.ensure_running()  # imports torch for all workers while the manifest is read
    manifest = folder if isinstance(folder, Manifest) else read_manifest(folder)
    if workers and manifest.table.shared is None:
        manifest = replace(manifest, shards=share(manifest.table))
    return manifest


def _cache(manifest: Manifest, folder: str | Path | None, limit: int) -> ShardCache | None:
    return ShardCache(manifest, folder, limit) if is_remote(manifest.folder) else None


def _steps_ahead(order: Order, manifest: Manifest, config: LoaderConfig, world: int) -> int:
    """How many steps before they are read remote shards are fetched: a window of them, if the cache
    holds two windows of each partition that this node's ranks serve. All shards of a window are
    needed as it begins; so the store can send them evenly over the window before."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    partitions = -(-order.partitions * min(local, world) // world)
    sizes = manifest.table.bytes
    shards = min(partitions * (2 * order.window + 1), len(sizes))
    if order.draws or shards * int(sizes.max()) > config.cache_bytes:
        return _AHEAD
    in_window = order.window * order.total / len(sizes)
    return max(_AHEAD, math.ceil(in_window / (order.batch_size // order.partitions)))


def _warn_of_small_cache(order: Order, manifest: Manifest, world: int, limit: int) -> None:
    sizes = manifest.table.bytes
    open_shards = min(order.partitions // world * (order.window + 1), len(sizes))
    if is_remote(manifest.folder) and open_shards * int(sizes.max()) > limit:
        log.warning(
            "a rank reads %d shards of up to %d bytes at a time, more than the cache of %d bytes "
            "holds, so shards will be fetched again and again: use a larger cache, fewer "
            "partitions or a smaller window", open_shards, sizes.max(), limit,
        )  # fmt: skip


def _check_ranks(rank: int, world: int, workers: int) -> None:
    if world < 1 or not 0 <= rank < world:
        raise UserError(f"rank {rank} of {world}: ranks run from 0 to world - 1")
    if workers < 0:
        raise UserError(f"workers {workers}: must be 0 or more")


def _check_shared_memory(workers: int, batch: int, image_size: int) -> None:
    # A full /dev/shm (64 MB in a container by default) ends a worker with a bus error.
    needed = shared_bytes(workers, batch, image_size)
    if workers and os.path.isdir(SHARED):
        free = shutil.disk_usage(SHARED).free
        if free < needed:
            raise UserError(
                f"workers {workers}: their batches need {needed >> 20} MiB of shared memory where "
                f"{SHARED} has {free >> 20} MiB free; use fewer workers or a smaller batch, or "
                "start the container with a larger --shm-size or --ipc=host"
            )

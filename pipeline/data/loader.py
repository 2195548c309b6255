"""Shards → uint8 batches, in the order of pipeline/data/order.py, made by worker processes.

Normalisation belongs to the device. The state of the data is one integer, the step.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from pipeline.data.batch import Batch, LoaderConfig, StartMethod
from pipeline.data.crops import CentreCrop, shorter_side
from pipeline.data.datasets import EvalBatches, TrainBatches
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from pipeline.data.shard_cache import GIB, ShardCache
from pipeline.data.shared import share
from pipeline.data.slots import Slots
from pipeline.data.worker_faults import PREFETCH, SHARED, shared_bytes, worker_fault
from pipeline.errors import UserError
from shard_tools import shuffle_quality
from shard_tools.cli import signals_held
from shard_tools.cores import cores
from shard_tools.manifest import Manifest, is_remote, read_manifest

log = logging.getLogger(__name__)
_MOST_WORKERS, _MOST_WORKERS_PER_CORE = 64, 8


def _context(start_method: StartMethod | None) -> str:
    """Where fresh processes are asked for, one is made, which imports torch and then forks the
    workers: a worker of spawn has 265 MB of its own for that import, one of forkserver 33 MB."""
    method = start_method or multiprocessing.get_start_method()
    fresh = method == "spawn" and "forkserver" in multiprocessing.get_all_start_methods()
    return "forkserver" if fresh else method


def _quiet_worker(_: int) -> None:
    # The launcher or the terminal signals every process of the group; the rank, not its workers,
    # decides when to stop. Workers end when the rank closes the loader or is gone.
    gc.freeze()  # a collection would write to what a fork inherits, and so copy all of it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    rank = multiprocessing.parent_process()
    if rank is not None and rank.pid != os.getppid():  # of a fork server, which torch would watch
        threading.Thread(target=_end_with, args=(rank,), daemon=True).start()


def _end_with(rank: Any) -> None:
    """End this process where the rank is killed: a fork server lives as long as its workers."""
    rank.join()
    os._exit(1)


class _Ending:
    """The event by which torch's iterator ends its workers. It alone sets it and, of a worker that
    has died, asks whether it has; here without the lock, which that worker may have held."""

    def __init__(self, event: Any) -> None:
        self.event, self._is_set = event, False

    def set(self) -> None:
        self._is_set = True
        self.event.set()

    def is_set(self) -> bool:
        return self._is_set


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
            if "Bus error" in str(error) or -signal.SIGBUS in codes:
                self.manifest.lazy_index.check_file()  # mapped, as /dev/shm is
            raise told from error

    def _start(self) -> None:
        others = set(multiprocessing.active_children())
        with signals_held():
            iterator: Any = iter(self._loader)
        if self._sizes[0]:
            iterator._workers_done_event = _Ending(iterator._workers_done_event)
        self._iterator = iterator
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
    with _affording(config.workers, images, crop.image_size):
        manifest = _open(config.folder, config.workers, config.start_method)
        order = Order.of(
            manifest.table, config.seed, config.batch_size,
            config.partitions, config.window, config.samples_per_epoch,
        )  # fmt: skip
        remote = _cache(manifest, config.cache, config.cache_bytes)
        if remote is not None:
            config = replace(config, cache_bytes=remote.bound())
        _warn_of_small_cache(order, manifest, world, config.cache_bytes)
        if rank == 0 and not order.draws:
            numbers = config.batch_size, config.partitions, config.window
            if text := shuffle_quality.warning(manifest, *numbers):
                log.warning("%s", text)
        reader = Reader(manifest, crop.image_size, crop.interpolation, config.decode, remote)
        dataset = TrainBatches(reader, order, config, rank, world, steps.stop)
        tasks = range(steps.start * dataset.per_step, steps.stop * dataset.per_step)
        return Loader(
            dataset, tasks, config.workers, config.pin_memory, reader, config.start_method
        )


@contextlib.contextmanager
def _affording(workers: int, images: int, image_size: int) -> Iterator[None]:
    """Turn the lack of open files or memory for workers into a UserError: what they share with this
    process is opened here. The numbers are those of `worker_fault`."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        told = worker_fault(error, workers, images, image_size) if workers else None
        if told is None:
            raise
        raise told from error


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
    interleave: bool = False,
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
    with _affording(workers, batch_size, image_size):
        manifest = _open(folder, workers, start_method)
        crop = CentreCrop(image_size, resize or shorter_side(image_size))
        remote = _cache(manifest, None, 100 * GIB)
        reader = Reader(manifest, image_size, crop.interpolation, "auto", remote)
        low, high = (manifest.samples * r // world for r in (rank, rank + 1))
        if interleave:
            low, high = 0, manifest.samples
        dataset = EvalBatches(reader, crop, batch_size, low, high)
        tasks = range(-(-(high - low) // batch_size))
        tasks = tasks[rank::world] if interleave else tasks
        return Loader(dataset, tasks, workers, pin_memory, reader, start_method)


def _open(
    folder: str | Path | Manifest, workers: int, start_method: StartMethod | None
) -> Manifest:
    """The manifest; with workers, its table is in shared memory."""
    if workers and _context(start_method) == "forkserver":
        multiprocessing.set_forkserver_preload([__name__])
        resource_tracker.ensure_running()  # inside, it would unblock two of them up to Python 3.13
        with signals_held():
            forkserver.ensure_running()  # imports torch for all workers while the manifest is read
    manifest = folder if isinstance(folder, Manifest) else read_manifest(folder)
    if workers and manifest.table.shared is None:
        manifest = replace(manifest, shards=share(manifest.table))
    return manifest


def _cache(manifest: Manifest, folder: str | Path | None, limit: int) -> ShardCache | None:
    return ShardCache(manifest, folder, limit) if is_remote(manifest.folder) else None


def _warn_of_small_cache(order: Order, manifest: Manifest, world: int, limit: int) -> None:
    sizes = manifest.table.bytes
    open_shards = min(order.partitions // world * (order.window + 1), len(sizes))
    if is_remote(manifest.folder) and open_shards * int(sizes.max()) > limit:
        log.warning(
            "a rank reads %d shards of up to %d bytes at a time, more than the cache of %d bytes "
            "holds, so shards will be fetched again and again: set RELAXMIM_CACHE to a folder on a "
            "larger disk, or use fewer partitions or a smaller window",
            open_shards, sizes.max(), limit,
        )  # fmt: skip


def _check_ranks(rank: int, world: int, workers: int) -> None:
    if world < 1 or not 0 <= rank < world:
        raise UserError(f"rank {rank} of {world}: ranks run from 0 to world - 1")
    if workers < 0:
        raise UserError(f"workers {workers}: must be 0 or more")
    most = max(_MOST_WORKERS, _MOST_WORKERS_PER_CORE * cores())
    if workers > most:  # each is a process; thousands take the machine down
        raise UserError(f"workers {workers}: at most {most}, for the {cores()} cores of this rank")


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

"""Run jobs in worker processes, with one progress bar and a clean end on every signal."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.errors import UserError
from shard_tools.cli import ToolError, progress, signals_held

J = TypeVar("J")
R = TypeVar("R")

_PR_SET_PDEATHSIG = 1

# What this process is at: in a worker the shared counts of images and bytes, the order to stop, and
# its note (pid and file in hand), which outlives it; in the command's own process counts and bar.
_state: dict[str, Any] = {}

_AHEAD = 4  # jobs per worker that are made before they are needed
_NOTE = 1024  # bytes of a note: pid (8), then a path, of which the end matters


class Stop(Exception):
    """The order to stop reached a worker."""


class WorkerDied(ToolError):
    """A worker process was killed or crashed; `pids` of those that died."""

    def __init__(self, message: str, pids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.pids = pids


def map_in_workers(
    function: Callable[[J], R],
    jobs: Collection[J],
    *,
    workers: int,
    description: str,
    total: int | None,
    finished: int = 0,
) -> Iterator[R]:
    """Results of `function(job)` for all jobs, in the order they end.

    The function (importable, its job picklable) calls `report` for each image. The first error
    ends all jobs. Of jobs that are made as one iterates, few are there at a time. total, finished:
    images in all (None: not known) and those done before.
    workers: 0 works in this process; else a crash of a decoder, or the kernel's killing of a
    process for want of memory, is a WorkerDied that names the file in hand.
    """
    with progress(total, description, initial=finished) as bar:
        if workers == 0 or not jobs:
            yield from _run_here(function, jobs, bar)
        else:
            yield from _run_pool(function, jobs, min(workers, len(jobs)), bar)


def _run_here(function: Callable[[J], R], jobs: Collection[J], bar: tqdm) -> Iterator[R]:
    _state.update(counts=[0, 0], bar=bar)
    try:
        for job in jobs:
            yield _call(function, job)
    finally:
        _state.clear()


def _run_pool(
    function: Callable[[J], R], jobs: Collection[J], workers: int, bar: tqdm
) -> Iterator[R]:
    # One worker is forked, which takes no time; several start afresh, without this one's threads.
    context: Any = multiprocessing.get_context("fork" if workers == 1 else "spawn")
    with signals_held():  # Python's tracker of shared memory, started here, would die by SIGHUP
        counts, stop, started = context.Array("q", 2), context.Event(), context.Value("i", 0)
        notes = context.RawArray("c", workers * _NOTE)
    shared = (counts, stop, started, notes)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, shared)
    finished, call, died = bar.n, partial(_call, function), False
    try:
        waiting = iter(jobs)
        with signals_held():
            running: set[Future[R]] = {
                pool.submit(call, job) for job in islice(waiting, _AHEAD * workers)
            }
        while running:
            # A signal's exception inside these calls would leave the lock of a future taken, and
            # the shutdown below would wait for it forever; so it arrives between two rounds.
            with signals_held():
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                _show(bar, finished + counts[0] - bar.n, counts[1])
                results = [future.result() for future in done]
                running |= {pool.submit(call, job) for job in islice(waiting, len(done))}
            yield from results
    except BrokenProcessPool:
        died = True
    finally:
        with signals_held():
            stop.set()
            if died:
                _end(set(multiprocessing.active_children()) - others, notes)
            pool.shutdown(wait=True, cancel_futures=True)
    if died:
        raise _worker_died(notes.raw)


def _end(living: Collection[BaseProcess], notes: Any) -> None:
    """Kill each worker once it has ended its job.

    A pool that has lost a worker sends the others SIGTERM, which they ignore, and since Python
    3.12 waits for them without another word.
    """
    while living := [process for process in living if process.is_alive()]:
        at_work = {pid for pid, _ in _read(notes.raw)}
        for process in living:
            if process.pid not in at_work:
                process.kill()
        time.sleep(0.02)


def _read(notes: bytes) -> list[tuple[int, str]]:
    """(pid, file in hand or "") of every worker that is at work, or died there."""
    each = [notes[i : i + _NOTE] for i in range(0, len(notes), _NOTE)]
    return [
        (int.from_bytes(note[:8], "little"), os.fsdecode(note[8:].rstrip(b"\0")))
        for note in each
        if any(note)
    ]


def _worker_died(notes: bytes) -> WorkerDied:
    """What the notes say that no worker has wiped: those who live wipe theirs at their end."""
    left = _read(notes)
    files = sorted(file for _, file in left if file)
    at_work = f" while working on {' or '.join(files)}" if files else ""
    return WorkerDied(
        f"a worker process died{at_work} (out of memory, or a crash in a decoder)",
        tuple(pid for pid, _ in left),
    )


def _call(function: Callable[[J], R], job: J) -> R:
    """function(job); a bug in it is raised with a note that names the file in hand."""
    try:
        if "note" in _state:
            _state["note"][:8] = os.getpid().to_bytes(8, "little")
            if _state["stop"].is_set():
                raise Stop
        return function(job)
    except (UserError, Stop):
        raise
    except Exception as error:
        if "file" in _state:
            error.add_note(f"while working on {_state['file']}")
        raise
    finally:
        if "note" in _state:
            _state["note"][:] = bytes(_NOTE)


def working_on(path: object) -> None:
    """Say which file the job has in hand: for the traceback of a bug, and for the sentence about
    a worker that died."""
    _state["file"] = path
    if "note" in _state:
        text = os.fsencode(str(path))[8 - _NOTE :]
        _state["note"][8:] = text.ljust(_NOTE - 8, b"\0")


def _show(bar: tqdm, images: int, size: int) -> None:
    rate = size / 1e6 / max(bar.format_dict["elapsed"], 1e-3)
    bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
    bar.update(images)


def report(size: int, images: int = 1) -> None:
    """Count images and bytes for the progress bar; raises Stop where the command was stopped."""
    counts = _state.get("counts")
    if counts is None:  # called outside map_in_workers
        return
    if "bar" in _state:
        counts[1] += size
        _show(_state["bar"], images, counts[1])
        return
    with counts.get_lock():
        counts[0] += images
        counts[1] += size
    if _state["stop"].is_set():
        raise Stop


def _start_worker(counts: Any, stop: Any, started: Any, notes: Any) -> None:
    """Signals are the parent's business; a worker dies with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it died before prctl was called
        os._exit(1)
    with started.get_lock():
        first = started.value * _NOTE
        started.value += 1
    _state.clear()  # what a forked process has from its parent
    note = memoryview(notes).cast("B")[first : first + _NOTE]
    _state.update(counts=counts, stop=stop, note=note)

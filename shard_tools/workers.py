"""Run jobs in worker processes, with one progress bar and a clean end on every signal."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.errors import UserError
from shard_tools.cli import ToolError, progress, signals_held

J = TypeVar("J")
R = TypeVar("R")

_PR_SET_PDEATHSIG = 1

# Where `report` counts: in a worker the shared counts of images and bytes and the order to stop,
# in the process itself the counts and the bar.
_state: dict[str, Any] = {}


class Stop(Exception):
    """The order to stop reached a worker."""


def map_in_workers(
    function: Callable[[J], R],
    jobs: Sequence[J],
    *,
    workers: int,
    description: str,
    total: int | None,
    finished: int = 0,
) -> Iterator[R]:
    """Results of `function(job)` for all jobs, in the order they end.

    The function (importable, its job picklable) calls `report` for each image. The first error
    ends all jobs. total, finished: images in all (None: not known) and those done before.
    """
    with progress(total, description, initial=finished) as bar:
        if min(workers, len(jobs)) <= 1:
            yield from _run_here(function, jobs, bar)
        else:
            yield from _run_pool(function, jobs, workers, bar)


def _run_here(function: Callable[[J], R], jobs: Sequence[J], bar: tqdm) -> Iterator[R]:
    """One job or one worker needs no process of its own."""
    _state.update(counts=[0, 0], bar=bar)
    try:
        for job in jobs:
            yield _call(function, job)
    finally:
        _state.clear()


def _run_pool(
    function: Callable[[J], R], jobs: Sequence[J], workers: int, bar: tqdm
) -> Iterator[R]:
    context = multiprocessing.get_context("spawn")
    counts, stop = context.Array("q", 2), context.Event()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (counts, stop))
    finished, call = bar.n, partial(_call, function)
    try:
        with signals_held():
            running: set[Future[R]] = {pool.submit(call, job) for job in jobs}
        while running:
            # A signal's exception inside these calls would leave the lock of a future taken, and
            # the shutdown below would wait for it forever; so it arrives between two rounds.
            with signals_held():
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                _show(bar, finished + counts[0] - bar.n, counts[1])
                results = [future.result() for future in done]
            yield from results
    except BrokenProcessPool:
        raise ToolError("a worker process died (out of memory?)") from None
    finally:
        with signals_held():
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _call(function: Callable[[J], R], job: J) -> R:
    """function(job); a slip in it is raised with a note that names the file in hand."""
    try:
        return function(job)
    except (UserError, Stop):
        raise
    except Exception as error:
        if "file" in _state:
            error.add_note(f"while working on {_state['file']}")
        raise


def working_on(path: object) -> None:
    """Say which file the job has in hand, for the traceback of a slip."""
    _state["file"] = path


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


def _start_worker(counts: Any, stop: Any) -> None:
    """Signals are the parent's business; a worker dies with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it died before prctl was called
        os._exit(1)
    _state.update(counts=counts, stop=stop)

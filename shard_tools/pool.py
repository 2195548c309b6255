"""Run jobs in worker processes, with one progress bar and a clean end on every signal."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from shard_tools.console import ToolError, progress

J = TypeVar("J")
R = TypeVar("R")

_PR_SET_PDEATHSIG = 1

# Set in each worker: shared counts of images and bytes, and the order to stop.
_state: dict[str, Any] = {}


class Stop(Exception):
    """The order to stop reached a worker."""


def run_jobs(
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
    context = multiprocessing.get_context("spawn")
    counts, stop = context.Array("q", 2), context.Event()
    workers = max(1, min(workers, len(jobs)))
    pool = ProcessPoolExecutor(workers, context, _start_worker, (counts, stop))
    with progress(total, description, initial=finished) as bar:
        try:
            running: set[Future[R]] = {pool.submit(function, job) for job in jobs}
            while running:
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                rate = counts[1] / 1e6 / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
                bar.update(finished + counts[0] - bar.n)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise ToolError("a worker process died (out of memory?)") from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def report(size: int, images: int = 1) -> None:
    """Count images and bytes for the progress bar; raises Stop where the command was stopped."""
    if not _state:  # called outside a pool
        return
    with _state["counts"].get_lock():
        _state["counts"][0] += images
        _state["counts"][1] += size
    if _state["stop"].is_set():
        raise Stop


def _start_worker(counts: Any, stop: Any) -> None:
    """Signals are the parent's business; a worker dies with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _state.update(counts=counts, stop=stop)

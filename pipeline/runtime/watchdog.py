"""Why a rank ended, and a watchdog over one that no longer moves.

The first rank that fails writes failure.txt into the run's folder: one line with the rank, the step
and the reason. launch.sh shows it, and the next start on the folder begins its log with it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from pipeline.distributed import Ranks, lost_contact
from pipeline.errors import UserError
from pipeline.gpu_errors import cuda_fault, nccl_fault, one_line
from pipeline.runtime.run_lock import LostFolder

FAILURE = "failure.txt"
STUCK = 75  # exit code: no progress for `watchdog_seconds`
FIRST_PATIENCE = 4  # times as long until kernels and blocks are compiled


def note_failure(output: Path, rank: int, where: str, reason: str) -> bool:
    """Write failure.txt unless another rank has; False if that rank gave the same reason."""
    line = f"rank {rank} on {socket.gethostname()}, {where}: {reason}\n"
    try:
        with open(output / FAILURE, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)
    except OSError:  # another rank was first, or the folder cannot be written
        return last_failure(output).partition(": ")[2] != reason
    return True


def last_failure(output: Path, *, clear: bool = False) -> str:
    """The line of failure.txt, "" without one; `clear` removes it."""
    path = output / FAILURE
    try:
        line = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    if clear:
        path.unlink(missing_ok=True)
    return line


def report_failure(output: Path, ranks: Ranks, where: str, error: Exception) -> int:
    """Print why this rank ends, unless another rank gave the same reason; the exit code."""
    gone = lost_contact(error)
    if gone:
        reason = "lost contact with another rank"
    elif isinstance(error, UserError):
        reason = str(error)
    else:
        reason = nccl_fault(error) or cuda_fault(error) or one_line(error)
    lost = isinstance(error, LostFolder)
    if ranks.first if lost else note_failure(output, ranks.rank, where, reason):
        who = f" (rank {ranks.rank}, {where})" if ranks.world > 1 else ""
        print(f"error{who}: {reason}", file=sys.stderr, flush=True)
    if isinstance(error, UserError):
        return error.code
    if not gone:
        traceback.print_exception(error)
    return 1


class Watchdog:
    """Ends the process with exit code 75 after too long without progress (`note`).

    It names rank and step, prints the stack of every thread and writes failure.txt. If a C call
    holds the interpreter, so that the watching thread cannot run, faulthandler prints the stacks
    and ends the process with exit code 1. The clock is monotonic: setting the time has no effect.
    """

    def __init__(self, seconds: float, rank: int, output: Path) -> None:
        """seconds: how long a run may be without progress; 0 turns the watchdog off."""
        self.seconds, self.rank, self.output = seconds, rank, output
        self._closed = threading.Event()
        self.note("start", FIRST_PATIENCE)
        if seconds:
            self._arm()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def note(self, where: str, patience: float = 1) -> None:
        """Note progress: `where` begins now and may take `patience` times `seconds`."""
        self.where, self._limit = where, self.seconds * patience
        self._since = time.monotonic()

    def _arm(self) -> None:
        """Postpone faulthandler's exit, which comes only if the watching thread cannot run."""
        faulthandler.dump_traceback_later(self._limit + self.seconds, exit=True, file=2)

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self.seconds / 4)):
            self._arm()
            idle = time.monotonic() - self._since
            if idle > self._limit:
                self._abort(idle)
        faulthandler.cancel_dump_traceback_later()

    def _abort(self, idle: float) -> None:
        reason = f"no progress for {idle:.0f} s (watchdog_seconds {self.seconds:g})"
        note_failure(self.output, self.rank, self.where, reason)
        print(f"error: rank {self.rank}, {self.where}: {reason}", flush=True)
        faulthandler.dump_traceback(file=2)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(STUCK)

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

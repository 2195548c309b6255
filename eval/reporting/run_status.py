"""Where a run is: running, finished, preempted, failed or cut off, since when and for how long.

Read from what the run leaves: its lock, failure.txt and the lines of log.txt.
"""

import contextlib
import fcntl
import os
import re
import struct
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from pipeline.errors import naming

STARTS = ("run: ", "previous run failed: ")
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")
STEP = re.compile(r"step (\d+)/(\d+) ")
PROBE = re.compile(r"step (\d+): (.*)")
STOPPED = re.compile(r"stopped by (.+): saved at step (\d+) of (\d+)")
SILENT = 600  # seconds without a line after which a running run is said to be silent
FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, process


@dataclass(frozen=True)
class RunStatus:
    """state: running, finished, preempted, failed, cut off, or unknown (no log); why, in words.

    step of total (0: not known); started: of the first start; seconds: of all starts, pauses
    between them left out; starts: how often it was started.
    """

    state: str
    reason: str = ""
    step: int = 0
    total: int = 0
    started: datetime | None = None
    seconds: float = 0.0
    starts: int = 0

    @property
    def silent(self) -> bool:
        """Whether it runs and has not said anything for SILENT seconds."""
        return self.state == "running" and bool(self.reason) and bool(self.starts)


@dataclass(frozen=True)
class LogLine:
    """A line of log.txt with its time."""

    time: datetime
    text: str

    @property
    def start(self) -> bool:
        return self.text.startswith(STARTS)


def read_log(folder: Path) -> list[LogLine]:
    """The lines of log.txt that have a time; none where there is no log."""
    path = folder / "log.txt"
    if not path.is_file():
        return []
    with naming(path, "cannot be read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    found = []
    for match in filter(None, map(LINE.fullmatch, text.splitlines())):
        with contextlib.suppress(ValueError):  # digits that are no date
            found.append(LogLine(datetime.fromisoformat(match[1]), match[2]))
    return found


def probed(log: list[LogLine]) -> dict[str, tuple[list[float], list[float]]]:
    """Metric → (steps, values) of the online probes, of a repeated step the last value."""
    found: dict[str, dict[float, float]] = {}
    for line in log:
        match = PROBE.fullmatch(line.text)
        words = match[2].split("  ") if match else []
        for name, _, value in (word.partition(" ") for word in words):
            try:
                found.setdefault(name, {})[float(match[1])] = float(value)  # type: ignore[index]
            except ValueError:
                continue
    series = {name: sorted(values.items()) for name, values in found.items() if values}
    return {name: ([s for s, _ in p], [v for _, v in p]) for name, p in series.items()}


def running(folder: Path) -> bool | None:
    """Whether a process holds the run's lock, None on a file system without locks; asks without
    taking it."""
    try:
        handle = os.open(folder / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack(FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, asked))
        return bool(answer[0] != fcntl.F_UNLCK)
    except OSError:
        return None
    finally:
        os.close(handle)


def read_status(folder: Path, now: datetime | None = None) -> RunStatus:
    """The status of a run folder; now: for tests."""
    log = read_log(folder)
    alive, failure = running(folder), _failure(folder)
    if not log:
        state = "running" if alive else "failed" if failure else "unknown"
        return RunStatus(state, failure or "no log.txt")
    starts = [n for n, line in enumerate(log) if line.start and not (n and log[n - 1].start)]
    last = log[starts[-1] if starts else 0 :]
    bounds = [*(starts or [0]), len(log)]
    seconds = sum(
        (log[end - 1].time - log[begin].time).total_seconds() for begin, end in pairwise(bounds)
    )
    step, total = _progress(log)
    state, reason = _end(last, failure, step, total)
    idle = ((now or datetime.now()) - log[-1].time).total_seconds()
    if alive or (alive is None and state == "cut off" and idle <= SILENT):
        quiet = f"no line in log.txt for {idle / 60:.0f} minutes" if idle > SILENT else ""
        state, reason = "running", quiet
    return RunStatus(state, reason, step, total, log[0].time, max(seconds, 0.0), len(starts) or 1)


def _end(lines: list[LogLine], failure: str, step: int, total: int) -> tuple[str, str]:
    """(state, why) of the last start of a run that no process holds."""
    if failure:
        return "failed", failure
    for line in reversed(lines):
        if line.text.startswith("done: step "):
            return "finished", "" if step >= total else f"at step {step} of {total}"
        if match := STOPPED.fullmatch(line.text):
            return "preempted", f"by {match[1]}, saved at step {match[2]} of {match[3]}"
    return "cut off", (
        f"after step {step} of {total}, without a word: killed, or the machine stopped; start it "
        "again to resume from its newest checkpoint"
    )


def _progress(log: list[LogLine]) -> tuple[int, int]:
    """(last logged step, steps of the run)."""
    for line in reversed(log):
        if match := STEP.match(line.text) or re.search(STOPPED, line.text):
            numbers = [int(g) for g in match.groups() if g.isdigit()]
            return numbers[-2], numbers[-1]
    return 0, 0


def _failure(folder: Path) -> str:
    path = folder / "failure.txt"
    if not path.is_file():
        return ""
    with naming(path, "cannot be read"):
        return path.read_text(encoding="utf-8", errors="replace").strip()

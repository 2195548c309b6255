"""The time until the first step, by phase. Imports nothing heavy, since it is imported first."""

from __future__ import annotations

import contextlib
import os
import time

LAUNCHED = "RELAXMIM_LAUNCHED"  # set by launch.sh: when it began, in seconds since 1970

_marks: list[tuple[str, float]] = []  # (phase, its end)


def begin() -> None:
    """Start the clock, just before the command line is read."""
    started = time.time() - time.process_time()  # of Python, if it had a core of its own
    _marks[:] = [("", started)]
    with contextlib.suppress(ValueError):  # started without launch.sh
        launched = float(os.environ.pop(LAUNCHED, ""))  # not for what this process starts
        _marks[:] = [("", launched), ("launch.sh", started)]


def done(phase: str) -> None:
    """End the phase that ran since the last call (or `begin`), and name it."""
    _marks.append((phase, time.time()))


def report() -> str:
    """All phases and their sum, in seconds: `start: input 0.2 s, imports 1.9 s; 2.1 s in all`."""
    ends = [end for _, end in _marks]
    spans = zip([name for name, _ in _marks[1:]], ends, ends[1:], strict=False)
    phases = ", ".join(f"{name} {end - start:.1f} s" for name, start, end in spans)
    return f"start: {phases}; {ends[-1] - ends[0]:.1f} s in all"

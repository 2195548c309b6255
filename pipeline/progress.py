"""The one line that a person watches: in 80 columns, drawn again with every step."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

from tqdm import tqdm

from pipeline.errors import mute_where_reader_left

T = TypeVar("T")
COLUMNS = 80
SPAN = 100  # steps over which the pace is averaged
LONG = 5


class Pace:
    """Seconds per step, and from them the time left.

    The mean of all steps so far, after SPAN of them a moving average, so that it settles and yet
    follows a lasting change. The first step, which compiles kernels and fills the loader, counts
    only until there is a second one. Pauses (saving, probes) are shared out over all steps, and so
    is what a single step takes beyond LONG times the mean (a validation, say).
    """

    def __init__(self, clock: float) -> None:
        self._last, self._steps, self._mean, self._paused = clock, 0, 0.0, 0.0
        self._was_long = False

    def pause(self, seconds: float) -> None:
        """Time since the last step that no step took."""
        self._last += seconds
        self._paused += seconds

    def step(self, clock: float) -> None:
        """A step has ended."""
        taken, self._last = clock - self._last, clock
        self._steps += 1
        long = self._steps > 10 and taken > LONG * self._mean
        if long and not self._was_long:
            self._paused += taken - self._mean
            taken = self._mean
        self._was_long = long
        weight = min(max(self._steps - 1, 1), SPAN)
        self._mean += (taken - self._mean) / weight

    @property
    def seconds(self) -> float:
        """Of a step, without pauses; 0 before the first."""
        return self._mean

    def left(self, steps: float) -> float:
        """Seconds that so many more steps take, pauses included."""
        return steps * (self._mean + self._paused / max(self._steps, 1))


def fit(parts: Sequence[tuple[int, str]], columns: int = COLUMNS) -> str:
    """The texts of `parts` side by side in fewer than `columns` columns.

    parts: (rank, text); where they are too long the highest rank is left out first, of one rank
    the last. What is still too long is cut.
    """
    kept = [part for part in parts if part[1]]
    while len("  ".join(text for _, text in kept)) >= columns and len(kept) > 1:
        worst = max(rank for rank, _ in kept)
        kept.pop(max(n for n, (rank, _) in enumerate(kept) if rank == worst))
    return "  ".join(text for _, text in kept)[: columns - 1]


def clock(seconds: float) -> str:
    """2:03:04, of more than a day 5d 02:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, rest = divmod(hours, 24)
    return f"{days}d {rest:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{seconds:02d}"


def speed(images_per_second: float) -> str:
    """1234 images/s, 3.4 images/s."""
    digits = ".0f" if images_per_second >= 99.95 else ".3g"
    return f"{images_per_second:{digits}} images/s"


class StatusLine:
    """The last line of a terminal (stderr); nothing where there is none."""

    def __init__(self, shown: bool = True) -> None:
        # Of tqdm only how it draws, and how it lets others write above: its own bars are redrawn
        # when it sees fit.
        # `fit` cuts: where a terminal's size is unknown (0 columns), tqdm would cut all.
        self._line = tqdm(
            bar_format="{desc}", leave=False, disable=not (shown and sys.stderr.isatty()),
            ncols=1000, nrows=24,
        )  # fmt: skip

    @property
    def shown(self) -> bool:
        return not self._line.disable

    def draw(self, parts: Sequence[tuple[int, str]]) -> None:
        """Show `fit(parts)`, in the columns that the terminal has."""
        if self.shown:
            mute_where_reader_left()
            self._line.set_description_str(fit(parts, _columns()))

    def close(self) -> None:
        """Take it away."""
        self._line.close()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
    except OSError:
        return COLUMNS


def write_above(text: str) -> None:
    """A line on stdout, above whatever status line is shown."""
    mute_where_reader_left()
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def progress(
    items: Iterable[T], text: str, total: int | None = None, images: int = 0, shown: bool = True
) -> Iterator[T]:
    """The items, with a status line that follows them.

    total: their number, where they do not have a length. images: of one item, for the speed.
    """
    total = len(items) if total is None and isinstance(items, Sized) else total
    line, pace, done = StatusLine(shown), Pace(time.perf_counter()), 0
    try:
        line.draw([(0, f"{text}: starting")])
        for item in items:
            yield item
            done += 1
            pace.step(time.perf_counter())
            line.draw(_progress_parts(text, done, total, images, pace))
    finally:
        line.close()


def _progress_parts(
    text: str, done: int, total: int | None, images: int, pace: Pace
) -> list[tuple[int, str]]:
    known = total is not None
    text = text if len(text) <= 32 else f"…{text[-31:]}"
    return [
        (0, f"{text} {done}/{total}" if known else f"{text} {done}"),
        (1, speed(images / pace.seconds) if images and pace.seconds else ""),
        (2, f"ETA {clock(pace.left((total or 0) - done))}" if known else ""),
    ]

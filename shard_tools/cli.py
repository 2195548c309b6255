"""What every shard tool does on the command line: progress, errors, signals, exit codes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.errors import (
    UserError,
    mend_streams,
    mute_where_reader_left,
    naming,
    reachable,
    reader_may_leave,
    refuse,
)
from shard_tools.home import expand_words

FAULTS = 1  # exit code: faults were found

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class ToolError(UserError):
    """A command that cannot be carried out; the message names the file or the option."""


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived; `code` is the exit code by convention (128 + signal)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGHUP; they arrive at the end. Processes started inside
    inherit this, so that they cannot be hit before they have chosen what to do."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line (None: of this process), its `~` expanded; ends with 2 where it is none."""
    mend_streams()
    try:
        return parser.parse_args(expand_words(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        sys.exit(refuse(error))


def run(command: Callable[[Any], int], options: Any) -> int:
    """Call `command(options)`; its exit code, 2 and one line for a UserError."""

    def stop(number: int, frame: object) -> None:
        mute_where_reader_left()
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths that are no UTF-8, as on stderr
    try:
        with reader_may_leave(), reachable():
            return command(options)
    except UserError as error:
        return refuse(error)
    except Stopped as stopped:
        print(f"error: stopped by {stopped}; no half-written file was left", file=sys.stderr)
        return stopped.code


def progress(
    total: int | None, description: str, *, initial: int = 0, unit: str = " images",
    delay: float = 0,
) -> tqdm:  # fmt: skip
    """A tqdm bar; in a log (no terminal) it speaks every 30 seconds and not ten times a second.
    unit: "B" counts bytes, shown as kB, MB, …; delay: seconds before anything is shown."""
    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 30.0
    # Given, since of a terminal whose size is unknown (0 columns or rows) tqdm would show nothing.
    columns = os.get_terminal_size(sys.stderr.fileno()).columns if terminal else 0
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=interval,
        maxinterval=max(interval, 10.0),
        ncols=max(columns - 1, 0) or (79 if terminal else None),
        nrows=24,
        smoothing=0.1,
        delay=delay,
    )


def counted(number: int, noun: str) -> str:
    """1 shard, 2 shards, 3 classes."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def images_of(images: int, classes: int) -> str:
    """300 images of 8 classes, 300 images without labels."""
    return f"{counted(images, 'image')} " + (
        f"of {counted(classes, 'class')}" if classes else "without labels"
    )


def byte_size(text: str) -> int:
    """A size such as 256MiB, 64M or 1000000 in bytes."""
    number = text.upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in ("K", "M", "G") else ""
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256MiB") from None


def seed_number(text: str) -> int:
    """A seed that every generator takes. argparse turns the error into a sentence."""
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and {2**32 - 1}")
    return number


def shard_bytes(text: str) -> int:
    """The size of a shard in bytes, 1KiB at least. argparse turns the error into a sentence."""
    size = byte_size(text)
    if size < _UNITS["K"]:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1KiB")
    return size


def worker_count(text: str) -> int:
    """A number of processes, 0 for none but this one. argparse turns the error into a sentence."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text}: must be 0 (no process of its own) or more")
    return int(text)


def read_list(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank. UserError where it cannot be read."""
    with naming(path, "cannot be read"):
        try:
            lines = path.read_text("utf-8-sig").split("\n")  # names may have U+2028 or U+0085
            return [line for line in lines if line.strip()]
        except UnicodeDecodeError as error:
            raise ToolError(f"{path}: cannot be read as UTF-8 text ({error})") from error

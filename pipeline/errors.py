"""The one kind of error that a command turns into a sentence and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from os import PathLike

PREEMPTED = 85  # exit code: stopped by a signal, saved; the same command resumes
DIVERGED = 76  # exit code: loss, gradient or outputs of a training are not finite


class UserError(Exception):
    """Input, a file or a machine that cannot be used; the message names it.

    The sentence says what would be right. Any other exception is a bug in relaxmim: it keeps its
    traceback and ends a command with exit code 1.
    """

    code = 2


class Diverged(UserError):
    """A training whose numbers are not finite. Its own exit code lets a study of learning rates
    distinguish a rate that is too high from a fault."""

    code = DIVERGED


def check_range(
    flag: str,
    value: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """UserError, naming an option and its value, unless the value is a finite number within the
    bounds, or None (the option was not given)."""
    if value is None:
        return
    good = {
        "at least": at_least is None or value >= at_least,
        "above": above is None or value > above,
        "at most": at_most is None or value <= at_most,
        "below": below is None or value < below,
    }
    finite = isinstance(value, int) or math.isfinite(value)  # an int may be beyond all floats
    if not (finite and all(good.values())):
        bounds = zip(good, (at_least, above, at_most, below), strict=True)
        said = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
        said += [] if finite else ["finite"]
        given = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"{flag} {given}: must be {' and '.join(said)}")


@contextlib.contextmanager
def naming(path: str | PathLike[str], what: str = "cannot be read or written") -> Iterator[None]:
    """OSErrors inside become a UserError `<path>: <what> (<reason>)`.

    The path is the error's own where it names one, since that is the file at fault.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{where}: {what} ({reason(error, str(where))})") from error


# Of a path that cannot even be looked at: a name that is too long, a folder that may not be
# entered, a disk or a mount that fails.
_UNREACHABLE = (
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN,
)  # fmt: skip


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """An OSError of a path that cannot be looked at becomes a UserError that names it; for a whole
    command, since any path that it is given can be such a one."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNREACHABLE or not isinstance(error.filename, str):
            raise
        raise UserError(f"{error.filename}: cannot be read or written ({reason(error)})") from error


def is_url(path: str | PathLike[str]) -> bool:
    """True for s3://bucket/x, also where pathlib has dropped the second slash."""
    scheme = re.match(r"[A-Za-z][\w+.-]*:/", os.fspath(path))
    return scheme is not None and not os.path.exists(scheme[0])


def not_there(path: str | PathLike[str]) -> str:
    """What is said of a file or folder that does not exist, or is not one of this machine."""
    url = "; it is a URL, and only local files are read here" if is_url(path) else ""
    return f"{path}: no such file or folder{url}"


def reason(error: BaseException, name: str = "") -> str:
    """Why, in one line: the system's or the server's words, or the class of the error.

    name: what could not be read. Some libraries say no more than that in their error (fsspec's
    FileNotFoundError is the URL, whatever happened); then the cause behind it says why.
    """
    behind: BaseException | None = error
    while behind is not None:
        status, message = getattr(behind, "status", None), getattr(behind, "message", None)
        if isinstance(status, int) and message:
            return f"HTTP {status} {message}"
        text = getattr(behind, "strerror", None) or str(behind).strip()
        if text and text != name:
            return text.split("\n")[0]
        behind = behind.__cause__ or behind.__context__
    return "not found" if isinstance(error, FileNotFoundError) else type(error).__name__


def said_by_backend(error: Exception) -> bool:
    """True for what a backend of fsspec raises where it cannot read or write: exceptions of its own
    class, OSError, and ImportError, ValueError or NotImplementedError where it is not installed or
    a URL means nothing to it. Other exceptions of Python's own are bugs of relaxmim."""
    expected = isinstance(error, OSError | ImportError | ValueError | NotImplementedError)
    return expected or type(error).__module__ != "builtins"


def mend_streams() -> None:
    """stdin, stdout and stderr that are closed (`>&-`) lead nowhere, so that no other file takes
    their numbers; what the locale's encoding lacks is written as `?`, bytes of a path that are no
    UTF-8 as escapes. Idempotent."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf = "utf" in stream.encoding.lower()
            stream.reconfigure(errors="backslashreplace" if utf else "replace")


def reader_left(number: int) -> bool:
    """Whether the pipe or the terminal that a file descriptor writes to has nobody at its end."""
    watch = select.poll()
    watch.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def mute_where_reader_left() -> None:
    """From here on stdout and stderr lead nowhere where their terminal or pipe is gone, so that a
    training, which has its log, does not end with it."""
    for number in (1, 2):
        if reader_left(number):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Where whoever reads this process's output has left (`… | head`), it ends without a word, with
    the exit code of SIGPIPE."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_left(1):
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)


def refuse(error: UserError, who: str = "") -> int:
    """Print `error: …` on stderr; the exit code. who: the rank, where it matters."""
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
    return error.code

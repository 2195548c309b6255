"""The one kind of error that a command turns into a sentence and exit code 2."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from os import PathLike


class UserError(Exception):
    """Input, a file or a machine that cannot be used, in one sentence that names it.

    The sentence says what would be right. Every other exception is a slip of ours: it keeps its
    traceback and ends a command with exit code 1.
    """


@contextlib.contextmanager
def naming(path: str | PathLike[str], what: str = "cannot be read or written") -> Iterator[None]:
    """OSErrors inside become a UserError `<path>: <what> (<reason>)`.

    The path is the error's own where it names one, since that is the file at fault.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"{error.filename or path}: {what} ({reason})") from error


def refuse(error: UserError, who: str = "") -> int:
    """Print `error: …` on stderr; the exit code, 2. who: the rank, where it matters."""
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
    return 2

"""What a command does before the imports that take seconds. Nothing here imports torch."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from pipeline.errors import UserError, refuse

T = TypeVar("T")


def expand_home(words: Iterable[str]) -> list[str]:
    """The words of a command line, `--output=~/runs` as the shell reads `--output ~/runs`: of what
    follows a `=` it leaves the tilde, and a folder of that name would be made."""
    words = list(words)
    parts = [re.fullmatch(r"([\w.-]+=)?(~(?:/.*)?)", word, re.DOTALL) for word in words]
    return [
        f"{part[1] or ''}{os.path.expanduser(part[2])}" if part else word
        for word, part in zip(words, parts, strict=True)
    ]


def alone() -> bool:
    """Whether this process is the only rank, as far as the environment says."""
    return os.environ.get("WORLD_SIZE", "1") in ("", "1")


def early(parse: Callable[[], T], check: Callable[[T], object]) -> None:
    """Parse the command line; the process ends where that is all, or where `check` refuses what it
    says. Several ranks look at their input together, later.

    Until `imported` nobody looks for garbage (late.uncollected).
    """
    sys.argv[1:] = expand_home(sys.argv[1:])
    args = parse()
    if alone():
        try:
            check(args)
        except UserError as error:
            sys.exit(refuse(error))
    gc.disable()


def imported() -> None:
    """The imports that follow `early` are done."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()

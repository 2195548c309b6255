"""`~` where a path is given: in a word of a command line, in a value of a file, in the environment.

Of `--output=~/runs` the shell leaves the tilde, and in a recipe there is no shell: a folder of that
name would be made. So it is with "$OUT" where OUT is not set: an empty word would be the current
folder. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from pipeline.errors import UserError

_WORD = re.compile(r"([\w.-]+=)?(~.*)", re.DOTALL)
_EMPTY = re.compile(r"(--[\w-]+)=")
# Options for which "" is a value: no policy, no options of sbatch.
_MAY_BE_EMPTY = ("--randaugment", "--slurm")


def expand_home(path: str) -> str:
    """A path whose first part is `~` or `~USER`, as the shell reads it; another text as it is.

    A file that is called so is `./~`. UserError for a user that this machine does not know.
    """
    full = os.path.expanduser(path)
    if full == path and re.match("~[^/]*/", path) and not os.path.lexists(path):
        name = path.partition("/")[0]
        raise UserError(
            f"{path}: {name} is not a home folder here, as there is no user {name[1:]!r}; a folder "
            f"of that name is ./{name}"
        )
    return full


def expand_words(words: Iterable[str]) -> list[str]:
    """The words of a command line: `~/x`, and `--option=~/x` or `key=~/x`. UserError, also for an
    empty word, which names nothing (pathlib would take it for the current folder)."""
    words = list(words)
    for before, word in pairwise(("", *words)):
        match = _EMPTY.fullmatch(word)
        option = match[1] if match else before if before.startswith("--") else "a path"
        if (match or not word) and option not in _MAY_BE_EMPTY:
            raise UserError(f"{option} is given as an empty text; is a shell variable unset?")
    parts = [(word, _WORD.fullmatch(word)) for word in words]
    return [f"{part[1] or ''}{expand_home(part[2])}" if part else word for word, part in parts]


def expand_values(value: Any) -> Any:
    """`expand_home` of all texts inside a value of JSON or YAML. UserError."""
    if isinstance(value, dict):
        return {key: expand_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand_values(inner) for inner in value]
    return expand_home(value) if isinstance(value, str) else value

"""What every command line has in common: ~, and --help with the default of each flag."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable


def expand_home(words: Iterable[str]) -> list[str]:
    """The words of a command line, `--output=~/runs` as the shell reads `--output ~/runs`: of what
    follows a `=` it leaves the tilde, and a folder of that name would be made."""
    words = list(words)
    parts = [re.fullmatch(r"([\w.-]+=)?(~(?:/.*)?)", word, re.DOTALL) for word in words]
    return [
        f"{part[1] or ''}{os.path.expanduser(part[2])}" if part else word
        for word, part in zip(words, parts, strict=True)
    ]


class HelpFormatter(argparse.HelpFormatter):
    """Adds `(default: …)` to the help of an option, as it would be typed.

    Not to that of a switch, nor where the default is nothing or the text names it.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        nothing = default is None or isinstance(default, bool) or default in ("", "{}", (), [])
        if nothing or default == argparse.SUPPRESS or "default: " in text:
            return text
        if not action.option_strings:
            return text
        values = default if isinstance(default, list | tuple) else (default,)
        shown = " ".join(f"'{value}'" if " " in str(value) else str(value) for value in values)
        shown = shown.replace("%", "%%")  # argparse formats the text with the action's fields
        return f"{text} (default: {shown})"

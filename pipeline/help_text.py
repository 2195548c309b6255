"""--help of every command: each flag with its default, where it has one to show."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.HelpFormatter):
    """Adds `(default: …)` to the help of an option, as it would be typed; a number is N.

    Not to that of a switch, nor where the default is nothing or the text names it.
    """

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        number = action.type in (int, float)
        return "N" if number else super()._get_default_metavar_for_optional(action)

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

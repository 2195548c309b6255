"""Ctrl-C while a command still imports. Nothing here imports anything that takes time."""

from __future__ import annotations

import os
import signal
import sys

_HOME = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def of_a_command() -> bool:
    """Whether this process runs a file of pipeline/, eval/ or shard_tools/, and is not a notebook,
    a test or another project, whose Ctrl-C is theirs."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    room, _, name = os.path.relpath(os.path.realpath(script or "/"), _HOME).partition(os.sep)
    return room in ("pipeline", "eval", "shard_tools") and os.sep not in name


def interrupt_quietly() -> None:
    """From here on Ctrl-C ends this process by the signal itself, without a traceback. Not where it
    is ignored (`nohup`, `&` in a script), nor in a container's first process, which would then
    ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and os.getpid() != 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

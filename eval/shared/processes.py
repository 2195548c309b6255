"""Commands of this project as child processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError, mute_where_reader_left, naming
from shard_tools.cli import Stopped

# A command is a launch of its own, also where this process has joined ranks.
LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


def environment(threads: int) -> dict[str, str]:
    """A child's environment: no ranks of this run, `threads` per process, CPU without a GPU; and
    launch.sh finds this interpreter."""
    result = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    result["OMP_NUM_THREADS"] = str(threads)
    if Path(sys.prefix, "bin", "python").exists():
        result["VIRTUAL_ENV"] = sys.prefix
    import torch  # seconds, which the help and a plan need not wait for

    if not torch.cuda.is_available():
        result["DS_ACCELERATOR"] = "cpu"
    return result


def call(what: str, command: Sequence[str | Path], threads: int) -> float:
    """Run a command to its end and return its seconds. UserError where it fails. Where this process
    is stopped the command gets SIGTERM, with all that it started, and may save what it has."""
    words = [str(word) for word in command]
    print(f"\n== {what}", flush=True)
    start = time.perf_counter()
    with naming(words[0], "cannot be started"):
        # A group of its own, which Ctrl-C does not reach: DeepSpeed's launcher passes nothing on.
        child = subprocess.Popen(words, env=environment(threads), process_group=0)
    try:
        code = child.wait()
    except BaseException:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()
        raise
    if code:
        raise UserError(f"{what} failed with exit code {code}: {' '.join(words)}")
    return time.perf_counter() - start


def stop_on_sigterm() -> None:
    """SIGTERM ends this command as Ctrl-C does, so that its children are stopped first; and so does
    SIGHUP, unless it is ignored (nohup)."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupt)


def _interrupt(number: int, _frame: object) -> None:
    mute_where_reader_left()
    raise Stopped(number)

"""How set-up runs its commands: into a log, within a time limit, and with nothing left over."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LOG = BUILD / "setup.log"
NOISE = ("WARNING: ", "DEPRECATION: ", "[notice]")  # of pip, about settings that are not ours
HINTS = {
    r"No space left": "the disk is full: 7 GB are needed, and 3 GB for pip's cache (PIP_CACHE_DIR)",
    r"name resolution|Failed to (resolve|establish)|unreachable|timed out": "no network: the first "
    "set-up needs PyPI or a mirror of it (pip config)",
    r"CERTIFICATE_VERIFY|SSLError": "a certificate is not trusted: apt install ca-certificates",
    r"cannot open shared object file": "a library of the system is missing: see the line above",
    r"No matching distribution": "no wheel for this Python or machine: 3.11 to 3.14 on x86-64 have",
}
MARK = "RELAXMIM_SETUP"  # in the environment of all that a set-up starts: the folder it is for


class Failed(RuntimeError):
    """A command that failed or was stopped at its time limit; the reason."""


def run(command: Sequence[str | Path], limit: float, **environment: str) -> None:
    """A command whose output goes to the log; its last line is shown every half minute.

    Raises Failed on an exit code other than 0 and after `limit` seconds. However this ends, the
    command and what it had started end too.
    """
    temporary = BUILD / "tmp"  # not /tmp, which may be small and would keep an interruption's GBs
    temporary.mkdir(parents=True, exist_ok=True)
    settings = {
        "PIP_USER": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(temporary),
        MARK: str(ROOT),
    }
    begun = time.monotonic()
    with LOG.open("a") as log:
        process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
            env=os.environ | settings | environment, start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(30, max(0.0, begun + limit - time.monotonic())))
                break
            seconds = time.monotonic() - begun
            if seconds >= limit:
                raise Failed(f"stopped after its limit of {limit:.0f} s")
            print(f"      {seconds:.0f} s  {''.join(tail(1)).strip()[:80]}", flush=True)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        program = Path(command[0]).name
        raise Failed(f"{program} ended with exit code {process.returncode}")


def section() -> str:
    """What the log holds of the last stage."""
    with contextlib.suppress(OSError):
        return LOG.read_text(errors="replace").rpartition("\n== ")[2]
    return ""


def tail(lines: int) -> list[str]:
    """The last lines of a stage's output that say something: without pip's remarks."""
    said = section().splitlines()[1:]
    return [line for line in said if line.strip() and not line.startswith(NOISE)][-lines:]


def hint() -> str:
    """What to do about a fault that the log of the last stage shows, or ''."""
    text = section()
    return next((advice for sign, advice in HINTS.items() if re.search(sign, text)), "")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One set-up of this checkout at a time, with nothing left of one that was killed."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "setup.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another set-up of this folder is running: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        while end_leftovers():
            time.sleep(0.1)
        LOG.write_text("")
        shutil.rmtree(BUILD / "tmp", ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(BUILD / "tmp", ignore_errors=True)


def end_leftovers() -> int:
    """Kill what a killed set-up of this checkout had started; the number found."""
    mark, found = f"{MARK}={ROOT}\0".encode(), 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                found += 1
    return found

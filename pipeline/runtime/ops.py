"""DeepSpeed's fused ops: compiled once per host, and what a run does without them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.distributed import cannot_build, extensions_dir, own_extensions

FAILED = "failed.txt"  # in the folder of the ops: why they could not be compiled
STARTED = time.time()  # of this process, about
OLD = 1800  # seconds after which a lock of torch's is nobody's, where ours cannot be had

_problem = "they are not loaded"  # why this process has no fused ops; "": it has


def problem() -> str:
    """Why DeepSpeed's fused ops are not used; "" where they are."""
    return _problem


def give_up(reason: str) -> None:
    """Use none, since of another rank, say."""
    global _problem
    _problem = _problem or reason


def prepare() -> list[str]:
    """Load the ops that a run here needs, compiled where they are not yet; the names of those.

    To be called by every rank before it joins the others: the first of a host compiles, the rest
    wait for its lock, which ends with the process that holds it. What fails is kept as `problem`,
    and tried again at the next start.
    """
    global _problem
    names: list[str] = []
    _problem = "" if _prebuilt() else cannot_build()
    if _problem:
        return names
    folder = extensions_dir()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        with _alone(folder) as locked:
            note = folder / FAILED
            if note.exists() and note.stat().st_mtime > STARTED:  # another rank of this start
                _problem = note.read_text(encoding="utf-8")
                return names
            _remove_locks(folder, 0 if locked else OLD)
            names = _load(folder)
            if not names:
                note.write_text(_problem, encoding="utf-8")
            else:
                note.unlink(missing_ok=True)
    except OSError as error:
        _problem = f"{error.filename or folder}: {error.strerror or error}"
    return names


def wanted() -> list[str]:
    """DeepSpeed's builders of the ops that a run here needs."""
    return ["FusedAdamBuilder"] + ([] if torch.cuda.is_available() else ["ShareMemCommBuilder"])


def _prebuilt() -> bool:
    """Whether the ops came compiled with DeepSpeed, as in the Docker image."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops

    builders = [get_accelerator().create_op_builder(name) for name in wanted()]
    names = [getattr(builder, "NAME", "") for builder in builders]
    return bool(accelerator_name == get_accelerator()._name and all(map(installed_ops.get, names)))


def _load(folder: Path) -> list[str]:
    """The names of the ops, loaded; none, and `_problem` set, where one cannot be."""
    global _problem
    from deepspeed.accelerator import get_accelerator

    names = []
    for name in wanted():
        builder = get_accelerator().create_op_builder(name)
        _take_over(folder, builder.NAME)
        if not any(folder.glob(f"{builder.NAME}/*.so")) and not _prebuilt():
            print(f"compiling DeepSpeed's {builder.NAME}, once for this machine (minutes)",
                  file=sys.stderr, flush=True)  # fmt: skip
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints which op it has loaded
                builder.load(verbose=False)
        except Exception as error:  # of the compiler, of ninja, of DeepSpeed's and torch's checks
            _problem = f"{builder.NAME} cannot be compiled: {_why(error)}"
            return []
        names.append(str(builder.NAME))
    return names


def _take_over(folder: Path, name: str) -> None:
    """Copy an op that set-up has compiled into an environment that is read-only here, or that was
    compiled when the folders had no such names; ninja knows by commands and times whether it is of
    this torch, and compiles it again where it is not."""
    for before in (own_extensions() / folder.name / name, folder.parent / name):
        if any(before.glob("*.so")) and not any(folder.glob(f"{name}/*.so")):
            shutil.copytree(before, folder / name, dirs_exist_ok=True)


def _why(error: Exception) -> str:
    """One line of what a failed build said."""
    if type(error).__name__ == "CUDAMismatchException":
        return f"nvcc is of another CUDA than torch's {torch.version.cuda}"
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd))
        return f"'{command[:80]}' ended with exit code {error.returncode}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line] or lines or [type(error).__name__]
    return told[0][:200]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder of ops; False where its file system has none."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "ranks.lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _remove_locks(folder: Path, age: float) -> None:
    """Remove torch's locks older than `age` seconds: until 2.13 torch waits forever for one that a
    killed process has left."""
    for lock in folder.glob("*/lock"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime >= age:
                lock.unlink()

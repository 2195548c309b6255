"""DeepSpeed's fused ops: compiled once per host, and what a run does without them."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.distributed import cannot_build, extensions_dir, own_extensions
from pipeline.gpu_errors import one_line
from pipeline.runtime.cuda_build import compiling_for, cuda_architectures
from shard_tools.atomic import write_json

FAILED = "failed.txt"  # in the folder of the ops: why they could not be compiled
MADE_OF = "made_of.json"  # in the folder of an op: what it was compiled from, and for
STARTED = time.time()  # of this process, about
SOON = 3.0  # seconds; what takes longer is said
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
        try:
            _load_op(folder, builder)
        except Exception as error:  # of the compiler, of ninja, of DeepSpeed's and torch's checks
            _problem = f"{builder.NAME} cannot be compiled: {_why(error)}"
            return []
        names.append(str(builder.NAME))
    return names


def _load_op(folder: Path, builder: Any) -> None:
    """Load an op, compiled now where it is not yet. Raises whatever its builder does."""
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    if _prebuilt():
        _quietly(builder.load)
        return
    _take_over(folder, builder.NAME)
    architectures = cuda_architectures() if isinstance(builder, CUDAOpBuilder) else None
    made_of = _made_of(builder, architectures)
    if _load_compiled(folder, builder, made_of):
        return
    text = f"compiling DeepSpeed's {builder.NAME}, once for this machine (minutes)"
    if any(folder.glob(f"{builder.NAME}/*.so")):  # ninja looks whether it is of these files
        text = f"loading DeepSpeed's {builder.NAME} (minutes where it must be compiled again)"
    with (
        _saying(text),
        compiling_for(architectures) if architectures else contextlib.nullcontext(),
    ):
        _quietly(builder.load)
    write_json(folder / builder.NAME / MADE_OF, made_of)


def _quietly(load: Any) -> None:
    """Load without DeepSpeed's print of which op it has loaded."""
    with contextlib.redirect_stdout(io.StringIO()):
        load(verbose=False)


def _made_of(builder: Any, architectures: str | None) -> dict[str, Any]:
    """What DeepSpeed, torch and ninja compile an op from, and for.

    To find that nothing has changed they ask the compiler, ninja and each other for as much CPU
    time as the import of torch takes.
    """
    import deepspeed

    # Resolved: an environment that is reached by two paths, a link's perhaps, is one.
    sources = [Path(builder.deepspeed_src_path(name)).resolve() for name in builder.sources()]
    return {
        "versions": [deepspeed.__version__, torch.__version__, platform.python_version()],
        "sources": [[str(path), path.stat().st_mtime_ns] for path in sources],
        "flags": {name: os.environ.get(name) for name in ("CXX", "CFLAGS", "CUDA_HOME")},
        "processor": _processor(),
        "gpus": architectures,
    }


def _processor() -> list[str]:
    """Its name and instruction sets, for which the ops are compiled (-march=native)."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        first = file.read().split("\n\n", 1)[0].splitlines()
        return [
            line for line in first if line.startswith(("model name", "flags", "Features", "CPU"))
        ]
    return [platform.processor(), platform.node()]


def _load_compiled(folder: Path, builder: Any, made_of: dict[str, Any]) -> bool:
    """Load an op that an earlier start has compiled from the same; whether there is one."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    path = folder / builder.NAME / f"{builder.NAME}.so"
    try:
        if json.loads((folder / builder.NAME / MADE_OF).read_text()) != made_of:
            return False
        spec = importlib.util.spec_from_file_location(builder.NAME, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (OSError, ValueError, ImportError):
        return False
    OpBuilder._loaded_ops[builder.name] = module
    return True


def _take_over(folder: Path, name: str) -> None:
    """Copy an op that set-up has compiled into an environment that is read-only here, or where no
    GPU was visible; ninja knows by commands and times whether it is of this torch, and compiles it
    again where it is not. Of which processor it is, the folder's name says alone."""
    anywhere = re.sub(r"(-sm\d+)+$", "", folder.name)
    kept = [own_extensions() / kind for kind in dict.fromkeys((folder.name, anywhere))]
    for before in (*(place / name for place in kept), folder.parent / anywhere / name):
        if any(before.glob("*.so")) and not any(folder.glob(f"{name}/*.so")):
            shutil.copytree(before, folder / name, dirs_exist_ok=True)


def _why(error: Exception) -> str:
    """One line of what a failed build said."""
    if type(error).__name__ == "CUDAMismatchException":
        return f"nvcc is of another CUDA than torch's {torch.version.cuda}"
    if isinstance(error, subprocess.CalledProcessError):
        return one_line(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = (
        [line for line in lines if re.search("error:|nvcc fatal", line)]
        or lines
        or [type(error).__name__]
    )
    return told[0][:200]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder of ops; False where its file system has none."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "ranks.lock", "a") as file:
        text = f"waiting for another process, which compiles DeepSpeed's ops in {folder}"
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # once per host
        try:
            with _saying(text) if first else contextlib.nullcontext():
                fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


@contextlib.contextmanager
def _saying(text: str) -> Iterator[None]:
    """Say on stderr what takes longer than SOON."""
    timer = threading.Timer(SOON, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _remove_locks(folder: Path, age: float) -> None:
    """Remove torch's locks older than `age` seconds: until 2.13 torch waits forever for one that a
    killed process has left."""
    for lock in folder.glob("*/lock"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime >= age:
                lock.unlink()

"""Set-up in five stages: .venv from requirements.lock, and what a compiler adds. `make setup`.

The system's Python runs this before anything is installed, so it imports the standard library
only; it is here, beside the check that every change has to pass, because no package is it part
of. A stage that has ended leaves a stamp in .venv/setup with the hash of its inputs and is skipped
from then on, without the network; one that was interrupted starts again and keeps what is whole.
setup_venv makes .venv, setup_builds what is compiled for it, setup_run runs their commands.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import setup_builds as builds
import setup_venv as venv
from setup_run import BUILD, LOG, ROOT, Failed, alone, hint, tail


class SetupError(RuntimeError):
    """Set-up cannot end in working order; one sentence."""


@dataclass(frozen=True)
class Stage:
    """One step: its stamp's name, the line shown, what its result depends on, and its work.

    `work` returns what it made ("" where it took the way without a compiler) and `possible` says
    whether more than that could be made on this machine now.
    """

    name: str
    title: str
    key: str
    possible: bool
    work: Callable[[], str]


def stages(tools: builds.Tools) -> list[Stage]:
    """The five stages on this machine."""
    lock = venv.LOCK.read_text()
    cpu = Path("/proc/cpuinfo")
    avx2 = cpu.exists() and re.search(r"\bavx2\b", cpu.read_text()) is not None
    files = ROOT / "setup.py", ROOT / "pyproject.toml", *builds.c_sources(), *builds.c_sources("h")
    source = [path.read_text() for path in files]
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    simd, decoder, ops = tools.pillow(), tools.decoder(), tools.ops()
    wheel = BUILD / "wheels" / f"{sys.implementation.cache_tag}{'-avx2' if avx2 else ''}"
    return [
        Stage("venv", f"making .venv with {python} (seconds)", "", False, venv.make_venv),
        Stage(
            "wheels",
            f"installing the {len(lock.split())} packages of requirements.lock "
            "(3 GB to fetch, 6 GB on disk; two minutes from a fast mirror)",
            digest(lock), False, venv.install_wheels,
        ),
        Stage(
            "pillow",
            f"building {builds.PILLOW_SIMD} from source (1 MB; one minute)" if simd
            else "pillow-simd: skipped, plain Pillow stays",
            digest(lock, builds.PILLOW_SIMD, str(avx2)), simd,
            lambda: builds.pillow(simd, wheel, avx2),
        ),
        Stage(
            "relaxmim",
            f"installing relaxmim itself{' and compiling its JPEG decoder' * decoder} (seconds)",
            digest(lock, *source), decoder, lambda: builds.relaxmim(decoder),
        ),
        Stage(
            "ops",
            "compiling DeepSpeed's fused ops (two to three minutes)" if ops
            else "DeepSpeed's fused ops: skipped, torch's take over",
            digest(lock), ops, lambda: builds.fused_ops(ops),
        ),
    ]  # fmt: skip


def digest(*parts: str) -> str:
    """A short hash of a stage's inputs."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def is_done(stage: Stage, *, retry: bool = False) -> bool:
    """Whether its stamp holds for these inputs. `retry`: a build that failed is tried again."""
    if stage.name == "venv":
        return venv.venv_fault() is None
    try:
        key, made = (venv.VENV / "setup" / stage.name).read_text().split("\n")[:2]
    except (OSError, ValueError):
        return False
    if made == "failed":
        return key == stage.key and not retry
    return key == stage.key and (made != "" or not stage.possible)


def stamp(stage: Stage, made: str) -> None:
    """Say that a stage has ended, and what it made; whole or not at all."""
    path = venv.VENV / "setup" / stage.name
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(f"{stage.key}\n{made}\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def do(number: int, stage: Stage, total: int) -> None:
    """One stage with its lines. SetupError where it fails; an optional build may, and is said."""
    line = f"[{number}/{total}] {stage.title}"
    print(line, flush=True)
    with LOG.open("a") as log:
        log.write(f"\n== {line}\n")
    begun = time.monotonic()
    try:
        made = stage.work()
    except builds.NotBuilt as error:
        made = "failed"
        print(f"      not built: {error} (see {LOG}); `make setup` tries again", flush=True)
    except Failed as error:
        print("\n".join(f"      | {text[:160]}" for text in tail(15)), file=sys.stderr)
        why = hint() and f"\n       {hint()}"
        raise SetupError(f"{stage.title.split(' (')[0]}: {error} (see {LOG}){why}") from None
    stamp(stage, made)
    if time.monotonic() - begun > 1:
        print(f"      {time.monotonic() - begun:.0f} s", flush=True)


def set_up(*, retry: bool) -> None:
    """Whatever is not done yet; prints nothing where all is, unless it was asked to. SetupError."""
    tools = builds.look()
    if all(is_done(stage, retry=retry) for stage in stages(tools)):
        if retry:
            print(f"set-up is complete; {builds.advice(tools) or 'everything is built'}")
        return
    with alone():
        begun = time.monotonic()
        if builds.advice(tools):
            print(builds.advice(tools), flush=True)
        fault = venv.venv_fault()
        lacks = venv.lacking() if fault else ""
        if lacks:
            raise SetupError(f"{venv.base_python()} lacks what set-up needs: apt install {lacks}")
        if fault and venv.VENV.exists():
            print(f".venv is made again: {fault}", flush=True)
        todo = stages(tools)
        for number, stage in enumerate(todo, 1):
            if not is_done(stage, retry=retry):
                do(number, stage, len(todo))
        print(f"set-up done in {time.monotonic() - begun:.0f} s", flush=True)


def main() -> int:
    """The exit code: 0 in working order, 2 where the user can mend it, 130 when interrupted."""
    parser = argparse.ArgumentParser(description="Make .venv; see the head of this file.")
    parser.add_argument("--retry", action="store_true", help="try builds that failed again")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036
        have = ".".join(map(str, sys.version_info[:2]))
        print(
            f"error: Python >= 3.11 is needed, not {have}: set PYTHON=python3.11", file=sys.stderr
        )
        return 2
    inside = Path(sys.executable).parent.resolve() == venv.PYTHON.parent.resolve()
    if not inside and venv.venv_fault() is None:  # what is built is built for .venv's Python
        os.execv(venv.PYTHON, [str(venv.PYTHON), "-E", "-S", *sys.argv])  # noqa: S606
    try:
        set_up(retry=arguments.retry)
    except KeyboardInterrupt:
        print("set-up interrupted; the same command resumes it", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error.filename or 'set-up'}: {error.strerror}", file=sys.stderr)
        return 2
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def interrupt(number: int, _: object) -> None:
    """SIGTERM and SIGHUP end set-up as Ctrl-C does: with what it had started."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    sys.exit(main())

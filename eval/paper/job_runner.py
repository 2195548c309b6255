"""Commands that depend on one another: skipped where done, run side by side, their cost kept."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

from eval.shared.processes import environment
from pipeline.errors import DIVERGED, UserError, check_range, naming
from shard_tools.cores import cores


@dataclass(frozen=True)
class Command:
    """A command line, the file that it leaves, and the commands whose files it reads.

    step: the file must be an encoder.json of that step (a pretraining exports earlier ones too).
    weights: what a command that needs this one reads beside the file. for_others: the file is made
    for other commands only.
    images: how many it trains on or encodes. count: its floating-point operations, counted when a
    plan asks, since a dry run of a large model takes a second.
    """

    name: str
    command: tuple[str, ...]
    makes: Path
    needs: tuple[str, ...] = ()
    step: int = 0
    images: int = 0
    weights: Path | None = None
    for_others: bool = False
    count: Callable[[], float] = field(default=float, compare=False, repr=False)

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole job."""
        return self.count()

    @property
    def done(self) -> bool:
        """Whether its files are there; each of our commands writes `makes` last, under a temporary
        name.

        UserError where an encoder.json cannot be read.
        """
        if self.weights is not None and not self.weights.is_file():
            return False
        return self.has_result

    @property
    def has_result(self) -> bool:
        """Whether the file is there, with or without the weights."""
        if not self.makes.is_file():
            return False
        if not self.step:
            return True
        with naming(self.makes, "cannot be read"):
            text = self.makes.read_bytes()
        try:
            return int(json.loads(text)["step"]) >= self.step
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.makes}: has no step; remove it to run it again") from error


def unique(jobs: Sequence[Command]) -> list[Command]:
    """Commands in order, each name once, with the weights that one of that name has; UserError
    where one name has two command lines."""
    found: dict[str, Command] = {}
    for job in jobs:
        before = found.setdefault(job.name, job)
        if before.command != job.command:
            raise UserError(f"two different commands are called {job.name}")
        found[job.name] = replace(before, weights=before.weights or job.weights)
    return list(found.values())


def needed(jobs: Sequence[Command]) -> list[Command]:
    """Commands in order, each name once, without those that nothing needs any more: the pretraining
    of an encoder whose results are all there while its weights are gone."""
    jobs, wanted = unique(jobs), set[str]()
    used = {name for job in jobs for name in job.needs}
    for job in reversed(jobs):  # what a command needs comes before it
        if job.name in wanted:
            missing = not job.done
        else:
            missing = not job.has_result and not (job.for_others and job.name in used)
        if missing:
            wanted |= {job.name, *job.needs}
    return [job for job in jobs if job.done or job.name in wanted]


def run_commands(jobs: Sequence[Command], slots: int, folder: Path, trials: bool = False) -> None:
    """Run what is not done, `slots` at a time.

    Its output goes to folder/logs/NAME.log, its cost to folder/jobs.jsonl. What needs a
    failed command is left out, the rest is run; then UserError names each failure and its log.
    trials: a command that diverges has found something out: it is no failure, see `diverged`.
    """
    jobs, failed, apart = unique(jobs), dict[str, Path](), set[str]()
    left = [job for job in jobs if not job.done]
    with naming(folder, "cannot be written"):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    # Here, since it imports torch: an interruption meanwhile would find no child to stop.
    given = environment(max(1, cores() // slots)) if left else {}
    children: set[subprocess.Popen] = set()
    running: dict[Future, Command] = {}
    with ThreadPoolExecutor(slots) as pool:
        try:
            while left or running:
                waiting = {job.name for job in (*left, *running.values())} | failed.keys()
                ready = [job for job in left if not waiting & set(job.needs)]
                for job in ready[: slots - len(running)]:
                    left.remove(job)
                    running[pool.submit(run_one, job, folder, given, children)] = job
                if not running:
                    break  # what is left needs a failed command
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    record = future.result()
                    state = f"{record['cpu_seconds']:.0f} s CPU"
                    if record["code"] or not job.done:
                        failed[job.name] = Path(record["log"])
                        state = "FAILED"
                    if trials and record["code"] == DIVERGED:
                        apart.add(job.name)
                        state = f"diverged, so it counts as the worst (see {record['log']})"
                    number = len(jobs) - len(left) - len(running)
                    print(f"[{number}/{len(jobs)}] {job.name}: {state}", flush=True)
        finally:
            for child in list(children):  # none but at an interruption
                child.terminate()
    failed = {name: log for name, log in failed.items() if name not in apart}
    if failed:
        names = "; ".join(f"{name} (see {log})" for name, log in failed.items())
        raise UserError(f"{len(failed)} of {len(jobs)} commands failed: {names}")


_writing = threading.Lock()


def run_one(job: Command, folder: Path, given: dict[str, str], children: set) -> dict[str, Any]:
    """Run a command in an environment to its end; what jobs.jsonl keeps of it. UserError where it
    cannot start."""
    log = folder / "logs" / f"{''.join(c if c.isalnum() else '-' for c in job.name)}.log"
    start = time.monotonic()
    with naming(log, "cannot be written"):
        output = log.open("ab")
    with output:
        with naming(job.command[0], "cannot be started"):
            child = subprocess.Popen(
                job.command, env=given, stdout=output, stderr=subprocess.STDOUT
            )
        children.add(child)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        children.discard(child)
    record = {
        "name": job.name,
        "code": child.returncode,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "seconds": round(time.monotonic() - start, 2),
        "log": str(log),
    }
    path = folder / "jobs.jsonl"
    with _writing, naming(path, "cannot be written"), path.open("ab+") as file:
        file.truncate(whole_lines(file))
        file.write(json.dumps(record).encode() + b"\n")
    return record


def whole_lines(file: BinaryIO) -> int:
    """Bytes of a file up to the end of its last line that has one: a power cut may leave half."""
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def costs(folder: Path, what: str = "cpu_seconds") -> dict[str, float]:
    """CPU seconds (what: `seconds`, elapsed ones) by name, over all calls. UserError names a line
    that is no record."""
    total = dict[str, float]()
    for name, seconds in records(folder, what):
        total[name] = total.get(name, 0.0) + seconds
    return total


def diverged(folder: Path) -> set[str]:
    """Names of the commands that diverged when they last ran."""
    return {name for name, code in dict(records(folder, "code")).items() if code == DIVERGED}


def records(folder: Path, what: str) -> Iterator[tuple[str, float]]:
    """(name, value) of every command that has ended, in their order."""
    path, least = folder / "jobs.jsonl", None if what == "code" else 0
    if not path.is_file():
        return
    with naming(path, "cannot be read"):
        text = path.read_bytes()
    for number, line in enumerate(text.split(b"\n")[:-1], 1):  # a power cut may leave half a line
        try:
            record = json.loads(line)
            name, value = str(record["name"]), float(record[what])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a record of a command") from error
        check_range(f"{path}, line {number}: {what}", value, at_least=least)
        yield name, value


def python(script: str | Path, *words: object) -> tuple[str, ...]:
    """A relaxmim script as a command of this interpreter."""
    return (sys.executable, str(script), *map(str, words))


def show_plan(jobs: Sequence[Command]) -> Iterator[str]:
    """Lines per command: its cost or that it is done, its command; and the sum of what is left.

    Each as soon as its cost is counted, which takes seconds for every kind of step.
    """
    left = [job for job in unique(jobs) if not job.done]
    for job in unique(jobs):
        state = "done" if job.done else f"{job.images:>10,} images {job.flops / 1e12:>12,.1f} TFLOP"
        yield f"{state:>40}  {job.name}"
        yield f"{'':>42}{' '.join(map(quote, job.command))}"
    flops = sum(job.flops for job in left)
    yield (
        f"{len(left)} of {len(unique(jobs))} commands to run: "
        f"{sum(j.images for j in left):,} images, "
        f"{flops / 1e12:,.1f} TFLOP: {flops / 3.6e3 / 300e12:,.2f} hours of a GPU at 300 TFLOP/s, "
        f"{flops / 3.6e3 / 30e9:,.2f} hours of a CPU core at 30 GFLOP/s"
    )

"""Commands that depend on one another: skipped where done, run side by side, their cost kept."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from shard_tools.cores import cores

# A job is a launch of its own, also where this process has joined ranks.
LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command, the file that it leaves, and the jobs whose files it reads.

    step: the file must be an encoder.json of that step (a pretraining exports earlier ones too).
    images, flops: what it trains or encodes: images, and floating-point operations.
    """

    name: str
    command: tuple[str, ...]
    makes: Path
    needs: tuple[str, ...] = ()
    step: int = 0
    images: int = 0
    flops: float = 0.0

    @property
    def done(self) -> bool:
        """Whether the file is there; each of our commands writes it whole and last."""
        if not self.makes.is_file():
            return False
        return not self.step or int(json.loads(self.makes.read_text())["step"]) >= self.step


def unique(jobs: Sequence[Job]) -> list[Job]:
    """Jobs in order, each name once; UserError where one name stands for two commands."""
    found: dict[str, Job] = {}
    for job in jobs:
        if found.setdefault(job.name, job).command != job.command:
            raise UserError(f"two different commands are called {job.name}")
    return list(found.values())


def run_jobs(jobs: Sequence[Job], slots: int, folder: Path) -> dict[str, float]:
    """Run what is not done, `slots` at a time; CPU seconds by name, of earlier calls too.

    A job's output goes to folder/logs/NAME.log, its cost to folder/jobs.jsonl. What needs a
    failed job is left out, the rest goes on; then UserError names each failure and its log.
    """
    jobs, failed = unique(jobs), dict[str, Path]()
    left = [job for job in jobs if not job.done]
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    threads = max(1, cores() // slots)
    children: set[subprocess.Popen] = set()
    running: dict[Future, Job] = {}
    with ThreadPoolExecutor(slots) as pool:
        try:
            while left or running:
                waiting = {job.name for job in (*left, *running.values())} | failed.keys()
                ready = [job for job in left if not waiting & set(job.needs)]
                for job in ready[: slots - len(running)]:
                    left.remove(job)
                    running[pool.submit(run_one, job, folder, threads, children)] = job
                if not running:
                    break  # what is left needs a failed job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    record = future.result()
                    if record["code"] or not job.done:
                        failed[job.name] = Path(record["log"])
                    state = "FAILED" if job.name in failed else f"{record['cpu_seconds']:.0f} s CPU"
                    number = len(jobs) - len(left) - len(running)
                    print(f"[{number}/{len(jobs)}] {job.name}: {state}", flush=True)
        finally:
            for child in list(children):  # none but at an interruption
                child.terminate()
    if failed:
        names = "; ".join(f"{name} (see {log})" for name, log in failed.items())
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed: {names}")
    return costs(folder)


_writing = threading.Lock()


def run_one(job: Job, folder: Path, threads: int, children: set) -> dict[str, Any]:
    """Run a job to its end; what jobs.jsonl keeps of it."""
    log = folder / "logs" / f"{''.join(c if c.isalnum() else '-' for c in job.name)}.log"
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    environment["OMP_NUM_THREADS"] = str(threads)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    start = time.monotonic()
    with log.open("ab") as output:
        child = subprocess.Popen(
            job.command, env=environment, stdout=output, stderr=subprocess.STDOUT
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
    with _writing, (folder / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def costs(folder: Path) -> dict[str, float]:
    """CPU seconds by job name, over all calls."""
    path, total = folder / "jobs.jsonl", dict[str, float]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        record = json.loads(line)
        total[record["name"]] = total.get(record["name"], 0.0) + record["cpu_seconds"]
    return total


def python(script: str | Path, *words: object) -> tuple[str, ...]:
    """A script of ours as a command of this interpreter."""
    return (sys.executable, str(script), *map(str, words))


def show_plan(jobs: Sequence[Job]) -> list[str]:
    """Lines per job: its cost or that it is done, its command; and the sum of what is left."""
    lines, left = [], [job for job in unique(jobs) if not job.done]
    for job in unique(jobs):
        state = "done" if job.done else f"{job.images:>10,} images {job.flops / 1e12:>12,.1f} TFLOP"
        lines += [f"{state:>40}  {job.name}", f"{'':>42}{' '.join(map(quoted, job.command))}"]
    flops = sum(job.flops for job in left)
    lines.append(
        f"{len(left)} of {len(unique(jobs))} jobs to run: {sum(j.images for j in left):,} images, "
        f"{flops / 1e12:,.1f} TFLOP: {flops / 3.6e3 / 300e12:,.2f} hours of a GPU at 300 TFLOP/s, "
        f"{flops / 3.6e3 / 30e9:,.2f} hours of a CPU core at 30 GFLOP/s"
    )
    return lines


def quoted(word: str) -> str:
    """A word as a shell needs it."""
    return word if word and all(c.isalnum() or c in "-_./=:+,…" for c in word) else f"'{word}'"

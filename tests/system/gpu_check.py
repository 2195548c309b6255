"""One command that settles in minutes what only a GPU can tell. `make gpu-check`.

    python tests/system/gpu_check.py [--output build/gpu-check] [--mae CHECKOUT] [--rehearse]
    python tests/system/gpu_check.py --write docs/gpu.md [--output build/gpu-check | RESULT.json]

Runs the stages of gpu_stages, each in a process of its own with a time box, within --budget
seconds together. After every stage its result, result.json and page.md are in --output, and all
that the stages print is in log.txt there; a stage that fails or hangs does not stop the others.
--rehearse: on the CPU, smallest sizes, figures that mean nothing. --write: put the page of a
finished check into a document. Exit code 0 where no stage failed, 1 where one did, 2 without a GPU.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(HERE), str(HERE.parent / "helpers"), str(HERE.parent / "bench")]
sys.path[:0] = PATHS

from gpu_page import page, write_into

from shard_tools.atomic import write_atomic, write_json

# Names, time boxes and order, without what the stages import (gpu_stages.STAGES holds to it):
# seconds on a GPU, and whether others run beside it. What is timed runs alone.
BOXES: dict[str, tuple[int, bool]] = {
    "ops": (150, True),
    "kernels": (170, True),
    "numerics": (120, True),
    "recipes": (170, True),
    "resume": (170, True),
    "evaluation": (170, True),
    "compile": (170, True),
    "step": (170, False),
    "pretrain": (80, False),
    "loader": (30, False),
    "kernel_speed": (60, False),
    "ncu": (40, False),
}
LEAST = 5  # seconds under which a stage is not begun
DEVICE = "device"
# Ranks of whoever started this one: the stages have their own.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
            "MASTER_PORT")  # fmt: skip


@dataclass
class Running:
    """A stage's process, and when its time is over (monotonic)."""

    name: str
    process: subprocess.Popen
    begun: float
    ends: float
    log: Any


class Check:
    """The stages' processes and what became of them, in one folder."""

    def __init__(self, args: argparse.Namespace, stages: list[str]) -> None:
        self.args, self.folder, self.stages = args, args.output.resolve(), stages
        self.ends = time.monotonic() + args.budget
        self.begun = datetime.now(UTC).isoformat(timespec="seconds")
        self.results: dict[str, dict[str, Any]] = {}
        self.beside: list[Running] = []
        self.alive: dict[str, Running] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (*self.folder.glob("*.json"), *self.folder.glob("*.md")):
            old.unlink()  # an earlier check's
        for old in ("run", "data", "many", "pretrain", "eval", "eval-data"):
            shutil.rmtree(self.folder / old, ignore_errors=True)
        self.log = open(self.folder / "log.txt", "wb", buffering=0)  # noqa: SIM115

    def run(self) -> dict[str, Any]:
        """Every stage in order; the result. Whatever ends it ends the stages that run."""
        try:
            return self.run_stages()
        finally:
            for running in self.alive.values():
                end_group(running.process)

    def run_stages(self) -> dict[str, Any]:
        """Every stage in order; the result."""
        for name in self.stages:
            beside = BOXES[name][1] and not self.args.rehearse
            if not beside:
                self.end_beside()
            box = self.box(name)
            if box < LEAST:
                self.keep(name, {"status": f"skipped: no time left of {self.args.budget:.0f} s"})
                continue
            running = self.start(name, box)
            if beside:
                self.beside.append(running)
            else:
                self.finish(running)
        self.end_beside()
        return self.result()

    def box(self, name: str) -> float:
        """Seconds that the stage may take now."""
        most = self.args.limit or BOXES[name][0] * (10 if self.args.rehearse else 1)
        return min(most, self.ends - time.monotonic())

    def command(self, name: str, box: float) -> list[str]:
        """What runs a stage."""
        words = [sys.executable, "-u", __file__, "--stage", name, "--output", str(self.folder),
                 "--box", str(box), "--batch", str(self.args.batch)]  # fmt: skip
        words += ["--mae", str(self.args.mae)] if self.args.mae else []
        return [*words, *(["--rehearse"] if self.args.rehearse else [])]

    def start(self, name: str, box: float) -> Running:
        """The stage in a process group of its own."""
        print(f"== {name} (at most {box:.0f} s)", flush=True)
        log = open(self.folder / f"{name}.log", "wb", buffering=0)  # noqa: SIM115
        process = subprocess.Popen(
            self.command(name, box), stdout=log, stderr=subprocess.STDOUT, env=self.environment(),
            start_new_session=True, cwd=ROOT,
        )  # fmt: skip
        now = time.monotonic()
        self.alive[name] = Running(name, process, now, now + box, log)
        return self.alive[name]

    def environment(self) -> dict[str, str]:
        """A stage's: the checkout's modules, and no ops compiled where that failed or in a
        rehearsal (CXX names no compiler: torch's fused AdamW)."""
        paths = [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        built = self.results.get("ops", {}).get("status", "passed") == "passed"
        if self.args.rehearse or not built:
            found["CXX"] = "none"
        if self.args.rehearse:
            found |= {"OMP_NUM_THREADS": "1"}
        return found

    def finish(self, running: Running) -> None:
        """Wait for a stage, or end it with all that it has started when its time is over."""
        name, process, late = running.name, running.process, False
        try:
            process.wait(max(0.0, running.ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
        end_group(process)  # children that it has left, too
        code = process.wait()
        del self.alive[name]
        running.log.close()
        text = (self.folder / f"{name}.log").read_bytes()
        self.log.write(b"== %s\n%s\n" % (name.encode(), text))
        path = self.folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if late:
            found["status"] = f"failed: not done within {running.ends - running.begun:.0f} s"
        elif "status" not in found:
            last = (text.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
            found["status"] = f"failed: exit code {code}: {last[:300]}"
        found["seconds"] = round(time.monotonic() - running.begun, 1)
        self.keep(name, found)

    def end_beside(self) -> None:
        """Wait for the stages that run beside each other, those that end first before others."""
        while self.beside:
            ended = [r for r in self.beside if r.process.poll() is not None]
            late = [r for r in self.beside if time.monotonic() >= r.ends]
            for running in {id(r): r for r in ended + late}.values():
                self.beside.remove(running)
                self.finish(running)
            time.sleep(0.05)

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Note a stage's end, and write everything known so far."""
        self.results[name] = found
        write_json(self.folder / f"{name}.json", found)
        print(f"   {name}: {found['status']} ({found.get('seconds', 0)} s)", flush=True)
        result = self.result()
        write_json(self.folder / "result.json", result | {"results": self.results})
        write_atomic(self.folder / "page.md", page(result | {"results": self.results}))

    def result(self) -> dict[str, Any]:
        """The last line: device, what became of each stage, where the rest is."""
        heads = [found for found in self.results.values() if DEVICE in found]
        keys = (DEVICE, "capability", "memory_gb", "cores", "python", "torch", "null")
        head = {key: heads[0][key] for key in keys if heads and key in heads[0]}
        return {
            DEVICE: None,
            **head,
            "rehearsal": self.args.rehearse,
            "date": self.begun,
            "stages": {name: found["status"] for name, found in self.results.items()},
            "seconds": round(self.args.budget - (self.ends - time.monotonic()), 1),
            "output": str(self.folder),
        }


def end_group(process: subprocess.Popen) -> None:
    """Kill a process that leads a group, and the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_stages(args: argparse.Namespace) -> int:
    """Run stages in this process (as a rule one) and write what each found with its status."""
    device = "cuda" if has_cuda() else "cpu"
    if device == "cpu":  # the kernels then run under Triton's interpreter, asked for before import
        os.environ |= {"RELAXMIM_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "1"}
    else:
        os.environ["RELAXMIM_TEST_DEVICE"] = "cuda"
        os.environ.pop("TRITON_INTERPRET", None)
    import null_gpu
    import torch
    from gpu_stages import Where, become
    from gpu_stages.common import facts

    if null_gpu.here():  # it has no cuDNN
        torch.backends.cudnn.enabled = False
    for stage in args.stage:
        where = Where(
            device, args.rehearse, args.output, stage, args.mae, args.batch, BEGUN + args.box,
            facts(device),
        )  # fmt: skip
        where.note({})
        found = become(where)
        where.note(where.found(stage) | found)
    return 0


def has_cuda() -> bool:
    """Whether torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build/gpu-check", metavar="FOLDER")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, smallest sizes")
    parser.add_argument("--mae", type=Path, help="a checkout of facebookresearch/mae")
    parser.add_argument("--batch", type=int, default=128, help="images of a step that is timed")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of all stages (470; rehearsing 3600)"
    )
    parser.add_argument("--limit", type=float, default=0, metavar="SECONDS",
                        help="of each stage, in place of its own")  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=list(BOXES), default=list(BOXES))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put --output's page into FILE")
    parser.add_argument("--stage", nargs="+", choices=list(BOXES), help=argparse.SUPPRESS)
    parser.add_argument("--box", type=float, default=600, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.mae and not (args.mae / "models_mae.py").is_file():
        parser.error(f"--mae {args.mae}: has no models_mae.py; give a checkout of "
                     "github.com/facebookresearch/mae")  # fmt: skip
    args.budget = args.budget or (3600 if args.rehearse else 470)
    args.mae = args.mae.resolve() if args.mae else None
    return args


BEGUN = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """Run the check; its exit code."""
    for name in LAUNCHER:
        os.environ.pop(name, None)
    args = parse_args(argv)
    if args.write:
        named = args.output.suffix == ".json"
        return write_into(args.write, args.output if named else args.output / "result.json")
    if args.stage:
        return run_stages(args)
    if not args.rehearse and subprocess.run([sys.executable, "-c", SEES_CUDA]).returncode:
        print("error: gpu-check measures on a CUDA device, and there is none here; make gpu-check "
              "REHEARSE=1 runs the same on the CPU, without figures", file=sys.stderr)  # fmt: skip
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = Check(args, args.stages).run()
    print(json.dumps(result), flush=True)
    return int(any(status.startswith("failed") for status in result["stages"].values()))


SEES_CUDA = "import sys, torch; sys.exit(not torch.cuda.is_available())"

if __name__ == "__main__":
    sys.exit(main())

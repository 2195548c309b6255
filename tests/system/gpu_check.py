"""One command that settles in minutes what only a GPU can tell. `make gpu-check`.

    python tests/system/gpu_check.py [--output build/gpu-check] [--mae CHECKOUT] [--rehearse]
    python tests/system/gpu_check.py --write docs/gpu.md [--output build/gpu-check | RESULT.json]

Runs the stages of gpu_stages, each in a process of its own with a time box, within --budget
seconds together. After every stage its result, result.json and page.md are in --output, and all
that the stages print is in log.txt there; a stage that fails or hangs does not stop the others.
--rehearse: on the CPU, smallest sizes, figures that mean nothing. --write: put the page of a
finished check into a document. Exit code 0 where no stage failed, 1 where one did, 2 without a GPU,
128 and its number for a signal that ended the check. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(HERE), str(HERE.parent / "helpers"), str(HERE.parent / "bench")]
sys.path[:0] = PATHS

from gpu_page import page, write_into

from pipeline.errors import UserError, check_range, refuse
from shard_tools.atomic import write_atomic, write_json

# Names, time boxes and order, without what the stages import (gpu_stages.STAGES holds to it):
# seconds on a GPU within BUDGET, and whether others run beside it. What is timed runs alone.
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
BUDGET = 470  # seconds of all
LEAST = 5  # seconds under which a stage is not begun
KILLED = 10  # seconds in which a killed process ends, unless the driver holds it
DEVICE = "device"
LOCK = "gpu-check.lock"  # in the folder of a check
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
        self.lock = claim(self.folder)
        for old in (*self.folder.glob("*.json"), *self.folder.glob("*.md")):
            old.unlink()  # an earlier check's
        for old in ("run", "data", "many", "pretrain", "eval", "eval-data"):
            shutil.rmtree(self.folder / old, ignore_errors=True)
        self.log = open(self.folder / "log.txt", "wb", buffering=0)  # noqa: SIM115

    def run(self) -> int:
        """Every stage in order, then the result on the last line; the exit code. Whatever ends it
        ends the stages that run."""
        stopped = 0
        try:
            self.run_stages()
        except Stopped as signalled:
            stopped = 128 + signalled.number
            for name in self.stages:
                if name not in self.results:
                    told = {"status": f"failed: the check was ended by {signalled}"}
                    self.results[name] = self.found(name) | told
            self.write()
        finally:
            for running in self.alive.values():
                end_group(running.process)
        result = self.result()
        print(json.dumps(result), flush=True)
        failed = any(status.startswith("failed") for status in result["stages"].values())
        return stopped or int(failed)

    def run_stages(self) -> None:
        """Every stage in order."""
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

    def box(self, name: str) -> float:
        """Seconds that the stage may take now: a larger budget has larger boxes, for a node with
        slower cores."""
        larger = 10 if self.args.rehearse else max(1.0, self.args.budget / BUDGET)
        most = self.args.limit or BOXES[name][0] * larger
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
        try:
            code: int | None = process.wait(KILLED)
        except subprocess.TimeoutExpired:
            code = None
        del self.alive[name]
        running.log.close()
        text = (self.folder / f"{name}.log").read_bytes()
        self.log.write(b"== %s\n%s\n" % (name.encode(), text))
        found = self.found(name)
        if late:
            found["status"] = f"failed: not done within {running.ends - running.begun:.0f} s"
            if not (self.args.limit or self.args.rehearse):
                found["status"] += f" (--budget {1.5 * self.args.budget:.0f} gives it more)"
            if code is None:
                found["status"] += ", and cannot be killed: the driver holds it (dmesg)"
        elif "status" not in found:
            last = (text.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
            found["status"] = f"failed: {ending(code)}: {last[:300]}"
        found["seconds"] = round(time.monotonic() - running.begun, 1)
        self.keep(name, found)

    def found(self, name: str) -> dict[str, Any]:
        """What a stage has noted so far."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

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
        self.write()

    def write(self) -> None:
        """result.json and page.md; a page that cannot be made is said, and ends nothing."""
        everything = self.result() | {"results": self.results}
        write_json(self.folder / "result.json", everything)
        try:
            text = page(everything)
        except Exception:
            traceback.print_exc()
            text = "The page could not be made; result.json has the figures.\n"
        write_atomic(self.folder / "page.md", text)

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


def claim(folder: Path) -> Any:
    """The lock of a folder for one check alone, which empties it. UserError where another check
    runs there, or it holds files and was no check's."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = [folder / LOCK, folder / "page.md"]  # the second of a check before there was a lock
    if any(folder.iterdir()) and not any(mark.is_file() for mark in marks):
        raise UserError(
            f"--output {folder}: holds files that no gpu-check wrote, and a check empties its "
            "folder: give a new one"
        )
    lock = open(folder / LOCK, "ab")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--output {folder}: another gpu-check runs there; wait for it, or give another folder "
            "(two on one GPU measure each other)"
        ) from None
    except OSError:
        pass  # a file system without locks
    return lock


def ending(code: int | None) -> str:
    """How a process ended, by its return code."""
    if code is None or code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-code).name}"
    return f"ended by signal {-code}"


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
        "--budget", type=float, metavar="SECONDS", help=f"of all stages ({BUDGET}; rehearsing 3600)"
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
    try:
        check_range("--batch", args.batch, at_least=1)
        check_range("--budget", args.budget, above=0)
        check_range("--limit", args.limit, at_least=0)
    except UserError as error:
        parser.error(str(error))
    args.budget = args.budget or (3600 if args.rehearse else BUDGET)
    args.stages = list(dict.fromkeys(args.stages))
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
    if not args.rehearse and (why := why_no_cuda()):
        print(f"error: gpu-check measures on a CUDA device, and {why}; make gpu-check REHEARSE=1 "
              "runs the same on the CPU, without figures", file=sys.stderr)  # fmt: skip
        return 2
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # what compilers say
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        return Check(args, args.stages).run()
    except UserError as error:
        return refuse(error)
    except OSError as error:
        print(f"error: {error.filename or args.output}: cannot be written ({error.strerror})",
              file=sys.stderr)  # fmt: skip
        return 2


SEES_CUDA = """
import sys, torch
if not torch.cuda.is_available():
    from pipeline.gpu_errors import why_no_gpu
    print(why_no_gpu(torch) or "there is none here")
"""


def why_no_cuda() -> str:
    """Why nothing can be measured here; "" where torch finds a device."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}
    command = [sys.executable, "-W", "ignore", "-c", SEES_CUDA]
    done = subprocess.run(command, env=found, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or [ending(done.returncode)])[-1]
    if done.returncode:
        return f"torch cannot say whether there is one ({last})"
    return done.stdout.strip()


class Stopped(Exception):
    """A signal ends the check."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop(number: int, frame: object) -> None:
    """Raise Stopped, once."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main())

"""launch.sh in an environment of its own, and a rank that tells what it sees."""

import os
import subprocess
import sys
import time
from pathlib import Path

from signals import interruptible

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch.sh"
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# A rank that tells what it sees: environment, arguments, process number, the first signal.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
folder, plan = Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]
def tell(name, value):
    (folder / f".{name}").write_text(json.dumps(value))
    os.replace(folder / f".{name}", folder / name)
def stop(number, frame):
    tell(f"signal-{rank}", signal.Signals(number).name)
    if plan != "stubborn":
        os._exit(85)
if plan != "unprepared":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
tell(f"rank-{rank}", {"pid": os.getpid(), "env": dict(os.environ), "words": sys.argv[3:]})
if plan == "fail-1" and rank == "1":
    time.sleep(0.5)
    sys.exit(3)
while plan != "end":
    time.sleep(0.1)
"""


def start(*words, inside=(), **env):
    """launch.sh in an environment without a trace of another launcher. inside: what runs it."""
    foreign = ("SLURM", "PET_", "CUDA", "OMP_", "NCCL", "GLOO", "RELAXMIM", *NAMES)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    clean |= {"VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu"} | env
    with interruptible():
        return popen(words, clean, inside)


def popen(words, clean, inside=()):
    return subprocess.Popen(
        [*inside, LAUNCH, *map(str, words)], env=clean, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process, timeout=30):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for(condition, timeout=20):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)

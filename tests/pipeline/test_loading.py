"""Limits of a process that keep an import from its library are sentences."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.loading import limit_reached

ROOT = Path(__file__).resolve().parents[2]
MAPPED = "libtorch_cpu.so: failed to map segment from shared object"
EARLY = """
from pipeline.command import early
early(lambda: None, lambda args: None)
import torch
"""


@pytest.mark.parametrize("command", [["pipeline/pretrain.py"], ["-c", EARLY]])
def test_few_addresses_are_a_sentence(command, shards):
    limit = ["bash", "-c", 'ulimit -v 600000; exec "$@"', "bash", sys.executable, *command]
    options = (
        ["--data", shards / "train", "--recipe", "demo_mae", "--set", "batch_size=8"]
        if command[0] != "-c"
        else []
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*limit, *options], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: a process may have only 0.572 GiB of addresses here")
    assert done.stderr.count("\n") == 1


def test_few_addresses_are_named_by_the_doctor():
    limit = ["bash", "-c", 'ulimit -v 600000; exec "$@"', "bash"]
    command = [*limit, sys.executable, "-m", "pipeline.doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "0.572 GiB of addresses here (ulimit -v)" in done.stdout


@pytest.mark.parametrize(
    ("error", "limit", "said"),
    [
        (ImportError(MAPPED), 2**31, "only 2 GiB of addresses"),
        (MemoryError(), 2**31, "only 2 GiB of addresses"),
        (ImportError(MAPPED), resource.RLIM_INFINITY, ""),
        (ImportError(f"{MAPPED}: Operation not permitted"), 2**31, ""),  # a mount with noexec
        (ImportError("no module named x"), 2**31, ""),
        (OSError(24, "Too many open files"), resource.RLIM_INFINITY, "only 2048 files"),
    ],
)
def test_a_limit_is_no_other_fault(error, limit, said, monkeypatch):
    limits = {resource.RLIMIT_AS: limit, resource.RLIMIT_NOFILE: 2048}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], limit))
    assert (said in limit_reached(error)) if said else not limit_reached(error)
    outer = RuntimeError("an import failed")
    outer.__cause__ = error
    assert bool(limit_reached(outer)) == bool(said)

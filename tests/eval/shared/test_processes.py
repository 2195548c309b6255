"""Commands that run other commands, and how they end."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_helpers import on_two_ranks
from signals import interruptible

from eval.shared.command import run_command
from pipeline.distributed import Ranks

ROOT = Path(__file__).resolve().parents[3]
WAIT = """
import time
from eval.shared.command import run_command
from eval.shared.processes import stop_on_sigterm

def main():
    stop_on_sigterm()
    print("ready", flush=True)
    time.sleep(60)

run_command(main)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_command_with_a_sentence(name: str) -> None:
    command = [sys.executable, "-c", WAIT]
    pipe = subprocess.PIPE
    with interruptible():
        process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[name])
        _, errors = process.communicate(timeout=30)
    assert errors == f"error: stopped by {name}\n"
    assert process.returncode == 128 + signal.Signals[name]


CALL = """
import sys
from eval.shared.command import run_command
from eval.shared.processes import call, stop_on_sigterm

def main():
    stop_on_sigterm()
    call("a child", [sys.executable, "-c", sys.argv[1]], 1)

run_command(main)
"""
SAVES = """
import signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    print("saved after", signal.Signals(number).name, flush=True)
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_command_waits_for_what_its_child_saves(name: str) -> None:
    command, pipe = [sys.executable, "-c", CALL, SAVES], subprocess.PIPE
    with interruptible():
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
    with process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["\n", "== a child\n", "ready\n"]
        os.killpg(process.pid, signal.Signals[name])  # as a terminal does
        output, errors = process.communicate(timeout=30)
    assert output == "saved after SIGTERM\n"
    assert errors == f"error: stopped by {name}\n"
    assert process.returncode == 128 + signal.Signals[name]


def told_of_a_lost_rank(ranks: Ranks) -> None:
    if not ranks.first:
        os._exit(0)  # as a rank that is killed, without a word to the others
    said = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(said):
        run_command(lambda: ranks.agree(lambda: ranks.sum(torch.ones(1))))
    assert end.value.code == 1
    where = f"rank 0 on {socket.gethostname()}"
    assert said.getvalue() == f"error ({where}): lost contact with another rank\n"


def test_a_rank_that_loses_another_says_so_without_a_traceback():
    on_two_ranks(told_of_a_lost_rank)

"""Commands that run other commands, and how they end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from signals import interruptible

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

"""Commands that run other commands, and how they end."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
    # Where the suite runs in the background Ctrl-C is ignored, which the child would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        signal.signal(signal.SIGINT, before)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[name])
        _, errors = process.communicate(timeout=30)
    assert errors == f"error: stopped by {name}\n"
    assert process.returncode == 128 + signal.Signals[name]

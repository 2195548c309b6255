"""Ctrl-C while a command imports, works and trains."""

import os
import signal
import subprocess
import sys

import pytest
from signals import interruptible

from pipeline.distributed import StopSignal

COMMAND = """
import sys, time
from pipeline.command import early, run_main
def wait():
    print("ready", flush=True)
    time.sleep(60)
    return 0
early(lambda: None, lambda args: None)
wait() if sys.argv[1] == "imports" else run_main(wait)
"""


@pytest.mark.parametrize(
    ("when", "code", "said"),
    [("imports", -signal.SIGINT, ""), ("works", 130, "error: stopped by SIGINT\n")],
)
def test_ctrl_c_ends_a_command_without_a_traceback(when: str, code: int, said: str) -> None:
    command, pipe = [sys.executable, "-c", COMMAND, when], subprocess.PIPE
    with interruptible():
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, said)


@pytest.fixture
def handlers():
    """Those of this process, which stay as they were."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    with interruptible():
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_ctrl_c_is_noted_and_the_second_ends(handlers, capfd) -> None:
    with StopSignal() as stop:
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        assert "again: ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_handed_back_and_where_ignored_stays_so(handlers) -> None:
    with StopSignal():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN

"""Ctrl-C while a command imports, works and trains."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from signals import interruptible

from pipeline.distributed import StopSignal
from pipeline.errors import reader_left

ROOT = Path(__file__).resolve().parents[2]
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


COMMANDS = ["shard_tools/make_shards.py", "eval/knn.py", "pipeline/estimate.py"]


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_imports_what_it_needs_to_read_its_options(
    command: str, tmp_path: Path
) -> None:
    slow = "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
    for name in ("numpy", "yaml"):
        (tmp_path / f"{name}.py").write_text(slow)
    pipe, env = subprocess.PIPE, os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, ROOT / command, "--help"], stdout=pipe, stderr=pipe, text=True, env=env
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_an_import_elsewhere_leaves_ctrl_c_as_it_is() -> None:
    code = "import signal, pipeline; print(signal.getsignal(signal.SIGINT))"
    with interruptible():
        output = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert "default_int_handler" in output


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


def test_ctrl_c_is_handed_back(handlers) -> None:
    with StopSignal():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_nohup_ignores_stays_ignored(number: signal.Signals, handlers) -> None:
    signal.signal(number, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.name == "SIGTERM"  # the first
    assert signal.getsignal(number) is signal.SIG_IGN


def test_whether_a_reader_is_there(tmp_path) -> None:
    terminal, pipe = os.openpty(), os.pipe()
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    writers = (terminal[1], pipe[1], file)
    assert [reader_left(number) for number in writers] == [False, False, False]
    os.close(terminal[0])
    os.close(pipe[0])
    assert [reader_left(number) for number in writers] == [True, True, False]
    for number in writers:
        os.close(number)


LOG = """
from pipeline.progress import write_above
for line in range(3):
    write_above(f"line {line}")
    input()
"""


def test_lines_that_nobody_reads_end_no_training() -> None:
    command, pipe = [sys.executable, "-c", LOG], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert None not in (process.stdin, process.stdout, process.stderr)
        assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        process.stdin.write(b"\n" * 3)
        process.stdin.flush()
        assert process.stderr.read() == b""
    assert process.returncode == 0

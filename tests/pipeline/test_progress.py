"""The progress line: fits 80 columns, follows every step, and its time left settles."""

import fcntl
import itertools
import os
import pty
import random
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch

from pipeline.progress import Pace, clock, fit, progress, speed
from pipeline.runtime.engine import init_ranks
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.trackers import Trackers


def run(seconds, total, save_every=0, save_seconds=0.0, announced=True):
    """Pace over steps that take `seconds`; after each step (time left, what it will be)."""
    now, pace, left = 1000.0, Pace(1000.0), []
    ends = []
    for step, taken in enumerate(seconds, 1):
        now += taken
        saves = save_every and step % save_every == 0
        if saves and not announced:
            now += save_seconds
        pace.step(now)
        ends.append(now)
        left.append(pace.left(total - step))
        if saves and announced:
            now += save_seconds
            pace.pause(save_seconds)
    return [(got, ends[-1] - end) for got, end in zip(left, ends, strict=True)]


@pytest.mark.parametrize("announced", [True, False])
def test_the_time_left_settles(announced):
    """A first step that compiles for a minute, noise of a half, saving for 20 s."""
    draw = random.Random(0)
    seconds = [60.0] + [draw.uniform(0.5, 1.5) for _ in range(1999)]
    left = run(seconds, 2000, save_every=250, save_seconds=20.0, announced=announced)
    assert left[0][0] == pytest.approx(60 * 1999)  # all that is known then
    for got, true in left[20:250]:
        assert got == pytest.approx(true, rel=0.2)
    for got, true in left[500:-400]:
        assert got == pytest.approx(true, rel=0.1)
    jumps = [abs(b[0] - a[0]) / a[0] for a, b in itertools.pairwise(left[20:1500])]
    assert sorted(jumps)[-7] < 0.03  # but for the six saves


def test_it_follows_a_lasting_change():
    left = run([1.0] * 500 + [3.0] * 1000 + [20.0] * 500, 2000)
    assert left[490][0] == pytest.approx(1509)
    assert left[1000][0] == pytest.approx(999 * 3, rel=0.01)
    assert left[1900][0] == pytest.approx(99 * 20, rel=0.03)


def test_parts_are_left_out_by_rank_until_they_fit():
    parts = [(0, "step 1/9"), (3, "MFU 41.0%"), (0, "loss 0.5"), (2, ""), (3, "lr 1e-3")]
    assert fit(parts) == "step 1/9  MFU 41.0%  loss 0.5  lr 1e-3"
    assert fit(parts, 38) == "step 1/9  MFU 41.0%  loss 0.5"
    assert fit(parts, 39) == "step 1/9  MFU 41.0%  loss 0.5  lr 1e-3"
    assert fit(parts, 25) == "step 1/9  loss 0.5"
    assert fit([(0, "x" * 90)]) == "x" * 79


def test_words_for_time_and_speed():
    assert [clock(s) for s in (9, 7384, 86400 * 5 + 7384, float("inf"))] == [
        "0:00:09", "2:03:04", "5d 02:03", "?"
    ]  # fmt: skip
    assert [speed(s) for s in (3.444, 87.66, 99.97, 12345.6)] == [
        "3.44 images/s", "87.7 images/s", "100 images/s", "12346 images/s"
    ]  # fmt: skip


class Terminal:
    """stderr as a terminal of 80 columns; `rows` is what was drawn since the last look."""

    def __init__(self, monkeypatch):
        self._read, write = pty.openpty()
        os.set_blocking(self._read, False)
        self._stream = os.fdopen(write, "w", buffering=1)
        monkeypatch.setattr(sys, "stderr", self._stream)
        monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((80, 24)))

    def rows(self):
        time.sleep(0.01)
        try:
            text = os.read(self._read, 1 << 20).decode()
        except BlockingIOError:
            return []
        return [row.rstrip() for row in text.replace("\n", "\r").split("\r") if row.strip()]


def test_pretraining_draws_every_step_with_its_own_loss(monkeypatch, tmp_path):
    init_ranks()
    terminal = Terminal(monkeypatch)
    settings = {"first": 0, "total": 125_100, "images": 4096, "log_steps": 20}
    monitor = Monitor(tmp_path, rank=0, trackers=Trackers(), **settings)
    monitor.mfu = Known(0.4123)
    for step in range(45):
        for micro in (0.5, 0.25):
            monitor.add(torch.tensor(step + micro), {}, 0.5)
        values = {"lr": 1e-3, "epoch": 0.1, "bad_samples": 123_456, "nonfinite_steps": 12}
        monitor.step(step, values, torch.device("cpu"))
        drawn = terminal.rows()
        assert drawn[-1].startswith(f"step {step + 1}/125100  loss {step + 0.375:#.4g}  ")
        assert " images/s  MFU 41.2%  ETA " in drawn[-1]
        assert max(map(len, drawn)) < 80
    monitor.say("a word between")
    assert terminal.rows()[-1].startswith("step 45/")  # drawn again below it
    monitor.close()
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert '"mfu": 0.4123' in rows
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert "nonfinite_steps 12  wait 0%  lr 1.00e-03  epoch 0.10" in log[-2]


class Known:
    """An Mfu whose count is there."""

    problem = ""

    def __init__(self, share):
        self.share = share

    def of(self, images_per_second, sizes):
        return self.share

    def close(self):
        pass


def test_an_evaluation_has_speed_and_time_left(monkeypatch):
    terminal = Terminal(monkeypatch)
    items = progress([1, 2, 3, 4], "features of " + "long/" * 20, images=64)
    for number in items:
        if number > 1:
            drawn = terminal.rows()[-1]
            assert f"long/long/ {number - 1}/4  " in drawn
            assert " images/s  ETA 0:00:0" in drawn
            assert len(drawn) < 80


@pytest.mark.parametrize("columns", [0, 60])
def test_a_terminal_of_unknown_size_is_drawn_on(columns):
    """As `docker run -t` without a client gives: 0 columns."""
    lines = """
from pipeline.progress import StatusLine
from shard_tools.cli import progress
StatusLine().draw([(0, "step 3/9"), (1, "loss 0.5"), (2, "x" * 45)])
progress(9, "bar").close()
"""
    read, write = pty.openpty()
    fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 0, columns, 0, 0))
    subprocess.run([sys.executable, "-c", lines], stderr=write, check=True)
    drawn = os.read(read, 1 << 16).decode()
    os.close(write)
    os.close(read)
    assert "step 3/9  loss 0.5" in drawn
    assert ("xxx" in drawn) == (columns == 0)
    assert "0/9 [" in drawn


def test_nothing_is_drawn_where_nobody_watches(capsys):
    assert list(progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""

"""What a person watches: means over steps, files, TensorBoard, the state of the line."""

import json
import time

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.runtime.engine import init_ranks
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.trackers import Trackers

CPU = torch.device("cpu")


def monitor_of(output, rank=0, first=0, **settings):
    """A monitor with TensorBoard alone."""
    trackers = Trackers(("tensorboard",), output, first) if rank == 0 else Trackers()
    return Monitor(output, rank=rank, first=first, trackers=trackers, **settings)


@pytest.fixture
def alone():
    """One rank in its own process group."""
    return init_ranks()


def test_reports_are_means_and_reach_every_file(tmp_path, capsys, alone):
    monitor = monitor_of(tmp_path, rank=0, first=0, total=5, images=16, log_steps=2)
    read = []

    def norm():
        read.append(1)
        return 3.0

    for step in range(5):
        for micro in range(2):
            value = torch.tensor(float(10 * step + micro))
            monitor.add(value, {"similarity": value / 2}, share=0.5)
        monitor.waited(0.001)
        values = {"lr": 0.1 * step, "epoch": step / 5, "grad_norm": norm, "bad_samples": step}
        monitor.step(step, values, CPU)
    monitor.picture(5, torch.zeros(4, 6, 3, dtype=torch.uint8))
    monitor.close()

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 5]  # first and last are always reported
    assert [row["loss"] for row in rows] == pytest.approx([0.5, 10.5, 25.5, 40.5])
    assert [row["similarity"] for row in rows] == pytest.approx([0.25, 5.25, 12.75, 20.25])
    assert len(read) == 4  # what may synchronise is read only when reporting
    for row in rows:
        assert row["images_per_second"] > 0
        assert row["data_wait"] > 0
        assert row["memory_gb"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/5", "2/5", "4/5", "5/5"]
    assert "bad_samples 4" in lines[-1]
    assert "ETA 0:00:00" in lines[-1]
    assert max(map(len, lines)) < 80
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4
    assert Image.open(tmp_path / "pictures/step-00000005.png").size == (6, 4)

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss/loss", "loss/similarity", "optimizer/lr", "optimizer/grad_norm",
            "speed/images_per_second", "speed/data_wait", "speed/memory_gb"} <= set(
        board.Tags()["scalars"]
    )  # fmt: skip
    assert [e.value for e in board.Scalars("loss/loss")] == pytest.approx([0.5, 10.5, 25.5, 40.5])
    assert board.Tags()["images"] == ["pictures/views"]


def test_other_ranks_write_nothing(tmp_path, capsys, alone):
    monitor = monitor_of(tmp_path / "run", rank=1, first=0, total=1, images=4, log_steps=1)
    monitor.say("hello")
    monitor.add(torch.tensor(1.0), {}, 1.0)
    monitor.step(0, {"lr": 0.1, "epoch": 1.0}, CPU)
    monitor.picture(1, torch.zeros(2, 2, 3, dtype=torch.uint8))
    monitor.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_time_spent_on_saving_is_not_counted_as_training(tmp_path, alone, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pipeline.runtime.monitor.time.perf_counter", lambda: now[0])
    monitor = monitor_of(tmp_path, rank=0, first=0, total=1, images=50, log_steps=1)
    monitor.add(torch.tensor(1.0), {}, 1.0)
    with monitor.paused():
        now[0] += 30  # a checkpoint
    now[0] += 2  # a step
    row = monitor.step(0, {"lr": 0.1, "epoch": 1.0}, CPU)
    monitor.close()
    assert row["images_per_second"] == pytest.approx(25.0)


def test_a_resumed_run_drops_the_rows_after_its_checkpoint_and_a_cut_one(tmp_path, alone):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 4, "lo')
    monitor_of(tmp_path, rank=0, first=2, total=5, images=16, log_steps=1).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == rows[:2]


@pytest.mark.parametrize("first", [0, 2])
def test_no_curve_overlaps_or_has_a_gap_after_a_restart(first, tmp_path, alone):
    """A run of four steps, killed, and started again from its checkpoint, or from scratch."""
    for start, value in ((0, 1.0), (first, 2.0)):
        monitor = monitor_of(tmp_path, rank=0, first=start, total=6, images=16, log_steps=1)
        for step in range(start, 4):
            monitor.add(torch.tensor(value), {}, share=1.0)
            monitor.step(step, {"lr": 0.1, "epoch": 0.1}, CPU)
            monitor.probed(step + 1, {"probe/knn_top1": value})
            monitor.picture(step + 1, torch.zeros(2, 2, 3, dtype=torch.uint8))
        monitor.close()
        if value == 1.0:  # of a step that the second start does not reach
            (tmp_path / "pictures/step-00000005.png").write_bytes(b"")
            time.sleep(1.1)  # event files are read in the order of the second they were begun
    seen = [(step, 1.0 if step <= first else 2.0) for step in range(1, 5)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag in ("loss/loss", "probe/knn_top1"):
        assert [(e.step, e.value) for e in board.Scalars(tag)] == seen
    assert [e.step for e in board.Images("pictures/views")] == [1, 2, 3, 4]
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == seen
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert names == [f"step-{step:08d}.png" for step in range(1, 5)]


def test_a_path_that_is_no_utf8_is_logged_with_an_escape(tmp_path, alone):
    monitor = monitor_of(tmp_path, rank=0, first=0, total=5, images=16, log_steps=1)
    monitor.say("run: r\udce9n")
    monitor.close()
    assert (tmp_path / "log.txt").read_text().endswith(" run: r\\udce9n\n")


def test_logs_that_cannot_be_written_do_not_end_the_run(tmp_path, capsys, alone):
    monitor = monitor_of(tmp_path, rank=0, first=0, total=5, images=16, log_steps=1)
    full = open("/dev/full", "w")  # noqa: SIM115 (the monitor closes it)
    monitor._log = monitor._metrics = full
    monitor._files.append(full)
    for step in range(2):
        monitor.add(torch.tensor(1.0), {}, share=1.0)
        monitor.step(step, {"lr": 0.1, "epoch": 0.1}, CPU)
    monitor.close()
    assert capsys.readouterr().out.count("logs are incomplete") == 1

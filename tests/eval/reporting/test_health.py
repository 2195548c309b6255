"""A run's status and health: each check turns at its threshold, each way to end has its name."""

import errno
import fcntl
import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml

from eval.reporting.health import BAD, GOOD, LOOK, UNKNOWN, check_run, overall
from eval.reporting.overview import card, cards, duration
from eval.reporting.run_records import group_runs, read_run
from eval.reporting.run_status import RunStatus, probed, read_log, read_status

WELL = {
    "feature_std": 0.6, "positive": 0.7, "negative": 0.1, "grad_norm": 1.0, "nonfinite_steps": 0,
    "bad_samples": 0, "data_wait": 0.02, "images_per_second": 100.0,
}  # fmt: skip


def write_run(folder, rows=20, recipe="cmae", log=(), **changed):
    """A run folder whose logged values are WELL, or functions of the row 0 … rows - 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": recipe}))
    values = WELL | {"loss": lambda n: 5.0 - 0.1 * n} | changed
    with (folder / "metrics.jsonl").open("w") as file:
        for n in range(rows):
            row = {k: v(n) if callable(v) else v for k, v in values.items()}
            row = {k: v for k, v in row.items() if v is not None}
            file.write(json.dumps({"step": 10 * (n + 1)} | row) + "\n")
    if log:
        (folder / "log.txt").write_text("".join(f"{line}\n" for line in log))
    return folder


def verdicts(folder):
    return {check.name: check.verdict for check in check_run(read_run(folder))}


def test_a_run_that_is_well(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    found = check_run(run)
    assert {check.verdict for check in found} == {GOOD}
    assert overall(found) == GOOD
    assert [check.name for check in found] == [
        "loss falls", "features do not collapse", "positives above negatives",
        "gradient norm is steady", "no skipped steps", "every image decodes", "data is in time",
    ]  # fmt: skip
    # The rules name their thresholds; the findings the numbers.
    assert found[0].found == "4.8 → 3.2"  # medians of rows 1-3 and 17-19, 5 - 0.1 n
    assert all(any(c.isdigit() for c in check.rule + check.found) for check in found)


@pytest.mark.parametrize(
    ("name", "changed", "verdict"),
    [
        ("loss falls", {"loss": lambda n: 5.0 - 0.01 * n}, GOOD),  # 0.15 of 4.975: 3 %
        ("loss falls", {"loss": lambda n: 5.0 - 0.005 * n}, LOOK),  # 1.5 %
        ("loss falls", {"loss": 5.0}, LOOK),
        ("loss falls", {"loss": lambda n: 5.0 + 0.1 * n}, BAD),
        ("loss falls", {"loss": lambda n: None if n == 7 else 5.0 - 0.1 * n}, LOOK),
        ("loss falls", {"loss": lambda n: None if n == 19 else 5.0 - 0.1 * n}, BAD),
        # falls by 1 up to the middle, then rises by 0.1 or by 0.5 of it
        ("loss falls", {"loss": lambda n: 5 - min(n, 10) / 10 + max(n - 10, 0) / 90}, GOOD),
        ("loss falls", {"loss": lambda n: 5 - min(n, 10) / 10 + max(n - 10, 0) / 18}, LOOK),
        ("features do not collapse", {"feature_std": 0.26}, GOOD),
        ("features do not collapse", {"feature_std": 0.24}, LOOK),
        ("features do not collapse", {"feature_std": 0.09}, BAD),
        ("features do not collapse", {"feature_std": lambda n: 0.8 if n < 10 else 0.05}, BAD),
        ("features do not collapse", {"feature_std": None}, UNKNOWN),
        ("positives above negatives", {"positive": 0.16}, GOOD),
        ("positives above negatives", {"positive": 0.14}, LOOK),
        ("positives above negatives", {"positive": 0.09}, BAD),
        ("gradient norm is steady", {"grad_norm": lambda n: 9.0 if n == 15 else 1.0}, GOOD),
        ("gradient norm is steady", {"grad_norm": lambda n: 11.0 if n == 15 else 1.0}, LOOK),
        ("gradient norm is steady", {"grad_norm": lambda n: 11.0 if n == 3 else 1.0}, GOOD),
        ("gradient norm is steady", {"grad_norm": lambda n: None if n == 15 else 1.0}, LOOK),
        ("gradient norm is steady", {"grad_norm": lambda n: None if n == 19 else 1.0}, BAD),
        ("gradient norm is steady", {"grad_norm": 1e-7}, BAD),
        ("no skipped steps", {"nonfinite_steps": lambda n: 2 * (n > 5)}, LOOK),  # of 200: 1 %
        ("no skipped steps", {"nonfinite_steps": lambda n: 3 * (n > 5)}, BAD),
        ("every image decodes", {"bad_samples": lambda n: n // 19}, LOOK),
        ("data is in time", {"data_wait": 0.09}, GOOD),
        ("data is in time", {"data_wait": 0.11}, LOOK),
        ("data is in time", {"data_wait": 0.31}, BAD),
        ("data is in time", {"data_wait": lambda n: 0.9 if n == 0 else 0.02}, GOOD),  # start-up
    ],
)
def test_each_check_turns_at_its_threshold(name, changed, verdict, tmp_path):
    found = verdicts(write_run(tmp_path / "run", **changed))
    assert found.pop(name) == verdict
    assert set(found.values()) == {GOOD}


def test_a_measure_without_negatives_has_no_such_check(tmp_path):
    assert "positives above negatives" not in verdicts(write_run(tmp_path / "r", negative=None))


def test_too_few_rows_are_no_verdict(tmp_path):
    assert verdicts(write_run(tmp_path / "run", rows=4))["loss falls"] == UNKNOWN
    empty = write_run(tmp_path / "empty", rows=0)
    assert overall(check_run(read_run(empty))) == UNKNOWN


# ------------------------------------------------------------------ status

START = datetime(2026, 1, 2, 3, 4, 5)


def line(seconds, text):
    return f"{START + timedelta(seconds=seconds)} {text}"


BEGUN = [line(0, "run: runs/x (cmae, vit)"), line(1, "step 1/100  epoch 0.01  loss 5.0  lr 0")]


@pytest.mark.parametrize(
    ("more", "failure", "state", "reason"),
    [
        ([line(60, "step 100/100  epoch 1"), line(61, "done: step 100; encoder in x")], "",
         "finished", ""),
        ([line(60, "step 50/100  epoch 1"), line(61, "done: step 50; encoder in x")], "",
         "finished", "at step 50 of 100"),
        ([line(60, "stopped by SIGTERM: saved at step 40 of 100")], "",
         "preempted", "by SIGTERM, saved at step 40 of 100"),
        ([line(60, "step 30/100  epoch 1")], "rank 1 on a, step 31: disk full\n",
         "failed", "rank 1 on a, step 31: disk full"),
        ([line(60, "step 30/100  epoch 1")], "", "cut off", "after step 30 of 100"),
        # finished, but started again since and cut off
        ([line(60, "done: step 100; x"), line(90, "run: runs/x (cmae, vit)"),
          line(95, "step 20/200  epoch 1")], "", "cut off", "after step 20 of 200"),
    ],
)  # fmt: skip
def test_every_end_has_its_name(more, failure, state, reason, tmp_path):
    folder = write_run(tmp_path / "run", log=[*BEGUN, *more])
    if failure:
        (folder / "failure.txt").write_text(failure)
    status = read_status(folder)
    assert status.state == state
    assert reason in status.reason
    assert status.started == START


def test_pauses_between_starts_do_not_count(tmp_path):
    log = [
        *BEGUN, line(100, "stopped by SIGTERM: saved at step 40 of 100"),
        line(5000, "previous run failed: x"), line(5000, "run: runs/x (cmae, vit)"),
        line(5030, "step 100/100  epoch 1"),
    ]  # fmt: skip
    status = read_status(write_run(tmp_path / "run", log=log))
    assert (status.seconds, status.starts, status.step, status.total) == (130, 2, 100, 100)


def test_a_held_lock_is_a_running_run_and_is_left_alone(tmp_path):
    """Another process holds it, as pretraining does; asking does not take or free it."""
    folder = write_run(tmp_path / "run", log=BEGUN)
    (folder / "lock").write_text("process 1 on here")
    assert read_status(folder).state == "cut off"
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / "lock")], stdin=-1, stdout=-1, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        soon, late = (START + timedelta(seconds=1 + s) for s in (599, 3600))
        status = read_status(folder, soon)
        assert (status.state, status.reason, status.silent) == ("running", "", False)
        late_status = read_status(folder, late)
        assert late_status.silent
        assert "for 60 minutes" in late_status.reason
        with (folder / "lock").open("a+") as other, pytest.raises(BlockingIOError):
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        child.stdin.close()
        child.wait(10)
    assert read_status(folder).state == "cut off"


def test_without_locks_the_newest_line_decides(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", log=BEGUN)
    (folder / "lock").touch()

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert read_status(folder, START + timedelta(seconds=601)).state == "running"
    assert read_status(folder, START + timedelta(seconds=602)).state == "cut off"
    (folder / "failure.txt").write_text("rank 0: boom")
    assert read_status(folder, START + timedelta(seconds=2)).state == "failed"


def test_a_folder_without_a_log(tmp_path):
    assert read_status(write_run(tmp_path / "run")).state == "unknown"
    (tmp_path / "run/failure.txt").write_text("rank 0: no data")
    assert read_status(tmp_path / "run").reason == "rank 0: no data"


def test_probes_are_read_from_the_log(tmp_path):
    log = [
        *BEGUN,
        line(5, "step 10: probe/knn_top1 12.5  occlusion/cka_0.5 0.75"),
        line(6, "step 20: probe/knn_top1 20"),
        line(9, "step 10: probe/knn_top1 13.5"),
        "2026-02-30 25:00:00 step 30: probe/knn_top1 1",  # as of a damaged file
    ]
    found = probed(read_log(write_run(tmp_path / "run", log=log)))
    assert found == {
        "probe/knn_top1": ([10.0, 20.0], [13.5, 20.0]), "occlusion/cka_0.5": ([10.0], [0.75]),
    }  # fmt: skip


# ------------------------------------------------------------------ card


def knn(folder, top1, **encoder):
    (folder / "eval").mkdir(exist_ok=True)
    name = "knn-random-0" if encoder else "knn"
    result = {"protocol": "knn", "top1": top1, "settings": {"k": 20}, "encoder": encoder}
    (folder / f"eval/{name}.json").write_text(json.dumps(result))


def test_a_duration_in_words():
    begun = datetime(2026, 1, 2)
    words = [duration(RunStatus("running", started=begun, seconds=s)) for s in (9, 69, 3669)]
    assert words == ["9 s", "1 min 09 s", "1 h 01 min"]
    assert duration(RunStatus("running", started=begun, seconds=9, starts=2)) == "9 s in 2 starts"


def test_the_card_says_results_against_random_and_what_is_wrong(tmp_path):
    log = [*BEGUN, line(200, "step 200/200  epoch 2"), line(201, "done: step 200; x")]
    folder = write_run(tmp_path / "run", log=log, data_wait=0.5)
    (folder / "versions.json").write_text(
        '{"device": "H100", "ranks": 8, "images": 1000, "data": "d/train", "precision": "bf16"}'
    )
    knn(folder, 40.0)
    knn(folder, 15.5, random=True, random_seed=0)
    groups = group_runs([read_run(folder)])
    (shown,) = cards(groups)
    assert shown.sentence == "Not healthy: look at “data is in time”."
    assert shown.state == "finished"
    assert shown.progress == 1.0
    (metric,) = shown.metrics
    assert (metric.title, metric.value) == ("k-NN", "40.0 %")
    assert metric.note == "+24.5 over random (15.5 %)"
    facts = dict(shown.facts)
    assert facts["device"] == "8 × H100"
    assert facts["duration"] == "3 min 21 s"
    assert facts["speed"] == "100 images/s"
    assert facts["started"] == "2026-01-02 03:04"
    assert facts["data"] == "1,000 images in d/train"


def test_a_failed_run_is_never_healthy(tmp_path):
    folder = write_run(tmp_path / "run", log=BEGUN)
    run = read_run(folder)
    assert card(run, group_runs([run])).sentence == "Worth a look: it was cut off."
    (folder / "failure.txt").write_text("rank 0: boom")
    shown = card(run, group_runs([run]))
    assert shown.sentence == "Not healthy: it failed."
    assert shown.reason == "rank 0: boom"
    assert Path(run.folder).name in shown.name

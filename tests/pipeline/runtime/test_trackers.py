"""Trackers: what each service receives, resuming, and what happens where one fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.recipe import RecipeError, load_recipe
from pipeline.errors import UserError
from pipeline.runtime import trackers
from pipeline.runtime.preflight import check_installed
from pipeline.runtime.trackers import Trackers, last_step

PIXELS = np.zeros((4, 6, 3), dtype=np.uint8)


class Recorder:
    """A tracker that keeps what it is told in a file, as a service with a run of its own would."""

    def __init__(self, output, first, settings):
        self.path = output / "told.jsonl"
        trackers._keep_run_id(output, "recorder", "a-run")
        self.tell("start", first, dict(settings))

    def tell(self, *words):
        with open(self.path, "a") as file:
            file.write(json.dumps(words) + "\n")

    def scalars(self, values, step):
        self.tell("scalars", step, dict(values))

    def picture(self, name, pixels, step):
        self.tell("picture", step, name, pixels.shape)

    def close(self):
        self.tell("close")


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What the recorder was told so far."""
    monkeypatch.setitem(trackers.TRACKERS, "recorder", Recorder)
    return lambda: [json.loads(line) for line in (tmp_path / "told.jsonl").open()]


def test_a_tracker_is_told_everything(told, tmp_path):
    opened = Trackers(("recorder",), tmp_path, 0, {"name": "mae"})
    opened.scalars({"loss/loss": 0.5}, 1)
    opened.picture("pictures/views", PIXELS, 1)
    opened.close()
    assert told() == [
        ["start", 0, {"name": "mae"}],
        ["scalars", 1, {"loss/loss": 0.5}],
        ["picture", 1, "pictures/views", [4, 6, 3]],
        ["close"],
    ]


def test_a_resumed_run_does_not_send_a_step_twice(told, tmp_path):
    """Killed after step 3 with a checkpoint of step 1, the steps 2 and 3 come again."""
    Trackers(("recorder",), tmp_path, 0).close()
    rows = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 4')
    resumed = Trackers(("recorder",), tmp_path, 1)
    for step in (2, 3, 4):
        resumed.scalars({"loss/loss": step}, step)
    assert [row[1] for row in told() if row[0] == "scalars"] == [4]
    assert last_step(tmp_path / "metrics.jsonl") == 3


def test_a_tracker_that_fails_costs_its_curves_only(told, tmp_path, monkeypatch, capsys):
    def lost(*_):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(Recorder, "picture", lost)
    opened = Trackers(("tensorboard", "recorder"), tmp_path, 0)
    opened.picture("pictures/views", PIXELS, 1)
    opened.scalars({"loss/loss": 0.5}, 2)
    opened.close()
    assert capsys.readouterr().out == "warning: recorder is incomplete: no route\n"
    assert [row[0] for row in told()] == ["start"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_full_disk_under_tensorboard_is_no_traceback_of_its_thread(tmp_path):
    code = (
        "import resource, signal, sys, time; from pathlib import Path\n"
        "from pipeline.runtime.trackers import Trackers\n"
        "opened = Trackers(['tensorboard'], Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for step in range(1, 500): opened.scalars({'loss/loss': 1.0}, step)\n"
        "opened.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout == "warning: tensorboard is incomplete: [Errno 27] File too large\n"


def test_a_full_disk_is_said_once(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers.TensorBoard, "scalars", full)
    opened = Trackers(("tensorboard",), tmp_path, 0)
    opened.scalars({}, 1)
    opened.scalars({}, 2)
    assert capsys.readouterr().out.count("warning: tensorboard is incomplete") == 1


def test_a_missing_package_is_a_sentence(monkeypatch):
    check_installed(["tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        check_installed(["tensorboard", "wandb"])
    assert str(error.value) == (
        "monitor.log_to: wandb is not installed: pip install wandb, or leave it out"
    )


def test_a_recipe_names_trackers():
    assert load_recipe("mae").monitor.log_to == ("tensorboard",)
    chosen = load_recipe("mae", ["monitor.log_to=[wandb, mlflow]"])
    assert chosen.monitor.log_to == ("wandb", "mlflow")
    with pytest.raises(RecipeError, match=r"monitor\.log_to"):
        load_recipe("mae", ["monitor.log_to=[wandbb]"])


SERVICE = """
import sys
from pathlib import Path
import numpy as np
from pipeline.runtime.trackers import Trackers
name, output = sys.argv[1], Path(sys.argv[2])
for first in (0, 2):
    opened = Trackers((name,), output, first, {"name": "mae", "optimizer": {"lr": 0.1}})
    for step in range(first + 1, first + 3):
        opened.scalars({"loss/loss": 1.0 / step, "speed/mfu": 0.25}, step)
    opened.picture("pictures/views", np.zeros((4, 6, 3), np.uint8), first + 2)
    opened.close()
"""


def use(name, output: Path, **environment):
    """Two starts of one run with a real service, in a process of their own."""
    env = os.environ | environment
    done = subprocess.run(
        [sys.executable, "-c", SERVICE, name, output], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return json.loads((output / "trackers.json").read_text())[name]


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    number = use("wandb", tmp_path, WANDB_MODE="offline")
    runs = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert runs
    assert {run.name.rpartition("-")[2] for run in runs} == {number}
    written = b"".join(f.read_bytes() for run in runs for f in run.glob("*.wandb"))
    for word in (b"loss/loss", b"speed/mfu", b"relaxmim", tmp_path.name.encode()):
        assert word in written


def test_wandb_without_a_key_is_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "online", "NETRC": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="wandb has no API key"):
        Trackers(("wandb",), tmp_path, 0)


def test_mlflow_in_a_file(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    number = use("mlflow", tmp_path, MLFLOW_TRACKING_URI=uri)
    client = mlflow.MlflowClient(uri)
    found = client.get_metric_history(number, "loss/loss")
    assert [(m.step, m.value) for m in found] == [(s, 1.0 / s) for s in (1, 2, 3, 4)]
    run = client.get_run(number)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"name": "mae", "optimizer.lr": "0.1"}

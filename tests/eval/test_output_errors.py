"""An output or input path that cannot be used is one sentence and exit code 2, in every command."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from eval_helpers import OPTIONS, coloured_images, command, write_encoder, write_shards
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_recipe

from eval import reconstruct
from eval.shared.checkpoints import Checkpoints
from eval.shared.classifier import write_classifier
from eval.shared.command import run_command
from eval.shared.results import check_output, write_result
from pipeline import estimate, export
from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError
from pipeline.method.objective import build_objective
from pipeline.runtime.checkpoint import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def below(tmp_path) -> Path:
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "out.json"


def test_a_result_that_cannot_be_written_is_named(below, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/file.*: cannot be written"):
        write_result(below, {"top1": 1.0})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        write_result(tmp_path / "folder", {"top1": 1.0})


def test_an_evaluation_keeps_out_of_the_folder_of_a_run(tmp_path):
    """runs/a.json beside the run runs/a, say: its checkpoints would have been mixed with a's."""
    run = tmp_path / "a"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    check_output(tmp_path / "a.json", tmp_path / "b")
    with pytest.raises(UserError, match=f"a.json: {run} is the folder of a run; choose another"):
        check_output(tmp_path / "a.json", run)
    meta = {"negatives_batch": 8}  # no settings: a pretraining's state
    CheckpointStore(tmp_path / "b", keep=1).save(3, write_nothing, meta)
    with pytest.raises(UserError, match=r"b.* holds the checkpoints of a pretraining"):
        Checkpoints(tmp_path / "b", {"epochs": 1}).load(lambda _: None)
    assert len(CheckpointStore(tmp_path / "b", keep=1).all()) == 1


def write_nothing(folder: Path) -> str:
    folder.mkdir(parents=True)
    return ""


def test_estimate_names_a_json_that_cannot_be_written(below, capsys):
    assert estimate.main(["--recipe", "demo_mae", "--json", str(below)]) == 2
    assert f"error: {below.parent}" in capsys.readouterr().err


def test_export_names_a_classifier_that_is_no_json(tmp_path, capsys):
    (tmp_path / "classifier.json").write_text("{")
    assert export.main([str(tmp_path), "--format", "run", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path}: no classifier" in capsys.readouterr().err


@pytest.fixture
def trained(tmp_path):
    """A run folder with the weights of a tiny model, as pretraining leaves it."""
    recipe = tiny_recipe("mae")
    objective, _ = build_objective(recipe)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    save_file(objective.state_dict(), run / "model.safetensors")
    return run


@pytest.mark.parametrize("kind", ["timm", "mae", "hf", "hf-mae"])
def test_export_names_an_output_that_cannot_be_written(kind, trained, below, capsys):
    name = {"timm": "x.safetensors", "mae": "x.pth"}.get(kind, "folder")
    assert export.main([str(trained), "--format", kind, str(below.parent / name)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {below.parent}")


def test_export_names_a_classifiers_output_that_cannot_be_written(below, tmp_path, capsys):
    info = {"arch": "vit_tiny_patch16_224", "options": {"img_size": 16}, "classes": ["a"]}
    info |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "classifier.json").write_text(json.dumps(info))
    save_file({"fc_norm.weight": torch.ones(2)}, tmp_path / "classifier.safetensors")
    assert export.main([str(tmp_path), "--format", "run", str(below)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {below.parent}")


def test_reconstruct_names_a_picture_that_cannot_be_written(trained, below, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    output = below.with_suffix(".png")
    done = command(reconstruct, "--encoder", str(trained), "--files", str(tmp_path / "a.png"),
                   "--output", str(output))  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {below.parent}")
    assert "Traceback" not in done.stderr


def test_a_classifier_that_cannot_be_written_is_named(below):
    vit = timm.create_model("vit_base_patch16_224", num_classes=2, **OPTIONS)
    with pytest.raises(UserError, match=f"{below.parent}.*: cannot be written"):
        write_classifier(below.parent / "classifier", vit.state_dict(), {}, ("a", "b"))


@pytest.mark.parametrize("script", ["knn", "linprobe", "finetune", "attentive"])
def test_training_shards_that_cannot_be_read_are_named(script, tmp_path):
    write_encoder(tmp_path / "run")
    val = write_shards(tmp_path / "val", *coloured_images(8, 2, seed=1))
    broken = tmp_path / "train"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    module = importlib.import_module(f"eval.{script}")
    for train in (broken, tmp_path / "nowhere"):
        done = command(module, "--encoder", str(tmp_path / "run"), "--train", str(train), "--val",
                       str(val))  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert str(train) in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_the_report_names_its_page_and_a_result_that_cannot_be_used(below, tmp_path):
    run = tmp_path / "run" / "eval"
    run.mkdir(parents=True)
    result = {"protocol": "knn", "top1": 50.0, "encoder": {"recipe": "other"}}
    (run / "knn.json").write_text(json.dumps(result))
    words = [sys.executable, ROOT / "eval/report.py", run.parent, "--output", below]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {below.parent}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("slip", [ValueError("shape"), TypeError("len"), OSError("ours")])
def test_a_slip_in_an_evaluation_is_not_the_users(slip, capsys):
    def broken():
        raise slip

    with pytest.raises(type(slip)):  # Python shows its traceback and exits with 1
        run_command(broken)
    assert capsys.readouterr().err == ""


def test_a_users_error_is_one_line_and_exit_2(capsys):
    def refused():
        raise UserError("x.json: not a result")

    with pytest.raises(SystemExit) as stop:
        run_command(refused)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: x.json: not a result\n"

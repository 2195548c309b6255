"""An output or input path that cannot be used is one sentence and exit code 2, in every command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.shared.cli import run_command
from eval.shared.results import write_result
from pipeline import estimate, export
from pipeline.errors import UserError

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


def test_estimate_names_a_json_that_cannot_be_written(below, capsys):
    assert estimate.main(["--recipe", "demo_mae", "--json", str(below)]) == 2
    assert f"error: {below.parent}" in capsys.readouterr().err


def test_export_names_a_classifier_that_is_no_json(tmp_path, capsys):
    (tmp_path / "classifier.json").write_text("{")
    assert export.main([str(tmp_path), "--format", "run", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path}: no classifier" in capsys.readouterr().err


def test_the_report_names_its_page_and_a_result_that_cannot_be_used(below, tmp_path):
    run = tmp_path / "run" / "eval"
    run.mkdir(parents=True)
    result = {"protocol": "knn", "top1": 50.0, "encoder": {"recipe": "other"}}
    (run / "knn.json").write_text(json.dumps(result))
    command = [sys.executable, ROOT / "eval/report.py", run.parent, "--output", below]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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

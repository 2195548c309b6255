"""A run's folder that is removed or moved away while the run writes to it."""

import contextlib
import shutil

import pytest
from eval_helpers import held_by_another
from tiny import tiny_overrides

from pipeline import pretrain
from pipeline.config.recipe import RECIPES
from pipeline.errors import UserError
from pipeline.runtime import loop
from pipeline.runtime.run_lock import RunLock, claim


def test_a_folder_that_was_removed_is_locked_again_unless_another_run_has_it(tmp_path):
    lock = RunLock(tmp_path / "run")
    assert not lock.keep()
    (tmp_path / "run").rename(tmp_path / "away")
    assert lock.keep()
    assert not lock.keep()
    (tmp_path / "run/lock").unlink()
    with held_by_another(tmp_path / "run"), pytest.raises(UserError, match="another run holds"):
        lock.keep()
    assert lock.keep()


@pytest.fixture
def five_steps(shards, tmp_path, monkeypatch):
    """Train five steps with a checkpoint every two, of which the first, and all else in the run's
    folder, is removed as soon as it is there; then call a function. The exit code."""

    def train(then=lambda: None):
        export, saved = loop.export, []

        def remove(*given):
            export(*given)
            if not saved:
                shutil.rmtree(tmp_path / "run")
                then()
            saved.append(given)

        monkeypatch.setattr(loop, "export", remove)
        words = ["--recipe", str(RECIPES / "mae.yaml"), "--ds_config", "ds_configs/zero0.json"]
        words += ["--data", str(shards / "train"), "--output", str(tmp_path / "run")]
        for key in (*tiny_overrides("mae"), "monitor.save_steps=2", "monitor.log_steps=1"):
            words += ["--set", key]
        return pretrain.main([*words, "--max-steps", "5"])

    monkeypatch.chdir(pretrain.ROOT)
    return train


def test_a_folder_that_is_removed_under_a_run_is_made_again(five_steps, tmp_path, capsys):
    assert five_steps() == 0
    assert capsys.readouterr().out.count("was removed or moved while this run wrote to it") == 1
    assert "done: step 5" in (tmp_path / "run/log.txt").read_text()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1
    lock, newest = claim(tmp_path / "run", "auto")
    assert newest.name == "step-00000005"
    lock.release()


def test_a_run_does_not_save_into_a_folder_that_is_another_runs_by_now(
    five_steps, tmp_path, capsys
):
    folder = tmp_path / "run"
    with contextlib.ExitStack() as held:
        assert five_steps(lambda: held.enter_context(held_by_another(folder))) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {folder}: another run holds this folder (process ")
        assert said.count("\n") == 1
        assert [path.name for path in folder.iterdir()] == ["lock"]

"""Run folders: atomic files, the lock, whole and broken checkpoints, where to go on."""

import json
import os
import subprocess
import sys

import pytest
from tiny import tiny_recipe

from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError
from pipeline.runtime.run_folder import STATE, RunLock, claim, newest_checkpoint
from shard_tools.atomic import FILES, seal, verify


def fake_checkpoint(run, step, recipe):
    """A folder with the shape of a checkpoint (its weights are not read here)."""
    name = f"step-{step:08d}"
    place = run / "checkpoints" / f".{name}"
    place.mkdir(parents=True)
    (place / "weights.bin").write_bytes(os.urandom(100))
    (place / STATE).write_text(json.dumps({"step": step}))
    (place / "recipe.yaml").write_text(dump_recipe(recipe))
    seal(place, place.with_name(name))
    return place.with_name(name)


def test_a_folder_in_use_is_refused_and_names_the_holder(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time; from pathlib import Path; "
            "from pipeline.runtime.run_folder import RunLock; "
            "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)",
            tmp_path,
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match=f"another run holds this folder .process {holder.pid}"):
            RunLock(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    RunLock(tmp_path)  # free again, even after a kill


def test_where_to_go_on(tmp_path):
    recipe = tiny_recipe("mae")
    assert claim(tmp_path, recipe, "auto")[1] is None
    fake_checkpoint(tmp_path, 10, recipe)
    newest = fake_checkpoint(tmp_path, 200, recipe)
    assert claim(tmp_path, recipe, "auto")[1] == newest
    other = tmp_path / "other"
    assert claim(other, recipe, str(tmp_path))[1] == newest
    assert claim(other, recipe, str(newest))[1] == newest
    with pytest.raises(UserError, match="already holds a run"):
        claim(tmp_path, recipe, "none")
    with pytest.raises(UserError, match="no whole checkpoint"):
        claim(other, recipe, str(tmp_path / "nowhere"))


def test_a_checkpoint_of_another_recipe_is_refused_with_the_key(tmp_path):
    fake_checkpoint(tmp_path, 10, tiny_recipe("mae"))
    with pytest.raises(UserError, match=r"another recipe \(optimizer.base_lr: 0.00015 != 0.1\)"):
        claim(tmp_path, tiny_recipe("mae", "optimizer.base_lr=0.1"), "auto")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "list"])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(damage, tmp_path, capsys):
    recipe = tiny_recipe("mae")
    good = fake_checkpoint(tmp_path, 10, recipe)
    bad = fake_checkpoint(tmp_path, 20, recipe)
    weights = bad / "weights.bin"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[50] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (bad / FILES).write_text("{")
    with pytest.raises(UserError, match="step-00000020"):
        verify(bad)
    assert newest_checkpoint(tmp_path / "checkpoints") == good
    assert "step-00000020" in capsys.readouterr().out


def test_half_written_checkpoints_are_never_seen(tmp_path):
    place = fake_checkpoint(tmp_path, 10, tiny_recipe("mae"))
    place.rename(place.with_name(".step-00000020"))
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_a_start_removes_what_a_kill_left_and_points_latest_to_where_it_goes_on(tmp_path):
    recipe = tiny_recipe("mae")
    found = fake_checkpoint(tmp_path, 10, recipe)
    fake_checkpoint(tmp_path, 20, recipe).rename(tmp_path / "checkpoints/.step-00000020")
    for name in (".recipe.yaml.7.tmp", "checkpoints/.latest.7.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "checkpoints/latest").write_text("step-00000005\n")  # killed before it was written
    lock, place = claim(tmp_path, recipe, "auto")
    assert place == found
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000010\n"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []
    lock.release()


def test_a_child_does_not_keep_the_lock(tmp_path):
    """As a loader worker outlives a killed rank for some seconds."""
    code = (
        "import os, sys, time; from pathlib import Path; "
        "from pipeline.runtime.run_folder import RunLock; "
        "lock = RunLock(Path(sys.argv[1])); child = os.fork(); "
        "child or time.sleep(60); print(child, flush=True); os._exit(9)"
    )
    done = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    child = int(done.stdout.readline())
    done.wait()
    try:
        RunLock(tmp_path).release()
    finally:
        os.kill(child, 9)

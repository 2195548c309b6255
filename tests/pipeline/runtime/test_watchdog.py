"""Why a rank ended, and the watchdog: a stuck process says where it was and ends."""

import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from deepspeed.utils import groups
from tiny import tiny_recipe

from pipeline.config.planning import plan_recipe
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.watchdog import (
    FAILURE,
    FIRST_PATIENCE,
    STUCK,
    Watchdog,
    last_failure,
    note_failure,
)

START = (
    "import ctypes, sys, time; from pathlib import Path; "
    "from pipeline.runtime.watchdog import Watchdog; "
    "dog = Watchdog(0.4, 3, Path(sys.argv[1])); dog.note('step 7, waiting for data'); "
)


def run(code, folder):
    command = [sys.executable, "-c", START + code, folder]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_first_reason_stays_and_the_same_one_is_not_told_twice(tmp_path):
    assert note_failure(tmp_path, 1, "step 4", "no such shard")
    assert not note_failure(tmp_path, 0, "step 4", "no such shard")
    assert note_failure(tmp_path, 0, "step 4", "lost contact")
    line = last_failure(tmp_path)
    assert line.startswith("rank 1 on ")
    assert line.endswith(", step 4: no such shard")
    assert last_failure(tmp_path, clear=True) == line
    assert last_failure(tmp_path) == ""


def test_a_folder_that_cannot_be_written_hides_no_reason(tmp_path):
    assert note_failure(tmp_path / "gone", 0, "step 4", "no such shard")


def test_a_stuck_process_names_rank_and_step_and_shows_its_stack(tmp_path):
    done = run("time.sleep(30)", tmp_path)
    assert done.returncode == STUCK
    assert "error: rank 3, step 7, waiting for data: no progress for" in done.stdout
    assert 'File "<string>", line 1 in <module>' in done.stderr
    assert "step 7, waiting for data" in (tmp_path / FAILURE).read_text()


def test_a_call_that_holds_the_interpreter_is_ended_too(tmp_path):
    done = run("ctypes.PyDLL(None).sleep(30)", tmp_path)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 1 in <module>' in done.stderr


@pytest.mark.parametrize("seconds", [0, 0.4])
def test_progress_or_nothing_to_watch_keeps_it_quiet(seconds, tmp_path):
    dog = Watchdog(seconds, 0, tmp_path)
    for step in range(10 if seconds else 1):
        dog.note(f"step {step}")
        time.sleep(0.1)
    dog.close()
    assert last_failure(tmp_path) == ""


@pytest.mark.parametrize("seconds", [1000, 0])
def test_collectives_wait_longer_than_the_watchdog(seconds):
    ranks = init_ranks()
    before = [timeout(group) for group in (None, groups._clone_world_group())]
    objective, _ = build_objective(recipe := tiny_recipe("mae"))
    plan = plan_recipe({"watchdog_seconds": seconds}, recipe, ranks.world)
    Engine(objective, parameter_groups(objective), plan).destroy()
    for group, earlier in zip((None, groups._clone_world_group()), before, strict=True):
        found = timeout(group)
        assert found == (timedelta(seconds=2 * FIRST_PATIENCE * seconds) if seconds else earlier)
        assert not seconds or found > timedelta(seconds=FIRST_PATIENCE * seconds)


def timeout(group):
    group = group or torch.distributed.group.WORLD
    return group._get_backend(torch.device("cpu")).options._timeout

"""What a GPU waits for, and the micro-batch that its memory holds."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_recipe

from pipeline.config.planning import plan_recipe
from pipeline.cost.dry_run import meta_objective, scaled
from pipeline.cost.feeding import Feeding
from pipeline.cost.micro_batch import MARGIN, largest_that_fits
from pipeline.cost.zero import memory
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.runtime import micro_batch

STEP = Feeding(gpu=0.1, launches=1000, launch_ms=0.05, images=200, core_images=500, cores=8)


@pytest.mark.parametrize(
    ("change", "bound", "seconds"),
    [
        ({}, "GPU-bound", 0.1),
        ({"launch_ms": 0.2}, "host-bound", 0.2),
        ({"launches": 3000}, "host-bound", 0.15),
        ({"cores": 2}, "loader-bound", 0.2),
        ({"images": 1000}, "loader-bound", 0.25),
        ({"core_images": 100.0}, "loader-bound", 0.25),
    ],
)
def test_the_slowest_part_sets_the_pace(change, bound, seconds):
    feeding = replace(STEP, **change)
    assert feeding.bound == bound
    assert feeding.seconds == pytest.approx(seconds)


def test_with_the_cores_needed_the_loader_keeps_up_and_with_one_less_it_does_not():
    for change in ({}, {"launch_ms": 0.2}, {"images": 1000}, {"core_images": 90.0}):
        feeding = replace(STEP, **change)
        enough = replace(feeding, cores=feeding.cores_needed)
        assert enough.bound != "loader-bound"
        if feeding.cores_needed > 1:
            assert replace(feeding, cores=feeding.cores_needed - 1).bound == "loader-bound"
    assert replace(STEP, images=1).cores_needed == 1


def test_the_largest_that_fits_leaves_a_tenth_free():
    need = {64: 900, 32: 500, 16: 300}
    assert MARGIN == 0.1
    assert largest_that_fits(need, 1000) == 64
    assert largest_that_fits(need, 999) == 32
    assert largest_that_fits(need, 10) == 16  # the run will say that it is too much


@pytest.fixture(scope="module")
def room():
    """(recipe, plan, bytes of the micro-batch of 4 of 8)."""
    recipe = tiny_recipe("mae")
    plan = plan_recipe({"zero_optimization": {"stage": 2}}, recipe, 1)
    objective, teacher = meta_objective(recipe)
    work = scaled(recipe, "fp32", False, 1)(4)
    return recipe, plan, memory(objective, teacher, work, 2, 1, "fp32").total


def test_the_planner_is_asked_by_its_command(room):
    recipe, plan, bytes_of_4 = room
    most = int(bytes_of_4 / (1 - MARGIN))
    assert micro_batch.images_that_fit(plan, recipe, most + 1) == 4
    assert micro_batch.images_that_fit(plan, recipe, most - 1) == 2


def test_a_planner_that_fails_is_a_sentence(room, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batch, "ESTIMATE", tmp_path / "missing.py")
    with pytest.raises(UserError, match=r'per_gpu "auto": .*could not say what fits \(.*missing'):
        micro_batch.images_that_fit(room[1], room[0], 10**9)


def test_memory_decides_on_a_gpu_where_the_loss_takes_nothing_from_the_micro_batch(monkeypatch):
    asked = []
    monkeypatch.setattr(micro_batch, "device_memory", lambda device: 1000)
    monkeypatch.setattr(micro_batch, "images_that_fit", lambda *a: asked.append(a[2]) or 2)
    monkeypatch.setattr(torch, "tensor", lambda values, device: values[0])
    gpu = Ranks(0, 1, 0, torch.device("cuda", 0), 1)
    cpu = replace(gpu, device=torch.device("cpu"))
    mae, cmae = tiny_recipe("mae"), tiny_recipe("cmae")

    def micro(config, recipe, ranks):
        return micro_batch.plan_that_fits(config, recipe, ranks).micro_batch

    assert micro({}, mae, gpu) == 2
    assert micro({micro_batch.KEY: "auto"}, mae, gpu) == 2
    assert asked == [1000, 1000]
    assert micro({micro_batch.KEY: 4}, mae, gpu) == 4
    assert micro({}, mae, cpu) == 8
    assert micro({}, cmae, gpu) == 8
    byol = tiny_recipe("cmae", "measure.kind=byol", "measure.heads={batch_norm: true}")
    assert micro({}, byol, gpu) == 8
    assert len(asked) == 2

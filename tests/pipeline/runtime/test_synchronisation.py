"""A step makes the host wait for the device nowhere but where DeepSpeed itself does."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from kernels_testing import DEVICE, using
from launches import CountLaunches, CountReads, Transfers, move_to_fake_cuda
from tiny import METHODS, PATCH, images, tiny_recipe
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime.interpreter import GridExecutor

from eval.shared.processes import LAUNCHER
from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import RECIPES
from pipeline.distributed import close
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.method.views import make_views
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.trackers import Trackers


def test_the_counter_sees_what_makes_the_host_wait():
    x = torch.tensor([1.0, 0.0])
    with CountReads() as reads:
        x.sum().item()
        bool(x[0] > 0)
        x[x > 0]
    assert reads.count == 3


# Jitter is a kernel where there is a device; its reference on the CPU does read.
@pytest.mark.parametrize("name", ["mae", "rmae", "rmae_dagger", "cmae"])
def test_objective_teacher_and_monitor_read_nothing(name, tmp_path):
    recipe = tiny_recipe(name, "views.jitter.where=none")
    objective, teacher = build_objective(recipe)
    monitor = Monitor(
        tmp_path, rank=0, first=0, total=9, images=8, log_steps=5, trackers=Trackers()
    )
    image, sample = images(4), torch.arange(4)
    with CountReads() as reads:
        for _ in range(2):
            loss, terms = objective(image, sample, 0, teacher)
            loss.backward()
            monitor.add(loss, terms, 1.0)
            if teacher is not None:
                teacher.update(objective, 0.99)
    monitor.close()
    assert reads.count == 0


VARIANTS = {
    **{name: (name,) for name in METHODS},
    "mocov3": ("mocov3",),
    "mae cutmix": ("mae", "views.cutmix=0.5"),
    "rmae jitter": ("rmae", "views.jitter.where=visible"),
    "mae jitter whole": ("mae", "views.jitter.where=whole"),
    "cmae cutmix": ("cmae", "views.cutmix=0.5", "views.jitter.grayscale=0.2"),
}
DRAWN_BY_OPS = {  # of PyTorch, which are many
    "rmae_dagger block": ("rmae_dagger", "views.mask=block"),
    "mae predicted": ("mae", "views.predicted=0.5"),
}


@pytest.fixture
def launched(monkeypatch):
    """Kernels launched, and memory filled around them, which no dispatch mode sees."""
    count = {"kernels": 0}
    call, zeros = GridExecutor.__call__, torch.Tensor.new_zeros

    def launch(self, *args, **kwargs):
        count["kernels"] += 1
        return call(self, *args, **kwargs)

    def fill(self, *args, **kwargs):
        count["kernels"] += torch._C._len_torch_dispatch_stack() == 0  # else the mode sees it
        return zeros(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(torch.Tensor, "new_zeros", fill)
    return count


def views_of(variant):
    recipe = tiny_recipe(*(VARIANTS | DRAWN_BY_OPS)[variant])
    batch, sample = images(4), torch.arange(4)
    crop = images(4, seed=1) if recipe.views.second == "crop" else None
    return lambda epoch=0: make_views(
        batch, sample, recipe=recipe, epoch=epoch, patch=PATCH, crop=crop
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the interpreter's launches")
@pytest.mark.parametrize("variant", VARIANTS | DRAWN_BY_OPS)
def test_masks_jitter_and_cutmix_are_few_launches_without_a_wait(variant, launched):
    draw = views_of(variant)
    with using("triton"):
        draw()  # fills the tables that are kept
        launched["kernels"] = 0
        with CountLaunches() as seen:
            draw()
    assert seen.count == 0
    assert seen.numbers == 0
    if variant not in DRAWN_BY_OPS:
        assert seen.launches + launched["kernels"] <= 12, (seen.launches, launched)


@pytest.mark.parametrize("variant", VARIANTS | DRAWN_BY_OPS)
def test_what_is_recorded_draws_for_the_epoch_that_it_is_given(variant):
    """As a CUDA graph is replayed: ops recorded in one epoch and run in another, on the device's
    number; a number of Python's would be that of the recording."""
    draw = views_of(variant)

    def tensors(epoch):
        views = draw(epoch)
        found = [*views.first, *(views.second or ()), views.target, views.region, views.weight]
        return [tensor for tensor in found if tensor is not None]

    with using("triton"):
        replay = make_fx(tensors)(torch.tensor(0, device=DEVICE))
        drawn = replay(torch.tensor(2**31 + 1, device=DEVICE))
        assert all(map(torch.equal, drawn, tensors(2**31 + 1)))
        assert not all(map(torch.equal, drawn, tensors(0)))


BUNDLED = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "demo_size")


@functools.cache
def fake_gpu_works():
    """Whether fake tensors of a GPU can be indexed where there is none: not under torch 2.8."""
    with FakeTensorMode():
        try:
            torch.empty(2, device="cuda")[0]
        except RuntimeError:
            return False
    return True


def on_a_fake_gpu(name, implementation):
    """What a bundled recipe's forward pass and teacher carry between host and device: names of ops.
    A read of the device's data raises, since a fake device has none."""
    if not fake_gpu_works():
        pytest.skip("this torch asks the driver for a fake GPU")
    recipe = tiny_recipe(name)
    objective, teacher = build_objective(recipe)
    with using(implementation), FakeTensorMode():
        for module in filter(None, (objective, teacher)):
            move_to_fake_cuda(module)
        image = torch.empty(4, 16, 16, 3, dtype=torch.uint8, device="cuda")
        sample = torch.arange(4, device="cuda")
        crop = [image] if recipe.views.second == "crop" else []
        objective(image, sample, 0, teacher, *crop)  # fills the tables that are kept
        with Transfers() as seen:
            objective(image, sample, 0, teacher, *crop)
            if teacher is not None:
                teacher.update(objective, 0.99)
    return seen.names


@pytest.mark.skipif(DEVICE != "cpu", reason="of a fake device")
@pytest.mark.parametrize("name", BUNDLED)
def test_every_recipe_keeps_its_data_on_the_device(name):
    assert on_a_fake_gpu(name, "triton") == []


@pytest.mark.skipif(DEVICE != "cpu", reason="of a fake device")
def test_what_a_fake_gpu_shows_of_the_reference_kernels():
    """They copy mean and std in every step, and jitter asks which images it is for."""
    assert on_a_fake_gpu("mae", "reference") == ["lift_fresh", "_to_copy"] * 2
    with pytest.raises(DynamicOutputShapeException):
        on_a_fake_gpu("mocov3", "reference")


def reads_of(stage):
    """Reads of our engine's step under a ZeRO stage."""
    recipe = tiny_recipe("mae")
    objective, _ = build_objective(recipe)
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}}
    engine = Engine(objective, parameter_groups(objective), plan_recipe(config, recipe, 1))
    inputs = (images(8), torch.arange(8), 0)
    for _ in range(2):
        engine.micro_step(1e-3, *inputs)
    with CountReads() as reads:
        engine.micro_step(1e-3, *inputs)
    engine.destroy()
    return reads.count


def test_a_step_reads_one_number_under_every_stage():
    """The norm, which tells whether the gradient is finite."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER}  # ranks of its own
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 1, 1, 1]


if __name__ == "__main__":
    init_ranks()
    print(json.dumps([reads_of(stage) for stage in range(4)]))
    close()

"""The engine: ZeRO 0-3 against plain torch; Muon against plain loops."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from tiny import images, tiny_recipe

from pipeline.config.planning import plan_recipe
from pipeline.config.schedules import learning_rate
from pipeline.distributed import cannot_build, free_port
from pipeline.errors import UserError
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime import engine as engines
from pipeline.runtime.engine import init_ranks
from pipeline.runtime.optimizers import muon, optimizer_of

ROOT = Path(__file__).parents[3]
PORT = free_port()


def test_muon_is_refused_where_matrices_are_cut():
    recipe = tiny_recipe("mae", "optimizer.kind=muon")
    config = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match=r"muon does not work under ZeRO stage 3.*stage 2 or lower"):
        optimizer_of(plan_recipe(config, recipe, 1))
    for key in ("round_robin_gradients", "offload_optimizer", "cpu_offload", "parameter_alignment"):
        value = {"device": "cpu"} if key == "offload_optimizer" else True
        config = {"zero_optimization": {"stage": 2, key: value}}
        with pytest.raises(UserError, match=rf"without zero_optimization\.{key}"):
            muon.section(plan_recipe(config, recipe, 1))


def test_muon_makes_matrices_nearly_orthogonal():
    """Singular values of about 1 for any shape; sign and size of the input do not matter."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 24, 8), (1, 8, 24), (3, 16, 12)):
        x = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(muon.orthogonalise(x))
        assert values.min() > 0.5
        assert values.max() < 1.3
        torch.testing.assert_close(muon.orthogonalise(-7 * x), -muon.orthogonalise(x))


def test_muon_is_the_plain_loop_in_float64():
    """Five steps of given gradients: every parameter of the blocks, the decoder and the rest."""
    recipe = tiny_recipe("mae", "optimizer.kind=muon")
    pair = [build_objective(recipe)[0].double() for _ in range(2)]
    plan = plan_recipe({}, recipe, 1)
    ours = muon.build(pair[0], parameter_groups(pair[0]), plan)
    plain = oracle.Muon(pair[1], parameter_groups(pair[1]), recipe.optimizer.betas)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for group in (*ours.param_groups, *plain.param_groups):
            group["lr"] = 0.1 / (step + 1)
        for a, b in zip(*(o.parameters() for o in pair), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()
        ours.step()
        plain.step()
    for (name, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def plain_update(matrix):
    """0.2 sqrt(max(r, c)) times five steps of X ← a X + (b A + c A A) X, in numpy."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return 0.2 * max(matrix.shape) ** 0.5 * x


@pytest.mark.parametrize("world", [1, 3, 4])
def test_the_ranks_parts_of_a_step_are_those_of_whole_matrices(world, monkeypatch):
    """Weights one after another, one of three matrices, padded and cut anywhere: each rank has its
    part of what the matrices' own loop gives, and only decay in the padding."""
    shapes = [(3, 4, 5), (1, 8, 4), (1, 3, 7), (1, 2, 2)]
    whole = np.random.default_rng(0).standard_normal(60 + 32 + 21 + 4)
    padded = np.pad(whole, (0, -len(whole) % (2 * world) + 2 * world))
    expected, first = [], 0
    for count, rows, columns in shapes:
        for _ in range(count):
            last = first + rows * columns
            expected.append(plain_update(whole[first:last].reshape(rows, columns)).ravel())
            first = last
    expected = np.concatenate([*expected, np.zeros(len(padded) - first)]).reshape(world, -1)
    parts = torch.from_numpy(padded).view(world, -1)

    def gather(into, part):
        """Of the look-ahead of the first step: 0.05 g + 0.95 (0.05 g)."""
        for place, other in zip(into, parts, strict=True):
            place.copy_(0.0975 * other)
        torch.testing.assert_close(part, into[muon.dist.get_rank()])

    monkeypatch.setattr(muon.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(muon.dist, "all_gather", gather)
    for rank in range(world):
        monkeypatch.setattr(muon.dist, "get_rank", lambda rank=rank: rank)
        weight = torch.full_like(parts[rank], 2.0)
        weight.grad = parts[rank].clone()
        group = {"params": [weight], "shapes": shapes, "weight_decay": 0.3}
        optimizer = muon.Muon([group], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
        optimizer.step()
        by_hand = 2 * (1 - 0.1 * 0.3) - 0.1 * expected[rank]
        np.testing.assert_allclose(weight.numpy(), by_hand, rtol=1e-6)
        assert optimizer.state[weight]["step"] == 1


def plain_loop(method):
    """The same steps in plain torch, one process, the whole batch at once."""
    from zero_worker import BATCH, MICRO, STEPS, recipe_of

    recipe = recipe_of(method)
    objective, teacher = build_objective(recipe)
    groups = parameter_groups(objective)
    if method == "muon":
        optimizer = oracle.Muon(objective, groups, recipe.optimizer.betas)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.optimizer.betas, eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, 1, group)
        optimizer.zero_grad()
        image, sample = images(BATCH, seed=step), torch.arange(BATCH)
        total = 0.0
        if teacher is None:
            loss, _ = objective(image, sample, step)
            loss.backward()
            total = loss.item()
        else:  # negatives come from one micro-batch of both ranks
            for part in MICRO:
                loss, _ = objective(image[part], sample[part], step, teacher)
                (loss / 2).backward()
                total += loss.item() / 2
        norms.append(torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5).item())
        optimizer.step()
        if teacher is not None:
            teacher.update(objective, 0.9)
        losses.append(total)
    return losses, norms


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """This process as one rank, a folder of its checkpoints, and the losses of those runs."""
    import zero_worker

    ranks, folder = init_ranks(), tmp_path_factory.mktemp("one")
    losses = {
        f"{method}-{stage}": zero_worker.train(folder / f"{method}-{stage}", method, stage, ranks)[
            0
        ]
        for method, stages in zero_worker.ELASTIC.items()
        for stage in stages
    }
    return ranks, folder, losses


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, one_rank):
    """A folder of the checkpoints of two ranks, and their results."""
    output = tmp_path_factory.mktemp("two")
    command = [
        Path(sys.executable).parent / "deepspeed", "-q", "--num_accelerators", "2",
        "--master_port", str(PORT), ROOT / "tests/helpers/zero_worker.py", output, one_rank[1],
    ]  # fmt: skip
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of this process
    env = {k: v for k, v in os.environ.items() if k not in ranks}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output, json.loads((output / "results.json").read_text())


def test_ranks_leave_no_shared_memory(two_ranks):
    """Two ranks loaded DeepSpeed's all-reduce over shared memory, where there is a compiler."""
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{PORT}_*"))


@pytest.fixture(scope="module")
def zero_results(two_ranks):
    return two_ranks[1]


@pytest.mark.parametrize("method", ["rmae", "cmae", "muon"])
def test_every_zero_stage_follows_the_plain_loop(method, zero_results):
    losses, norms = plain_loop(method)
    assert losses[0] - losses[-1] > 0.01  # it trains, so that agreement means something
    runs = {k: v for k, v in zero_results.items() if k.startswith(method)}
    assert len(runs) == (4 if method == "rmae" else 3)
    for name, run in runs.items():
        # Newton-Schulz multiplies the rounding in small singular values by up to 3.4^5.
        exact = 1e-4 if method != "muon" else 3e-3
        assert run["losses"] == pytest.approx(losses, rel=exact, abs=1e-4), name
        assert not any(math.isnan(n) for n in run["norms"]), name
        assert run["norms"] == pytest.approx(norms, rel=10 * exact), name


def test_a_resumed_run_is_the_same_run_bit_for_bit(zero_results):
    for name, run in zero_results.items():
        assert run["again"] == run["losses"][3:], name
        assert run["same_weights"], name


def test_another_stage_or_number_of_ranks_goes_on(one_rank, two_ranks):
    """Same global batches from one checkpoint: only the order of sums differs."""
    import zero_worker

    (ranks, _, alone), (output, results) = one_rank, two_ranks
    for name, run in results.items():
        method, stage = name.split("-")
        undisturbed = pytest.approx(run["losses"][3:], rel=1e-4)
        assert alone[name] == pytest.approx(run["losses"], rel=1e-4), name
        assert run["from_one_rank"] == undisturbed, f"{name}: to two ranks under another stage"
        other = zero_worker.ELASTIC[method][int(stage)]
        losses, _, _ = zero_worker.go_on(output / name, method, other, ranks)
        assert losses == undisturbed, f"{name}: to one rank under stage {other}"


def test_a_step_that_is_not_finite_is_skipped_under_every_stage(zero_results):
    for name, run in zero_results.items():
        assert run["skipped"] == [True, False], name
        assert run["kept"], f"{name}: a skipped step changed the weights"
        assert run["finite"], name


def test_weights_are_whole_under_every_stage(zero_results):
    names = zero_results["rmae-0"]["names"]
    assert "encoder.pos_embed" in names
    for stage in (1, 2, 3):
        assert zero_results[f"rmae-{stage}"]["names"] == names


def test_deepspeed_on_the_cpu_beside_torch_on_a_gpu_is_a_sentence(monkeypatch):
    monkeypatch.setattr(engines, "device_of", lambda number: torch.device("cuda", number))
    with pytest.raises(UserError, match="DS_ACCELERATOR is cpu, but torch sees a GPU: unset"):
        init_ranks()


def test_ops_are_built_where_pythons_headers_are_and_set_up_has_not_failed(monkeypatch, tmp_path):
    ninja, header = tmp_path / "ninja", tmp_path / "Python.h"
    failed = tmp_path / "torch_extensions" / "failed"
    ninja.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert cannot_build()
    header.touch()
    assert not cannot_build()
    failed.parent.mkdir()
    failed.touch()
    assert cannot_build()
    failed.unlink()
    ninja.unlink()
    assert cannot_build()
    monkeypatch.setenv("CXX", "")
    assert cannot_build() == "there is no CXX (an empty text), ninja"


def test_offloading_to_nvme_without_libaio_is_a_sentence():
    with pytest.raises(UserError, match=r"offloads to nvme.*libaio-dev"), engines._refusals():
        raise RuntimeError("Unable to JIT load the async_io op due to it not being compatible")
    with pytest.raises(RuntimeError, match="another"), engines._refusals():
        raise RuntimeError("another fault")

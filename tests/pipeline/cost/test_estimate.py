"""The planner against what is measurable: a closed formula, a real step, DeepSpeed's memory."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import roofline
import torch
from launches import CountLaunches
from timm.models.vision_transformer import Block
from tiny import images, tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

from pipeline import estimate as plan
from pipeline.config.peaks import MEMORY, PEAKS
from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import RECIPES, load_recipe
from pipeline.cost.dry_run import (
    ATTENTION,
    KeptForBackward,
    Work,
    dry_run,
    flops_per_image,
    meta_objective,
    scaled,
)
from pipeline.cost.launches import LaunchCounter, measured_launch_ms
from pipeline.cost.micro_batch import PlanError, split
from pipeline.cost.options import CORE_IMAGES, PRECISIONS, UTILISATION
from pipeline.cost.stepping import Stepping
from pipeline.cost.zero import memory, shard, stage2_gradients, traffic
from pipeline.errors import UserError
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.optimizers import muon

ROOT = Path(__file__).parents[3]


def block(rows: int, keys: int, width: int, projected: int | None = None) -> int:
    """Multiply-adds of a ViT block's forward: q of `rows`, k and v of `projected` tokens."""
    projected = keys if projected is None else projected
    linear = width * width * (rows + 2 * projected) + rows * width * width * 9
    return linear + 2 * rows * keys * width


def mae_flops(second: bool = False) -> int:
    """FLOPs per image of a MAE step with ViT-B/16 (or of R-MAE's), by hand: thrice the forward,
    but only twice in the patch embedding, whose input needs no gradient."""
    total = 0
    for visible in (49, 147) if second else (49,):
        embed = visible * 768 * 768
        encoder = 12 * block(visible + 1, visible + 1, 768)
        # First block: q, k, v of the visible tokens; those of hidden places once per batch.
        first = block(197, 197, 512) - 3 * 512 * 512 * (196 - visible)
        middle = 6 * block(197, 197, 512)
        last = block(147, 197, 512)
        ends = (visible + 1) * 768 * 512 + 147 * 512 * 768
        total += 3 * (encoder + first + middle + last + ends) + 2 * embed
    return 2 * total


@pytest.mark.parametrize(("name", "second"), [("mae", False), ("rmae", True)])
def test_flops_are_those_of_the_closed_formula(name, second):
    work = dry_run(load_recipe(RECIPES / f"{name}.yaml"), 64, "bf16")
    assert work.flops / 64 == pytest.approx(mae_flops(second), rel=0.01)


def test_attention_costs_its_products_and_twice_as_much_backwards():
    """As torch counts them where they are written out: q k' and weights v, forward and backward."""
    q, k, v = (torch.randn(2, 3, n, 5, requires_grad=True) for n in (7, 4, 4))
    fused, plain = (FlopCounterMode(display=False, custom_mapping=ATTENTION) for _ in range(2))
    with fused:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert fused.get_total_flops() == 2 * (2 * 3 * 7 * 4 * 5) * 2
        out.sum().backward()
    with plain:
        ((q @ k.mT).softmax(-1) @ v).sum().backward()
    assert fused.get_total_flops() == plain.get_total_flops()


def test_what_is_kept_for_backward_by_hand():
    """Of two linears with a GELU between: the inputs of each, once; no weight."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    kept, x = KeptForBackward(net), torch.randn(5, 8)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        first = net(x)
        assert kept.bytes == 5 * (8 + 16 + 16) * 4
        second = net(x)  # which reads the same x
        assert kept.bytes == 5 * (8 + 2 * (16 + 16)) * 4
    (first + second).sum().backward()


def test_a_launch_takes_the_least_of_the_rounds(monkeypatch):
    """Rounds of 0.9, 0.3 and 0.5 seconds; the two counters differ in what they hold for free."""
    ticks = iter([0.0, 0.9, 1.0, 1.3, 2.0, 2.5])
    block, x = Block(8, 2), torch.zeros(1, 4, 8, requires_grad=True)
    with CountLaunches() as counted:
        block(x).sum().backward()
    monkeypatch.setattr("pipeline.cost.launches.time.perf_counter", lambda: next(ticks))
    assert measured_launch_ms(3) == pytest.approx(300 / counted.launches, rel=0.12)


def test_time_and_launches_of_a_step_by_hand(monkeypatch):
    """Two ranks with two micro-batches of two images each, on a GPU of 312e12 FLOP/s."""
    recipe = tiny_recipe("mae", "optimizer.epochs=3", "optimizer.warmup_epochs=1")
    options = ["--gpus", "2", "--micro-batch", "2", "--gpu", "a100", "--launch-ms", "0.25"]
    options += ["--utilisation", "0.000002", "--images", "800000"]
    planner = plan.make_planner(recipe, plan.parse_args(options))
    work = dry_run(recipe, 2, "autocast")
    gpu = 1e3 * 2 * work.flops / (312e12 * 2e-6)
    monkeypatch.setattr(plan, "make_planner", lambda recipe, args: replace(planner, args=args))
    for more, launches in ((["--no-graphs"], 2 * work.launches + 10), ([], 2 * 20 + 10)):
        made = plan.predict(recipe, plan.parse_args([*options, *more]))
        row = made["stages"][1]
        assert row["launches"] == launches
        assert row["gpu_ms"] == pytest.approx(gpu, rel=1e-4)
        assert row["host_ms"] == pytest.approx(0.25 * launches)
        assert row["step_ms"] == max(row["gpu_ms"], row["host_ms"], row["loader_ms"])
        assert made["flops_per_step"] == 2 * 2 * work.flops
        assert made["steps"] == 300_000
        for hours, part in (("gpu_bound_hours", "gpu_ms"), ("hours", "step_ms")):
            assert made[hours] == pytest.approx(300_000 * row[part] / 3.6e6, abs=0.006)
            assert made[hours] > 0.1


@pytest.mark.parametrize("name", ["mae", "rmae", "cmae"])
def test_the_dry_run_counts_what_a_real_step_does(name):
    recipe = tiny_recipe(name, "views.jitter.where=none")
    objective, teacher = build_objective(recipe)
    kept = KeptForBackward(objective)
    counting = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with counting as counter, CountLaunches() as launched:
        with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
            loss, _ = objective(images(6), torch.arange(6), 0, teacher)
        loss.backward()
    work = dry_run(recipe, 6, "fp32")
    assert work.flops == counter.get_total_flops()
    assert work.launches == pytest.approx(launched.launches, rel=0.03)  # without jitter
    assert work.activations == pytest.approx(kept.bytes, rel=0.01)
    assert work.keys == (6 * 16 * 12 * 4 if name == "cmae" else 0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mae", ()), ("cmae", ("measure.negatives=image",)), ("cmae", ("measure.negatives=all",)),
     ("cmae", ("measure.negatives=all", "encoder.masked_tokens=drop", "views.second=independent"))],
)  # fmt: skip
def test_any_micro_batch_is_what_a_dry_run_of_it_counts(name, changes):
    """Also where every image is compared with every other, a square of the micro-batch."""
    recipe = tiny_recipe(name, *changes)
    for precision, ranks in (("fp32", 1), ("autocast", 1), ("fp32", 3)):
        work = scaled(recipe, precision, False, ranks)
        for images_of in (3, 16):
            assert work(images_of) == dry_run(recipe, images_of, precision, ranks=ranks)


PAIRED = ("encoder.masked_tokens=drop", "views.second=independent")


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ((), 16 * 12 * 2),  # a key for each of 16 patches, in bf16
        (("measure.symmetric=true",), 2 * 16 * 12 * 2),
        (("measure.negatives=image",), 0),
        (("measure.kind=byol",), 0),
        (PAIRED, 16 * (12 * 4 + 1)),  # a place for each, normalised in fp32, and what is there
    ],
)
def test_only_keys_that_other_ranks_need_are_sent(changes, sent):
    assert dry_run(tiny_recipe("cmae", *changes), 4, "autocast").keys == 4 * sent


def test_negatives_of_all_ranks_are_counted():
    """Two products per query token and key token of another rank: cosines, gradient of a query."""
    for changes, tokens in (((), 16), (("measure.negatives=all",), 16 * 16)):
        one, four = (dry_run(tiny_recipe("cmae", *changes), 8, "fp32", ranks=n) for n in (1, 4))
        assert four.flops - one.flops == 2 * 2 * 12 * 8 * 24 * tokens
        assert four.activations == one.activations  # the gradient of a query is made in forward
    for changes in (("measure.negatives=image",), ("measure.kind=byol",)):
        one, four = (dry_run(tiny_recipe("cmae", *changes), 8, "fp32", ranks=n) for n in (1, 4))
        assert (four.flops, four.activations) == (one.flops, one.activations)
    # ViT-B, 8 ranks of 128 images: as much as half of all the rest, and again.
    recipe = load_recipe(RECIPES / "cmae.yaml", ["measure.negatives=all"])
    made = plan.predict(recipe, plan.parse_args(["--gpus", "8", "--launch-ms", "0.01"]))
    products = 2 * 2 * 768 * (1024 * 196) ** 2
    rest = 1024 * flops_per_image(load_recipe(RECIPES / "cmae.yaml"), 2, 1)
    assert made["flops_per_step"] == pytest.approx(products + rest, rel=0.01)
    printed = plan.flops_lines(recipe, plan.parse_args(["--flops"]))
    assert float(printed) * 1024 == pytest.approx(made["flops_per_step"], rel=1e-9)
    few = plan.flops_lines(recipe, plan.parse_args(["--flops", "--gpus", "1", "--micro-batch=2"]))
    assert float(few) * 1024 == pytest.approx(rest, rel=0.01)


@pytest.mark.parametrize(("negatives", "candidates"), [("position", 32), ("all", 32 * 16)])
def test_paired_positions_keep_the_keys_of_all_ranks(negatives, candidates):
    """Without mask tokens backward reads them: 3 ranks more, of 8 images with 16 patches, fp32."""
    keys = ("encoder.masked_tokens=drop", "views.second=independent")
    recipe = tiny_recipe("cmae", *keys, f"measure.negatives={negatives}", "measure.tokens=patch")
    one, four = (dry_run(recipe, 8, "fp32", ranks=n) for n in (1, 4))
    assert four.flops - one.flops == 2 * 2 * 12 * 8 * 16 * (candidates - candidates // 4)
    more = four.activations - one.activations
    assert more >= 3 * 8 * 16 * 12 * 4 + 8 * 16 * (candidates - candidates // 4) * 4


@pytest.mark.parametrize("name", ["mae", "rmae", "cmae"])
def test_the_roofline_counts_the_same_work(name):
    book = roofline.ours(name, 2)
    work = dry_run(load_recipe(RECIPES / f"{name}.yaml"), 2, "bf16")
    assert book.flops.total() == pytest.approx(work.flops, rel=0.01)
    assert "rest" not in book.flops  # every op has its phase
    assert book.seconds["b200"].total() < book.seconds["a100"].total()


def roads():
    """Rows of docs/step.md's table of cheaper roads: recipe, changed keys, GFLOP, of MAE's."""
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/step.md").read_text().splitlines()
            if re.match(r"\| (mae|rmae|cmae) \|", line)]  # fmt: skip
    return [(name.strip(), re.findall("`([^`]*)`", keys), float(flops), float(share))
            for name, keys, flops, share in rows]  # fmt: skip


def test_the_table_of_cheaper_roads_is_what_is_counted():
    table = roads()
    assert len(table) == 14
    whole = table[0][2]
    for name, keys, flops, share in table:
        assert share == pytest.approx(flops / whole, abs=0.006), (name, keys)
    for name, keys, flops, _ in table[2::4]:  # one of each kind; each takes a second
        recipe = load_recipe(RECIPES / f"{name}.yaml", keys)
        counted = flops_per_image(recipe, 128, 8) / 1e9
        assert counted == pytest.approx(flops, abs=0.051), (name, keys)


def test_checkpointing_keeps_less_and_computes_more():
    recipe = load_recipe(RECIPES / "mae.yaml")
    plain, saved = (dry_run(recipe, 2, "bf16", flag) for flag in (False, True))
    assert saved.activations < 0.3 * plain.activations
    assert 1.2 * plain.flops < saved.flops < 1.4 * plain.flops


def test_shards_cover_every_element():
    groups = [[10, 7, 3], [5, 1]]
    for ranks in (1, 2, 3, 8):
        assert shard(groups, 0, ranks) == 26
        for stage in (1, 2, 3):
            assert shard(groups, stage, ranks) * ranks >= 26
    assert shard(groups, 2, 2) == 10 + 4  # 20 / 2; 6 / 2 padded to a multiple of 2
    assert shard(groups, 3, 2) == 5 + 4 + 2 + 3 + 1
    assert stage2_gradients(groups, 1) == [26]
    assert stage2_gradients(groups, 2) == [10 + 5, 10 + 6]  # 5 is across the border of 4
    assert stage2_gradients([[8]], 2) == [8, 8]


@pytest.mark.parametrize("name", ["rmae", "cmae"])
def test_autocast_keeps_what_lies_between_bf16_and_fp32(name):
    recipe = tiny_recipe(name)
    kept = {p: dry_run(recipe, 4, p).activations for p in PRECISIONS}
    assert kept["bf16"] == kept["bf16-fp32-grads"] < kept["autocast"] < kept["fp32"]


def in_linears(teacher):
    """Numbers in its linears: all but norms, tokens and the patch embedding."""
    apart = ("norm", "token", "patch_embed")
    named = teacher.named_parameters()
    return sum(p.numel() for name, p in named if not any(word in name for word in apart))


def test_what_each_precision_sends_and_keeps_per_parameter():
    objective, teacher = meta_objective(load_recipe(RECIPES / "cmae.yaml"))
    n, t = (sum(p.numel() for p in module.parameters()) for module in (objective, teacher))
    work = Work(1, 0, 0, 0)
    # stage 2, two micro-batches: gradients twice, weights once, a bf16 run's fp32 for the teacher
    sent = {"autocast": 12 * n, "bf16": 6 * n + 8 * t, "bf16-fp32-grads": 10 * n + 8 * t}
    kept = {"autocast": 20 * n, "bf16": 16 * n, "bf16-fp32-grads": 18 * n, "fp32": 20 * n}
    for precision, size in (sent | {"fp32": 12 * n}).items():
        found = traffic(objective, teacher, work, 2, 2, 2, precision)
        assert found == pytest.approx(size / 2, abs=2), precision
        need = memory(objective, teacher, work, 2, 1, precision)
        held = 4 * t + (0 if precision == "fp32" else 2 * in_linears(teacher))
        assert need.total == pytest.approx(kept[precision] + held, abs=100), precision


@pytest.mark.parametrize(("precision", "size"), [("autocast", 4), ("fp32", 4), ("bf16", 2)])
def test_what_a_step_sends_under_every_stage(precision, size):
    """Of four ranks with three micro-batches each: a ring sends three quarters of what it reduces
    or gathers once, and of an all-reduce twice; keys go to the three others."""
    objective, teacher = meta_objective(load_recipe(RECIPES / "cmae.yaml"))
    n = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    t = sum(p.numel() for p in teacher.parameters())
    masters = 2 * 4 * t if precision == "bf16" else 0  # summed for the teacher
    by_hand = {
        0: 2 * n * size,
        1: 2 * n * size + masters,  # scattered once, gathered once
        2: (3 + 1) * n * size + masters,  # scattered in every micro-batch
        3: 3 * (1 + 2) * n * size + 4 * t,  # and gathered twice in each
    }
    for stage, sent in by_hand.items():
        if stage or precision != "bf16":
            work = Work(1, 0, 0, keys=1000)
            found = traffic(objective, teacher, work, stage, 4, 3, precision)
            assert found == pytest.approx(0.75 * sent + 3 * 3 * 1000, abs=1), stage
            assert traffic(objective, teacher, work, stage, 1, 3, precision) == 0


def test_the_utilisation_is_the_one_measured():
    measured = json.loads((ROOT / "docs/page/gpu-h100.json").read_text())["results"]["step"]
    assert measured["batch"] == 256
    assert round(measured["steps"]["mae, compiled, graphs"]["mfu"], 2) == UTILISATION


def test_a_second_crop_is_loaded_too():
    rows = {}
    for name in ("mae", "mocov3"):
        args = plan.parse_args(["--gpus", "2", "--launch-ms", "1", "--cores", "2"])
        rows[name] = plan.predict(tiny_recipe(name), args)["stages"][0]
    assert rows["mae"]["loader_ms"] == 1e3 * 4 / (2 * CORE_IMAGES)
    assert rows["mocov3"]["loader_ms"] == 2 * rows["mae"]["loader_ms"]


def test_memory_of_one_gpu_in_bf16_is_the_formula_of_the_paper():
    objective, teacher = meta_objective(load_recipe(RECIPES / "cmae.yaml"))
    assert teacher is not None
    trained = sum(p.numel() for p in objective.parameters())
    held = sum(p.numel() for p in teacher.parameters())
    work = Work(1, 0, 1000, 0)
    for stage in (1, 2, 3):
        need = memory(objective, teacher, work, stage, 1, "bf16")
        expected = 16 * trained + 4 * held + 2 * in_linears(teacher) + 1000
        assert need.total == pytest.approx(expected, abs=100)


def test_frozen_weights_are_held_and_under_stage_3_shared():
    """Of MoCo v3, whose patch embedding has neither gradients nor moments, on five ranks."""
    objective, teacher = meta_objective(tiny_recipe("mocov3"))
    sizes = [(p.numel(), p.requires_grad) for p in objective.parameters()]
    trained, whole = sum(n for n, is_trained in sizes if is_trained), sum(n for n, _ in sizes)
    parts = sum(math.ceil(n / 5) for n, is_trained in sizes if is_trained)
    every = sum(math.ceil(n / 5) for n, _ in sizes)
    assert whole - trained == 3 * 4 * 4 * 16 + 16
    found = {n: memory(objective, teacher, Work(1, 0, 7, 0), n, 5, "fp32") for n in (0, 1, 3)}
    for stage, weights, gradients in ((0, whole, trained), (1, whole, trained), (3, every, parts)):
        assert found[stage].weights == 4 * weights
        assert found[stage].gradients == 4 * gradients
        assert found[stage].activations == 7
    assert found[0].optimizer == 8 * trained
    assert found[1].optimizer == pytest.approx(12 * trained / 5, abs=12 * 2 * 2)
    assert found[3].optimizer == 12 * parts
    assert found[1].teacher == 4 * sum(p.numel() for p in teacher.parameters())


def test_the_fullest_rank_keeps_the_gradients_that_reach_into_its_part_under_stage_2():
    objective, _ = meta_objective(tiny_recipe("rmae"))
    kept = [0] * 3
    for group in parameter_groups(objective):
        sizes = [p.numel() for p in group["params"]]
        part, first = 2 * math.ceil(sum(sizes) / 6), 0
        for size in sizes:
            for rank in {element // part for element in range(first, first + size)}:
                kept[rank] += size
            first += size
    assert len({*kept}) > 1
    assert memory(objective, None, Work(1, 0, 0, 0), 2, 3, "fp32").gradients == 4 * max(kept)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    output = tmp_path_factory.mktemp("memory") / "memory.json"
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}",
    }
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        command += ["--master_port", str(s.getsockname()[1])]
    command += [str(ROOT / "tests/bench/memory_worker.py"), str(output)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(output.read_text())


WAYS = ("autocast", "bf16", "bf16-fp32-grads")
MUON = [f"{stage}, muon" for stage in range(3)]


@pytest.mark.parametrize(
    "stage", [*"0123", *(f"{s}, {way}" for way in WAYS for s in (2, 3)), *MUON]
)
def test_deepspeed_keeps_exactly_the_predicted_bytes(measured, stage):
    assert len(measured) == 2
    for part in ("weights", "gradients", "optimizer"):
        sizes = [rank[stage][part] for rank in measured]
        assert max(size["measured"] for size in sizes) == sizes[0]["predicted"], part


def test_micro_batches_divide_a_ranks_images():
    recipe = load_recipe(RECIPES / "mae.yaml")
    assert split(recipe, 8)[:2] == [128, 64]
    assert split(recipe, 64) == [16, 8, 4, 2, 1]
    with pytest.raises(PlanError, match=r"--gpus 3: batch_size 1024 .* multiples"):
        split(recipe, 3)
    for batch, partitions in ((4, 4), (12, 4), (24, 12), (1024, 4)):
        changes = [f"batch_size={batch}", f"data.partitions={partitions}"]
        with pytest.raises(PlanError, match=r"--gpus 8: .* must be multiples of the number"):
            split(load_recipe(RECIPES / "mae.yaml", changes), 8)


def test_a_micro_batch_that_the_run_refuses_is_not_planned(capsys):
    alone = ["--recipe", "demo_cmae", "--gpus", "1", "--launch-ms", "1"]
    cutmix = [*TINY, "--gpus", "1", "--set", "views.cutmix=0.5", "--launch-ms", "1"]
    for options in (alone, cutmix):
        args = plan.parse_args([*options, "--micro-batch", "1"])
        with pytest.raises(PlanError, match=r"--micro-batch 1: must be one of \[128, .* 4, 2\]"):
            plan.check(args)
        assert plan.main([*options, "--micro-batch", "1"]) == 2
    capsys.readouterr()
    small = ["--set", "batch_size=1", "--set", "data.partitions=1"]
    assert plan.main([*alone, *small]) == 2
    assert "over all ranks it has 1, and at least 2 are needed" in capsys.readouterr().err
    fit = [*cutmix[:-2], "--fit", "1", "--gpu-memory", "0.001"]
    assert plan.main(fit) == 0
    assert capsys.readouterr().out == "2\n"
    assert split(tiny_recipe("cmae"), 2) == [4, 2, 1]  # with the images of the other rank


def test_a_micro_batch_of_negatives_does_not_follow_the_device():
    """What pretrain's "auto" takes, whether or not it fits; --micro-batch takes another."""
    for name, few in (("demo_mae", 1), ("demo_cmae", 128)):
        recipe = load_recipe(name, ["encoder.options={patch_size: 16, depth: 1}"])
        options = ["--gpus", "1", "--launch-ms", "1", "--gpu-memory", "0.001"]
        rows = plan.predict(recipe, plan.parse_args(options))["stages"]
        assert {(row["micro_batch"], row["fits"]) for row in rows} == {(few, False)}
    options += ["--micro-batch", "2"]
    rows = plan.predict(recipe, plan.parse_args(options))["stages"]
    assert {row["micro_batch"] for row in rows} == {2}


def by_hand(rows, columns):
    """FLOPs of five steps of Newton-Schulz of one matrix: X X', its square, and a product with X.
    The smaller side is the row's."""
    low, high = sorted((rows, columns))
    return 5 * 2 * (2 * low * low * high + low**3)


def test_muon_is_planned_as_it_runs(capsys):
    recipe = load_recipe(RECIPES / "mae.yaml", ["optimizer.kind=muon"])
    objective, _ = meta_objective(recipe)
    matrices = 12 * 12 * 768**2 + 8 * 12 * 512**2
    stepping = Stepping(objective)
    assert stepping.gathered == matrices
    one = [3 * by_hand(w, w) + by_hand(w, w) + 2 * by_hand(w, 4 * w) for w in (768, 512)]
    assert stepping.flops(0, 4) == 12 * one[0] + 8 * one[1]
    assert stepping.flops(1, 4) == stepping.flops(2, 4) == stepping.flops(0, 4) / 4
    other = sum(p.numel() for p in objective.parameters()) - matrices
    need = memory(objective, None, Work(1, 0, 0, 0), 0, 1, "fp32")
    frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
    assert need.optimizer == 4 * matrices + 8 * (other - frozen)
    adamw, _ = meta_objective(load_recipe(RECIPES / "mae.yaml"))
    for stage, more in ((0, 0), (1, 4 * matrices / 2), (2, 4 * matrices / 2)):
        sent, plain = (
            traffic(o, None, Work(1, 0, 0, 0), stage, 2, 1, "autocast") for o in (objective, adamw)
        )
        assert sent - plain == pytest.approx(more, abs=2)
    args = plan.parse_args(["--gpus", "8", "--launch-ms", "0.01"])
    made = plan.predict(recipe, args)
    assert [row["stage"] for row in made["stages"]] == [0, 1, 2]
    argv = ["--recipe", "mae", "--set", "optimizer.kind=muon", "--gpus", "8", "--fit", "3"]
    with pytest.raises(UserError, match="muon does not work under ZeRO stage 3"):
        plan.check(plan.parse_args(argv))
    assert plan.main(argv) == 2
    assert "stage 2 or lower" in capsys.readouterr().err


def test_launches_of_muons_step_are_those_of_a_real_one():
    recipe = tiny_recipe("mae", "optimizer.kind=muon")
    objective, _ = build_objective(recipe)
    optimizer = muon.build(objective, parameter_groups(objective), plan_recipe({}, recipe, 1))
    for _ in range(2):
        for parameter in objective.parameters():
            parameter.grad = torch.ones_like(parameter)
        with LaunchCounter() as counted:
            optimizer.step()
    groups = len(optimizer.param_groups)
    stepping = Stepping(meta_objective(recipe)[0])
    own = stepping.launches(0, 4) - 10 - 2 * (groups - 2)
    assert own == counted.count > 100
    for ranks in (4, 5, 7):
        assert stepping.launches(1, ranks) - 10 - 2 * (groups - 2) == math.ceil(own / ranks)
    assert stepping.flops(0, 4) == 4 * stepping.flops(1, 4) > 0
    plain = Stepping(meta_objective(tiny_recipe("mae"))[0])
    assert (plain.launches(1, 4), plain.flops(0, 1), plain.gathered) == (10, 0, 0)


def test_the_lowest_stage_that_fits_is_recommended():
    rows = [{"stage": stage, "fits": stage in (0, 2, 3)} for stage in range(4)]
    assert plan.recommended(rows) == 2
    assert plan.recommended(rows[:2]) is None


def test_graphs_hold_copies_of_the_gradients_and_run_stage_2_as_1():
    recipe = load_recipe(RECIPES / "demo_mae.yaml")
    objective, _ = meta_objective(recipe)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    options = ["--recipe", "x", "--gpus", "2", "--launch-ms", "1"]
    per_rank = recipe.batch_size // 2
    rows = {}
    for micro in (per_rank, per_rank // 2):
        for more in ([], ["--no-graphs"]):
            args = plan.parse_args([*options, "--micro-batch", str(micro), *more])
            rows[micro, bool(more)] = plan.predict(recipe, args)["stages"]
    once, eager = rows[per_rank, False], rows[per_rank, True]
    assert [row["run_as"] for row in once] == [1, 1, 1, 3]
    assert [row["run_as"] for row in eager] == [0, 1, 2, 3]
    assert once[1]["gradients_gb"] == pytest.approx(2 * eager[1]["gradients_gb"], abs=2e-3)
    twice = rows[per_rank // 2, False]
    assert twice[1]["gradients_gb"] == pytest.approx(3 * 4 * trained / 1e9, abs=1e-3)
    for name in ("gradients_gb", "optimizer_gb", "sent_gb_per_step"):
        assert once[2][name] == once[1][name] == once[0][name]
    assert once[3] == eager[3]  # where there are no graphs
    # Of a memory that the largest micro-batch just fills without graphs.
    need = {n: rows[n, True][1]["memory_gb"] for n in (per_rank, per_rank // 2)}
    room = str((need[per_rank] + 1e-3) / 0.9)
    fit = ["--recipe", "x", "--gpus", "2", "--fit", "1", "--gpu-memory", room]
    assert plan.fit(recipe, plan.parse_args([*fit, "--no-graphs"])) == per_rank
    assert plan.fit(recipe, plan.parse_args(fit)) < per_rank


@pytest.mark.parametrize(
    "option", ["--gpu-memory", "--launch-ms", "--core-images", "--utilisation"]
)
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_what_is_no_number_of_a_machine_is_refused(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        plan.parse_args([option, value])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


def test_a_gpu_has_its_own_memory_unless_another_is_named():
    """A card of 24 GB was planned for 80 GB, so that a run took more than it has."""
    sizes = {
        name: plan.parse_args(["--gpu", name]).gpu_memory for name in ("l4", "h100", "b200", "a100")
    }
    assert sizes == {"l4": 24, "h100": 80, "b200": 180, "a100": 80}
    assert plan.parse_args([]).gpu_memory == 80
    assert plan.parse_args(["--gpu", "a100", "--gpu-memory", "40"]).gpu_memory == 40
    assert plan.parse_args(["--fit", "1", "--gpu", "l4"]).gpu_memory == 24
    assert MEMORY.keys() == PEAKS.keys()


TINY = ["--recipe", "demo_mae", "--set", "encoder.options={patch_size: 16, depth: 1}"]


def test_what_fits_is_printed_and_what_does_not_is_said(capsys):
    """pretrain's "auto" reads stdout, a person both."""
    fit = [*TINY, "--gpus", "1", "--fit", "1"]
    assert plan.main([*fit, "--gpu-memory", "80"]) == 0
    assert capsys.readouterr() == (f"{load_recipe('demo_mae').batch_size}\n", "")
    assert plan.main([*fit, "--gpu-memory", "0.001"]) == 0
    out, err = capsys.readouterr()
    assert out == "1\n"
    assert re.fullmatch(r"warning: no micro-batch fits --gpu-memory 0.001 under ZeRO 1: .*\n", err)


@pytest.mark.parametrize(
    ("precision", "stages"),
    [("autocast", [0, 1, 2, 3]), ("fp32", [0, 1, 2, 3]), ("bf16", [1, 2, 3]),
     ("bf16-fp32-grads", [2, 3])],
)  # fmt: skip
def test_a_stage_that_the_engine_refuses_is_not_fitted(precision, stages, capsys):
    for stage in range(4):
        options = ["--gpus", "1", "--precision", precision, "--fit", str(stage)]
        args = plan.parse_args([*TINY, *options])
        if stage in stages:
            plan.check(args)
            continue
        with pytest.raises(PlanError, match=f"--fit {stage}: ZeRO {stage} does not run in"):
            plan.check(args)
        assert plan.main([*TINY, *options]) == 2  # of a rank, whose command line is not checked
        assert f"--precision {precision}, but" in capsys.readouterr().err


def test_a_plan_of_no_step_is_refused(capsys):
    for options, sentence in (
        (["--images", "1"], "--images 1: 1 samples are fewer than one batch of"),
        (["--set", "optimizer.epochs=1e-9", "--set", "optimizer.warmup_epochs=0"], "one step"),
        (
            ["--set", "data.sizes=[[0.0000001, 48], [1, 96]]"],
            "images of 48 pixels have none of the",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            plan.check(plan.parse_args([*TINY, *options]))
        assert plan.main([*TINY, *options, "--launch-ms", "1"]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("stage", [1, 3])
def test_the_hours_are_those_of_the_recommended_stage(stage, monkeypatch):
    options = ["--gpus", "2", "--images", "9999999", "--launch-ms", "1", "--gpu", "a100"]
    monkeypatch.setattr(plan, "recommended", lambda rows: stage)
    made = plan.predict(tiny_recipe("mae"), plan.parse_args(options))
    times = {row["stage"]: row["host_ms"] for row in made["stages"]}
    assert times[1] < times[3]  # which has no CUDA graphs on two ranks
    assert made["hours"] == pytest.approx(made["steps"] * times[stage] / 3.6e6, abs=0.006)


def test_command_line(capsys, tmp_path):
    path = tmp_path / "plan.json"
    recipe = str(RECIPES / "demo_rmae.yaml")
    options = ["--recipe", recipe, "--gpus", "2", "--images", "1000", "--json", str(path)]
    assert plan.main([*options, "--gpu", "a100"]) == 0
    text = capsys.readouterr().out
    peak = f"at {UTILISATION:.0%} of the peak in autocast"
    assert re.search(rf"hours on 2 A100 of 80 GB \((host|loader)-bound; .* {peak}\)", text)
    assert "  host-bound" in text  # a tiny model; launches are measured here
    made = json.loads(path.read_text())
    assert [row["stage"] for row in made["stages"]] == [0, 1, 2, 3]
    assert made["recommended_stage"] == 1
    assert "\nrecommended: ZeRO 1 (the lowest from 1 up that fits)\n" in text
    hours = {}
    for way, first in (("autocast", 0), ("bf16", 1), ("bf16-fp32-grads", 2), ("fp32", 0)):
        assert (
            plan.main([*options, "--gpu", "a100", "--images", "999999999", "--precision", way]) == 0
        )
        other = json.loads(path.read_text())
        assert [row["stage"] for row in other["stages"]] == list(range(first, 4))
        hours[way] = other["gpu_bound_hours"]
    assert hours["bf16"] == hours["bf16-fp32-grads"] > 0
    assert hours["autocast"] == hours["bf16"]
    assert hours["fp32"] == pytest.approx(hours["bf16"] * 312 / 19.5, rel=0.02)
    expected = made["flops_per_step"] * made["steps"] / (2 * 312e12 * UTILISATION) / 3600
    assert made["gpu_bound_hours"] == pytest.approx(expected, abs=0.005)
    more = ["--launch-ms", "0.001", "--core-images", "50", "--cores", "3"]
    assert plan.main([*options, *more, "--images", "9999999"]) == 0
    slow = json.loads(path.read_text())
    row = slow["stages"][0]
    assert "loader-bound; " in capsys.readouterr().out
    assert slow["hours"] == pytest.approx(slow["steps"] * row["loader_ms"] / 3.6e6, abs=0.006)
    assert slow["hours"] > 2 * slow["gpu_bound_hours"]
    assert row["bound"] == "loader-bound"
    assert row["loader_ms"] == pytest.approx(1e3 * row["micro_batch"] * row["accumulation"] / 150)
    assert row["host_ms"] == pytest.approx(1e-3 * row["launches"], abs=1e-3)
    assert plan.main([*options, "--gpu-memory", "0.001"]) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "no stage fits: more GPUs" in text
    assert plan.main([*options[:2], "--gpus", "7"]) == 2
    assert "error: --gpus 7" in capsys.readouterr().err

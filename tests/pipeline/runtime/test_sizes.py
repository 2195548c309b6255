"""Images that change their size in a run: every step, batch and loss as at that constant size."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_helpers import jpeg, open_loader, write_shards
from oracle import sincos
from safetensors.torch import load_file
from tiny import images, tiny_overrides, tiny_recipe

from pipeline import pretrain
from pipeline.config.recipe import RECIPES, dump_recipe, load_recipe, parse_recipe
from pipeline.config.schedules import size_steps
from pipeline.cost.dry_run import dry_run, flops_per_image
from pipeline.data.crops import Crop, side_at
from pipeline.data.randaugment import RandAugment
from pipeline.errors import UserError
from pipeline.estimate import flops_lines, predict
from pipeline.estimate import parse_args as estimate_args
from pipeline.method.objective import build_objective
from pipeline.runtime.mfu import Mfu
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.same_run import _size
from pipeline.runtime.trackers import Trackers

GROWING = "data.sizes=[[0.5, 8], [0.75, 12], [1, 16]]"


# ------------------------------------------------------------------ which step has which size


@settings(max_examples=50, deadline=None)
@given(
    total=st.integers(1, 400),
    shares=st.lists(st.integers(1, 99), max_size=5, unique=True).map(sorted),
)
def test_every_step_has_the_size_of_its_share_of_the_run(total, shares):
    sides = [4 * (number + 1) for number in range(len(shares))] + [32]
    ends = [share / 100 for share in shares] + [1]
    sizes = json.dumps(list(zip(ends, sides, strict=True)))
    recipe = tiny_recipe("mae", "encoder.image_size=32", f"data.sizes={sizes}")
    wanted = [round(end * total) for end in ends]
    if len({0, *wanted}) <= len(wanted):
        with pytest.raises(UserError, match=rf"pixels have none of the {total} steps"):
            size_steps(recipe, total)
        return
    schedule = size_steps(recipe, total)
    seen = Counter(side_at(schedule, step) for step in range(total))
    assert [seen[side] for side in sides] == np.diff([0, *wanted]).tolist()
    found = [side_at(schedule, step) for step in range(total)]
    assert found == sorted(found)
    assert side_at(schedule, total + 5) == 32


def test_sizes_may_shrink_before_the_last():
    recipe = tiny_recipe("mae", "data.sizes=[[0.25, 16], [0.5, 8], [1, 16]]")
    assert [side_at(size_steps(recipe, 8), s) for s in range(8)] == [16, 16, 8, 8, 16, 16, 16, 16]
    assert recipe.smaller_sides == [8]


def test_every_phase_is_a_recipe_that_can_be_built():
    options = "encoder.options={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, img_size: 16}"
    recipe = tiny_recipe("mae", GROWING, options)
    assert [share for share, _ in recipe.phases] == [0.5, 0.25, 0.25]
    for side, (_, phase) in zip((8, 12, 16), recipe.phases, strict=True):
        assert build_objective(phase)[0].encoder.grid == (side // 4, side // 4)
        assert phase.data.sizes == ()


def test_without_sizes_nothing_changes():
    recipe = tiny_recipe("mae")
    assert size_steps(recipe, 10) == ()
    assert recipe.phases == [(1.0, recipe)]
    assert parse_recipe(json.loads(recipe.model_dump_json(by_alias=True)), "x") == recipe


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ("[[0.5, 8], [1, 12]]", "the last size is 12, not encoder.image_size 16"),
        ("[[0.5, 6], [1, 16]]", "data.sizes: 6 is not a multiple of the patch size 4"),
        ("[[0.5, 32], [1, 16]]", "data.sizes: 32 is larger than encoder.image_size 16"),
        ("[[0.5, 8], [0.5, 12], [1, 16]]", "'data.sizes': the shares of the run .first in each"),
        ("[[0, 8], [1, 16]]", "'data.sizes': the shares of the run .first in each entry. must"),
        ("[[0.5, 8]]", r"the last entry must be \[1, encoder.image_size\], the end of the run"),
        ("[[0.5, 8], [1.5, 16]]", "input should be less than or equal to 1"),
        ("[[0.5, 0], [1, 16]]", "input should be greater than 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_sentence(sizes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        tiny_recipe("mae", f"data.sizes={sizes}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([], r"in images of 4 pixels views.mask_ratio 0.75 leaves none of the 1 patches visible"),
        (["views={mask_ratio: 0, second: independent, second_mask_ratio: 0.9}"],
         "in images of 4 pixels views.second_mask_ratio 0.9 leaves none of the 1 patches"),
    ],
)  # fmt: skip
def test_too_few_patches_for_the_masks_are_said(changes, sentence):
    name = "cmae" if changes else "mae"
    recipe = tiny_recipe(name, "data.sizes=[[0.5, 4], [1, 16]]", *changes)
    with pytest.raises(UserError, match=f"data.sizes: {sentence}"):
        build_objective(recipe)


# ------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    pictures = [[jpeg(100 * shard + i) for i in range(10)] for shard in range(4)]
    return write_shards(tmp_path_factory.mktemp("few"), pictures)


SCHEDULE = ((3, 8), (7, 12), (12, 16))


def load(folder, *, world=1, workers=0, start=0, micro=4, **change):
    """step → (images, second crops, samples) of the global batch."""
    options = {"batch_size": 8, "seed": 3, "total_steps": 12, "partitions": 4, "window": 2}
    options |= {"crop": Crop(16), "second_crop": True, "sizes": SCHEDULE, **change}
    steps = {}
    for rank in range(world):
        for batch in open_loader(
            folder, micro_batch=micro, rank=rank, world=world, workers=workers, start_step=start,
            **options,
        ):  # fmt: skip
            parts = (batch.image.clone(), batch.second.clone(), batch.sample)
            steps.setdefault(batch.step, []).append(parts)
    return {s: [torch.cat(p) for p in zip(*parts, strict=True)] for s, parts in steps.items()}


@pytest.mark.parametrize(
    ("world", "workers", "start", "micro"),
    [(1, 2, 0, 8), (2, 0, 2, 4), (2, 2, 3, 2), (4, 1, 6, 2), (1, 2, 7, 4)],
)
def test_batches_are_a_function_of_the_step_alone(few, world, workers, start, micro):
    """Also across a change of size, which workers prefetch over, and resumed on either side."""
    whole = load(few)
    assert {s: images.shape[1] for s, (images, _, _) in whole.items()} == {
        s: side_at(SCHEDULE, s) for s in range(12)
    }
    part = load(few, world=world, workers=workers, start=start, micro=micro)
    assert part.keys() == {s for s in whole if s >= start}
    for step, values in part.items():
        for mine, theirs in zip(values, whole[step], strict=True):
            assert torch.equal(mine, theirs), step


def test_the_crops_of_a_phase_are_those_of_a_run_at_its_size(few):
    whole = load(few)
    for side in (8, 12, 16):
        constant = load(few, crop=Crop(side), sizes=())
        for step in (s for s in whole if side_at(SCHEDULE, s) == side):
            for mine, theirs in zip(whole[step], constant[step], strict=True):
                assert torch.equal(mine, theirs), step


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-tweights"])
def test_randaugment_does_to_a_size_what_it_does_where_it_is_made_for_it(policy):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    ways = [RandAugment(policy, size, (0.5, 0.5, 0.5), seed=1) for size in (16, 8)]
    for key in range(60):
        one, other = pixels.copy(), pixels.copy()
        ways[0](one, 0, key, 0)
        ways[1](other, 0, key, 0)
        assert np.array_equal(one, other), key


# ------------------------------------------------------------------ model


WAYS = {
    "mae": [],
    "rmae": ["measure.decoder.depth=2"],
    "rmae_dagger": ["views.mask=block"],
    "mae, cross": ["measure.decoder.attention=cross", "views.predicted=0.5"],
    "cmae": ["views.jitter.where=visible"],
    "mocov3": [],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", [8, 12, 16])
def test_loss_and_gradients_are_those_of_a_model_built_at_the_size(way, side):
    recipe = tiny_recipe(way.split(",")[0], GROWING, *WAYS[way])
    constant = next(phase for _, phase in recipe.phases if phase.encoder.image_size == side)
    found = []
    for each in (recipe, constant):
        objective, teacher = build_objective(each)
        image, crop = images(4, side), images(4, side, seed=1)
        crop = crop if each.views.second == "crop" else None
        loss, _ = objective(image, torch.arange(4), 1, teacher, crop)
        loss.backward()
        found.append((loss, [p.grad for p in objective.parameters()], objective.state_dict()))
    (loss, gradients, state), (same, others, other) = found
    assert torch.equal(loss, same)
    for mine, theirs in zip(gradients, others, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    assert state.keys() == other.keys()  # nothing of the sizes is in a checkpoint
    full = build_objective(recipe.phases[-1][1])[0].state_dict()
    assert all(torch.equal(state[name], full[name]) for name in full)


def test_the_tables_of_every_size_are_the_written_out_ones():
    objective, _ = build_objective(tiny_recipe("rmae", GROWING))
    encoder, decoder = objective.encoder, objective.measure.decoder
    for n in (2, 3, 4):
        for part, full, width in (
            (encoder, encoder.pos_embed[0], 16), (decoder, decoder.pos_embed, 8),
        ):  # fmt: skip
            table = part.smaller.at(n * n, full)
            assert torch.allclose(table, sincos(n, n, width), atol=1e-6)
    moco, teacher = build_objective(tiny_recipe("mocov3", GROWING))
    halves = sincos(3, 3, 16).chunk(2, dim=1)  # MoCo v3's has the row first
    for part in (moco.encoder, teacher.encoder):
        table = part.smaller.at(9, part.pos_embed[0])
        assert torch.allclose(table, torch.cat(halves[::-1], dim=1), atol=1e-6)
    moco.bfloat16()
    assert moco.encoder.smaller.at(9, moco.encoder.pos_embed[0]).dtype == torch.bfloat16


# ------------------------------------------------------------------ what it costs, what is shown


def test_flops_are_the_mean_over_the_run_and_memory_is_of_the_full_size():
    recipe, plain = tiny_recipe("rmae", GROWING), tiny_recipe("rmae")
    by_size = [
        dry_run(tiny_recipe("rmae", f"encoder.image_size={s}"), 8, "fp32").flops / 8
        for s in (8, 12, 16)
    ]
    mean = 0.5 * by_size[0] + 0.25 * by_size[1] + 0.25 * by_size[2]
    args = estimate_args(["--flops", "--gpus", "1"])
    assert flops_lines(plain, args) == f"{by_size[2]}"
    first, *lines = flops_lines(recipe, args).splitlines()
    assert float(first) == pytest.approx(mean, rel=1e-12)
    assert [line.split() for line in lines] == [
        [str(side), str(flops)] for side, flops in zip((8, 12, 16), by_size, strict=True)
    ]
    plans = [predict(r, estimate_args(["--gpus", "1", "--launch-ms", "0.01"]))
             for r in (recipe, plain)]  # fmt: skip
    ratio = plans[0]["flops_per_step"] / plans[1]["flops_per_step"]
    assert ratio == pytest.approx(mean / by_size[2], rel=1e-6)
    for one, other in zip(plans[0]["stages"], plans[1]["stages"], strict=True):
        assert one["memory_gb"] == other["memory_gb"]


def test_the_mfu_counts_the_sizes_that_the_steps_had(tmp_path):
    recipe = tiny_recipe("mae", GROWING)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    mfu = Mfu(tmp_path / "recipe.yaml", peak=1e9, micro_batch=4, ranks=2)
    small, middle, full = (flops_per_image(phase, 4, 2) for _, phase in recipe.phases)
    assert mfu.flops_per_image(wait=True) == pytest.approx(small / 2 + middle / 4 + full / 4)
    assert mfu.of(10.0, {8: 3, 16: 1}) == pytest.approx((3 * small + full) / 4 * 10 / 1e9)
    assert mfu.of(10.0, {16: 7}) == pytest.approx(full * 10 / 1e9)


def test_the_time_left_counts_pixels(tmp_path):
    def monitor(**sizes):
        return Monitor(tmp_path, rank=1, first=0, total=12, images=8, log_steps=1,
                       trackers=Trackers(), **sizes)  # fmt: skip

    assert [monitor()._left(step) for step in (0, 5, 12)] == [12, 7, 0]
    watched = monitor(sizes=((4, 8), (12, 16)))
    watched.set_image_size(8)
    assert watched._left(1) == 3 + 8 * 4
    watched.set_image_size(16)
    assert watched._left(6) == 6
    assert watched._left(12) == 0


def test_a_changed_schedule_is_said_when_a_run_is_continued_all_the_same():
    two = "optimizer.epochs=2", "optimizer.warmup_epochs=0"
    assert _size(tiny_recipe("mae", GROWING, *two), 5, 6) == " and 8 pixels"
    assert _size(tiny_recipe("mae", GROWING, *two), 9, 6) == " and 16 pixels"
    assert _size(tiny_recipe("mae"), 5, 6) == ""


# ------------------------------------------------------------------ a run


def command(shards, output, last, *changes):
    words = ["--data", str(shards / "train"), "--output", str(output), "--max-steps", str(last)]
    words += ["--recipe", str(RECIPES / "cmae.yaml"), "--ds_config", "zero1"]
    for change in (
        *tiny_overrides("cmae"), GROWING, "optimizer.epochs=1", "optimizer.warmup_epochs=0",
        "monitor.log_steps=1", "monitor.picture_steps=4", *changes,
    ):  # fmt: skip
        words += ["--set", change]
    return words


def run(shards, output, last, *changes):
    assert pretrain.main(command(shards, output, last, *changes)) == 0
    rows = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def test_a_run_cut_before_at_and_after_a_change_is_the_undisturbed_one(shards, tmp_path, capsys):
    whole = run(shards, tmp_path / "whole", 12)
    printed = capsys.readouterr().out
    assert "image sizes: 8 pixels up to step 6, 12 pixels up to step 9, 16 pixels up" in printed
    assert "step 7: images of 12 × 12 pixels from here on" in printed
    assert [row["image_size"] for row in whole] == 6 * [8] + 3 * [12] + 3 * [16]
    for last in (5, 6, 8, 12):
        parts = run(shards, tmp_path / "parts", last, "data.workers=1")
    for mine, theirs in zip(parts, whole, strict=True):
        assert mine["loss"] == theirs["loss"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    exported = load_file(tmp_path / "whole/encoder/encoder.safetensors")
    assert torch.allclose(exported["pos_embed"][0], sincos(4, 4, 16), atol=1e-6)
    written = load_recipe(tmp_path / "whole/recipe.yaml")
    assert written.data.sizes == ((0.5, 8), (0.75, 12), (1.0, 16))
    words = command(shards, tmp_path / "none", 12, "data.sizes=[[0.99, 8], [1, 16]]")
    assert pretrain.main(words) == 2
    assert "images of 16 pixels have none of the 12 steps" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

"""Skipped steps, the occlusion curve and the k-NN probe of a run; RandAugment by key."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import images, tiny_recipe

from pipeline.config.recipe import load_recipe
from pipeline.config.schema import augmentation
from pipeline.data.randaugment import RandAugment
from pipeline.errors import UserError
from pipeline.method.metrics import cka, gram, hsic
from pipeline.method.objective import build_objective
from pipeline.runtime.probes import Probes, share_of
from pipeline.runtime.skipped_steps import SKIP_LIMIT, SkippedSteps
from shard_tools.manifest import read_manifest


def test_skipped_steps_stop_only_in_a_row_and_name_the_steps():
    skipped = SkippedSteps(3)
    for step, bad in enumerate([1, 1, 0, 1, 1]):
        skipped.note(step, bool(bad))
    assert skipped.total == 4
    assert "the last 2 steps were skipped" in skipped.at_end()
    assert "after step 3;" in skipped.at_end()
    with pytest.raises(UserError, match=r"steps 4 to 6 in a row.*after step 3") as error:
        skipped.note(5, True)
    assert "\n" not in str(error.value)
    skipped.note(6, False)
    assert skipped.at_end() == ""
    skipped.note(7, True)
    assert skipped.at_end().startswith("the last step was skipped")
    assert "after step 7;" in skipped.at_end()
    assert load_recipe("mae").optimizer.skip_limit == SKIP_LIMIT


def test_cka_is_one_for_rotated_features_and_small_for_unrelated_ones():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert cka(x, 3 * x @ rotation + 1) == pytest.approx(1.0, abs=1e-6)
    assert abs(cka(x, torch.randn(64, 6))) < 0.2
    k = gram(x)
    assert hsic(k, k) > 0


@pytest.mark.parametrize("method", ["rmae", "cmae"])
def test_probes_of_real_shards(method, shards):
    recipe = tiny_recipe(
        method, "monitor.occlusion_steps=2", "monitor.knn_steps=4", "monitor.images=24"
    )
    objective, _ = build_objective(recipe)
    probes = Probes(recipe, str(shards / "train"), 0, 1, batch=7)
    assert [step for step in range(1, 9) if probes.due(step)] == [2, 4, 6, 8]
    device = torch.device("cpu")
    first = probes(2, objective.encoder, device)
    assert sorted(first) == ["occlusion/cka_0.25", "occlusion/cka_0.5", "occlusion/cka_0.75"]
    assert all(-0.5 < v <= 1.0 + 1e-6 for v in first.values())
    assert objective.encoder.training
    both = probes(4, objective.encoder, device)
    assert {k: both[k] for k in first} == first  # the same images and patches every time
    assert 0 <= both["probe/knn_top1"] <= 100


def test_a_probe_of_the_held_out_images_among_themselves_is_perfect(shards):
    recipe = tiny_recipe("mae", "monitor.knn_steps=1", "monitor.images=12")
    objective, _ = build_objective(recipe)
    probes = Probes(recipe, str(shards / "train"), 0, 1, batch=8)
    labels = torch.arange(12)
    probes.training = probes.held_out = type(probes.held_out)(
        probes.held_out.image, probes.held_out.sample, labels
    )
    # every image is nearest to itself, with a label of its own
    assert probes(1, objective.encoder, torch.device("cpu"))["probe/knn_top1"] == 100.0


def test_probes_are_off_by_default_and_read_nothing():
    probes = Probes(tiny_recipe("mae"), "/nowhere/train", 0, 1, batch=8)
    assert not any(probes.due(step) for step in range(1, 100))


def test_probes_without_held_out_shards_say_so(tmp_path):
    with pytest.raises(UserError, match="val"):
        Probes(tiny_recipe("mae", "monitor.knn_steps=1"), str(tmp_path / "train"), 0, 1, batch=8)


def test_ranks_share_the_fixed_images(shards):
    samples = read_manifest(shards / "val").samples
    whole = share_of(shards / "val", 20, 16, 0, 1)
    parts = [share_of(shards / "val", 20, 16, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([p.sample for p in parts]), whole.sample)
    assert torch.equal(torch.cat([p.image for p in parts]), whole.image)
    assert len(set(whole.sample.tolist())) == 20
    assert whole.sample[0] == 0
    assert whole.sample[-1] == samples - 1


def test_randaugment_is_keyed_and_leaves_the_global_generators_alone():
    augment = RandAugment("rand-m9-mstd0.5-inc1", 32, (0.5, 0.5, 0.5), seed=1)
    source = images(1, 32)[0].numpy()

    def once(*key):
        out = source.copy()
        augment(out, *key)
        return out

    state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = once(0, 5, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (  # noqa: NPY002
        state[0], state[1].tolist(),
    )  # fmt: skip
    random.seed(99)
    assert np.array_equal(first, once(0, 5, 0))
    others = [once(1, 5, 0), once(0, 6, 0), once(0, 5, 1)]
    assert any(not np.array_equal(first, other) for other in others)
    with pytest.raises(UserError, match="not a policy of timm"):
        RandAugment("nonsense", 32, (0.5, 0.5, 0.5), seed=1)


@pytest.mark.parametrize(
    "policy",
    ["rand-m9-inc", "rand-mstdinf", "rand-m9-mstd0.5-inc1 ", "rand-tweight", "rand-m9-p2", "rand-"],
)
def test_what_timm_would_leave_out_of_a_policy_is_refused(policy):
    RandAugment(policy, 32, (0.5, 0.5, 0.5), seed=1)  # takes it for another one
    with pytest.raises(ValueError, match="input should be a policy of timm"):
        augmentation(policy)
    for good in ("", "rand", "rand-m9-mstd0.5-inc1", "rand-n3-m15-mmax30-p0.7-mstd101-tweights"):
        assert augmentation(good) == good


def test_probes_change_no_result():
    from pipeline.config.recipe import RECIPES, differences

    a = load_recipe(RECIPES / "mae.yaml")
    b = load_recipe(RECIPES / "mae.yaml", ["monitor.knn_steps=5"])
    assert differences(a, b) == []


@pytest.mark.parametrize(
    ("policy", "bits"),
    [("rand-m10-inc1", 0), ("rand-m40-mmax40-inc1", -12), ("rand-m9-inc1", 1), ("rand-m0", 0)],
)
def test_no_bits_left_are_black_under_every_pillow(policy, bits):
    """Pillow 13 refuses the 0 bits that timm's posterize asks for at the highest magnitude."""
    augment = RandAugment(policy, 32, (0.5, 0.5, 0.5), seed=1)
    names = [op.name.removesuffix("Increasing") for op in augment.transform.ops]
    op = augment.transform.ops[names.index("Posterize")]
    op.prob = 1
    source = images(1, 32)[0].numpy()
    expected = source & (256 - 2 ** (8 - bits)) if bits > 0 else source * 0
    assert np.array_equal(np.asarray(op(Image.fromarray(source))), expected)

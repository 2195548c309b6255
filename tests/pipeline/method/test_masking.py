"""Masking policies: blocks against a plain-loop oracle, exact counts, contiguity, both views."""

import math

import pytest
import torch
from tiny import PATCH, images, tiny_recipe

from pipeline import kernels
from pipeline.config.recipe import RecipeError
from pipeline.errors import UserError
from pipeline.kernels.philox import words
from pipeline.method.checks import visible_count
from pipeline.method.masking import ASPECTS, POLICIES, SMALLEST, Draw, select
from pipeline.method.objective import build_objective
from pipeline.method.views import draw_masks, make_views

GRIDS = [(14, 14), (7, 5), (5, 7), (3, 11), (2, 2), (1, 6)]
RATIOS = [0.25, 0.4, 0.75, 0.9]


def draw(grid, ratio, sample, view=0, seed=3, epoch=1):
    length = grid[0] * grid[1]
    masked = length - max(1, int(length * (1 - ratio)))
    return Draw(torch.as_tensor(sample), seed, epoch, view, grid, masked)


def block_oracle(sample, view, grid, masked, seed=3, epoch=1):
    """The masked patches of one sample: rectangle after rectangle, patch after patch."""
    rows, columns = grid
    length = rows * columns
    drawn = words(
        torch.tensor([sample]), seed=seed, epoch=epoch, stream=view, count=length + 4 * 32
    )[0].tolist()
    least = min(max(round(length * 16 / 196), 1), masked)
    result = []
    for number in range(32):
        area, aspect, down, right = drawn[length + 4 * number : length + 4 * number + 4]
        area = least + area * (masked - least + 1) // 2**32
        # Log-uniform from 0.3 to 1 / 0.3, in 256 steps.
        low, high = math.log(0.3), math.log(1 / 0.3)
        ratio = math.exp(low + (high - low) * ((aspect >> 24) + 0.5) / 256)
        height = min(max(round(math.sqrt(area * ratio)), 1), rows)
        width = min(max(round(math.sqrt(area / ratio)), 1), columns)
        top = down * (rows - height + 1) // 2**32
        left = right * (columns - width + 1) // 2**32
        for row in reversed(range(top, top + height)):
            for column in reversed(range(left, left + width)):
                patch = row * columns + column
                if len(result) < masked and patch not in result:
                    result.append(patch)
    # Single patches, as `random` would mask them, where the blocks leave some to mask.
    rest = sorted(set(range(length)) - set(result), key=lambda p: (drawn[p], p))
    while len(result) < masked:
        result.append(rest.pop())
    return set(result)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("view", [0, 1])
def test_blocks_against_the_loop_oracle(grid, ratio, view):
    samples = [2**40 + 1, 1234, *range(40)]  # enough for a block of one patch to count
    d = draw(grid, ratio, samples, view)
    visible, masked, inverse = select("block", d)
    assert visible.shape == (42, max(1, int(d.length * (1 - ratio))))  # exact, for every sample
    assert masked.shape == (42, d.masked)
    for b, sample in enumerate(samples):
        expected = block_oracle(sample, view, grid, d.masked)
        assert set(masked[b].tolist()) == expected, sample
        assert visible[b].tolist() == sorted(set(range(d.length)) - expected)
        slots = visible[b].tolist() + masked[b].tolist()
        assert [slots[n] for n in inverse[b].tolist()] == list(range(d.length))


def test_where_blocks_do_not_suffice_single_patches_follow(monkeypatch):
    """One block of three quarters at most covers less than that: the rest is as by `random`."""
    from pipeline.method import masking

    monkeypatch.setattr(masking, "BLOCKS", 1)
    d = draw((14, 14), 0.75, range(50))
    _, masked, _ = select("block", d)
    assert masked.shape == (50, 147)
    noise = words(d.sample, seed=3, epoch=1, stream=0, count=196)
    priority = POLICIES["block"](d)
    single = 0
    for b in range(50):
        alone = [p for p in masked[b].tolist() if priority[b, p] < 2**32]
        free = [p for p in range(196) if priority[b, p] < 2**32]
        assert sorted(alone) == sorted(sorted(free, key=lambda p: noise[b, p])[-len(alone) :])
        single += len(alone)
    assert single > 100


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("grid", [(14, 14), (7, 5)])
def test_a_mask_depends_on_seed_epoch_sample_and_view_only(policy, grid):
    sample = torch.arange(40)
    together = select(policy, draw(grid, 0.6, sample))[0]
    ranks = [select(policy, draw(grid, 0.6, sample[r::4]))[0] for r in range(4)]
    for rank, part in enumerate(ranks):
        assert torch.equal(part, together[rank::4])
    for change in ({"seed": 4}, {"epoch": 2}, {"view": 1}):
        assert not torch.equal(select(policy, draw(grid, 0.6, sample, **change))[0], together)


def component_sizes(masked, grid):
    """Sizes of the 4-connected components of a set of patches."""
    rest, sizes = set(masked), []
    while rest:
        todo, size = [rest.pop()], 0
        while todo:
            p = todo.pop()
            size += 1
            row, column = divmod(p, grid[1])
            for r, c in (
                (row + 1, column),
                (row - 1, column),
                (row, column + 1),
                (row, column - 1),
            ):
                q = r * grid[1] + c
                if 0 <= r < grid[0] and 0 <= c < grid[1] and q in rest:
                    rest.remove(q)
                    todo.append(q)
        sizes.append(size)
    return sizes


def test_blocks_are_contiguous_where_random_patches_are_not():
    grid, mean = (14, 14), {}
    for policy in POLICIES:
        _, masked, _ = select(policy, draw(grid, 0.4, range(200)))
        sizes = [s for row in masked.tolist() for s in component_sizes(row, grid)]
        mean[policy] = sum(sizes) / len(sizes)
    assert mean["random"] < 6
    assert mean["block"] > 30  # of 79 masked patches


def test_blocks_are_drawn_as_beits():
    """16 of 14 x 14 patches at least; aspects log-uniform between 0.3 and its inverse, the middles
    of 256 equal steps."""
    assert SMALLEST * 14 * 14 == 16
    edges = torch.linspace(math.log(0.3), -math.log(0.3), 257, dtype=torch.float64)
    torch.testing.assert_close(ASPECTS.log(), (edges[1:] + edges[:-1]) / 2)


def test_blocks_vary_in_area_and_shape():
    """The first block of a sample: areas from 8 % to all that is masked, both tall and wide."""
    d = draw((14, 14), 0.75, range(2000))
    first = POLICIES["block"](d) == 32 << 32
    rows, columns = first.view(-1, 14, 14).any(2).sum(1), first.view(-1, 14, 14).any(1).sum(1)
    area = (rows * columns).double()
    # A block of aspect a is cut at the border of the grid, so only small areas are exact.
    assert 12 <= area.min() < 20
    assert area.max() > 130
    small = area < 60
    shape = (rows / columns)[small].log()
    assert shape.mean().abs() < 0.1  # as often tall as wide
    assert shape.min() < math.log(0.4)
    assert shape.max() > math.log(2.5)


@pytest.mark.parametrize("second", ["pixels", "complement", "independent", "none"])
@pytest.mark.parametrize("implementation", ["blocks", "random"])
def test_relations_of_the_second_view(second, implementation):
    """The relations that are fused into the kernel for `random` hold for every policy."""
    mask = "block" if implementation == "blocks" else "random"
    name = "mae" if second == "pixels" else "rmae"
    recipe = tiny_recipe(name, f"views.mask={mask}", f"views.second={second}")
    masks = draw_masks(torch.arange(5), recipe.views, seed=0, epoch=2, grid=(4, 4))
    everything = set(range(16))
    for b in range(5):
        first = set(masks.visible1[b].tolist())
        assert len(first) == 4
        assert set(masks.hidden1[b].tolist()) == everything - first
        if second == "pixels":
            assert masks.visible2 is None
            assert masks.inverse2 is None
            continue
        shown = masks.visible2[b].tolist()
        if second == "complement":
            assert set(shown) == everything - first
        elif second == "none":
            assert shown == list(range(16))
        else:
            length, count = 16, visible_count(16, 0.25)
            own = Draw(torch.tensor([b]), 0, 2, 1, (4, 4), length - count)
            assert shown == select(mask, own)[0][0].tolist()
        slots = shown + sorted(everything - set(shown))
        assert [slots[n] for n in masks.inverse2[b].tolist()] == list(range(16))


def test_random_masks_by_priority_are_those_of_the_fused_kernel():
    recipe = tiny_recipe("mae")
    fused = draw_masks(torch.arange(9), recipe.views, seed=5, epoch=1, grid=(4, 4))
    plain = select("random", Draw(torch.arange(9), 5, 1, 0, (4, 4), 12))
    for a, b in zip(plain, (fused.visible1, fused.hidden1, fused.inverse1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["mae", "rmae", "rmae_dagger", "cmae"])
def test_methods_train_with_blocks(name):
    recipe = tiny_recipe(name, "views.mask=block", "views.mask_ratio=0.5")
    objective, teacher = build_objective(recipe)
    loss, _ = objective(images(), torch.arange(3), 0, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    views = make_views(images(), torch.arange(3), recipe=recipe, epoch=0, patch=PATCH)
    assert torch.equal(views.first.visible, select("block", Draw(
        torch.arange(3), 0, 0, 0, (4, 4), 8))[0])  # fmt: skip


def test_an_unknown_policy_is_refused_by_its_name():
    with pytest.raises(RecipeError, match=r"'views.mask': input should be random or block, got"):
        tiny_recipe("mae", "views.mask=checkerboard")


@pytest.mark.parametrize(
    ("overrides", "words_of_the_error"),
    [
        (["views.mask_ratio=0.999"], "views.mask_ratio 0.999 leaves none of the 16 patches"),
        (
            ["views.second=independent", "views.second_mask_ratio=0.95"],
            "views.second_mask_ratio 0.95 leaves none of the 16 patches visible",
        ),
        (
            ["views.second=complement", "views.mask_ratio=1e-20"],
            "views.mask_ratio 1e-20 masks none of the 16 patches",
        ),
    ],
)
def test_ratios_that_leave_nothing_are_refused_at_the_start(overrides, words_of_the_error):
    recipe = tiny_recipe("mae", *overrides)
    with pytest.raises(UserError, match=words_of_the_error):
        build_objective(recipe)


def test_priorities_fit_the_kernel():
    for policy in POLICIES:
        priority = POLICIES[policy](draw((14, 14), 0.75, range(100)))
        assert priority.dtype == torch.int64
        assert 0 <= priority.min() <= priority.max() < 2**46
    assert kernels.select_visible(priority, 49)[0].shape == (100, 49)

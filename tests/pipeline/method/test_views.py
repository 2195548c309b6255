"""(T1, T2): the sets, the region, the jitter; all functions of (seed, epoch, sample) alone."""

import pytest
import torch
from tiny import METHODS, PATCH, images, tiny_recipe

from pipeline.method.checks import visible_count
from pipeline.method.views import full_view, make_views


def views_of(name, *overrides, sample=(5, 6, 7), epoch=0):
    recipe = tiny_recipe(name, *overrides)
    image = images(len(sample))
    return make_views(image, torch.tensor(sample), recipe=recipe, epoch=epoch, patch=PATCH), image


def test_visible_count_is_the_integer_part():
    assert visible_count(196, 0.75) == 49
    assert visible_count(196, 0.25) == 147
    assert visible_count(49, 0.75) == 12


@pytest.mark.parametrize("name", METHODS)
def test_the_sets_of_every_method(name):
    views, _ = views_of(name)
    for b in range(3):
        first = set(views.first.visible[b].tolist())
        hidden = set(range(16)) - first
        assert len(first) == 4
        assert set(views.region[b].tolist()) == hidden
        if name == "mae":
            assert views.second is None
            continue
        second = set(views.second.visible[b].tolist())
        if name in ("rmae", "cmae"):
            assert second == hidden
        elif name == "rmae_ddagger":
            assert second == set(range(16))
        else:
            assert len(second) == 12
            taken = [p for p, w in zip(views.region[b].tolist(), views.weight[b], strict=True) if w]
            assert set(taken) == hidden & second
    if name != "rmae_dagger":
        assert views.weight is None


@pytest.mark.parametrize("name", METHODS)
def test_inverse_finds_every_visible_patch(name):
    views, _ = views_of(name)
    for view in filter(None, (views.first, views.second)):
        for b in range(3):
            for slot, position in enumerate(view.visible[b].tolist()):
                assert view.inverse[b, position] == slot


def test_views_depend_on_seed_epoch_and_sample_only():
    together, _ = views_of("cmae", sample=(5, 6, 7))
    alone, _ = views_of("cmae", sample=(6,))
    assert torch.equal(together.first.visible[1], alone.first.visible[0])
    for changed in (views_of("cmae", epoch=1)[0], views_of("cmae", "seed=1")[0]):
        assert not torch.equal(together.first.visible, changed.first.visible)


def test_two_views_of_independent_masks_differ():
    views, _ = views_of("rmae_dagger", sample=tuple(range(50)))
    hits = [len(set(a) & set(b)) for a, b in zip(
        views.first.visible.tolist(), views.second.visible.tolist(), strict=True)]  # fmt: skip
    assert min(hits) < max(hits)  # neither complement nor equal


@pytest.mark.parametrize("where", ["none", "whole", "visible"])
def test_where_the_jitter_acts(where):
    views, image = views_of(
        "cmae", f"views.jitter.where={where}", "views.jitter.probability=1.0", sample=(1, 2, 3)
    )
    if where == "none":
        assert views.first.image is image
    elif where == "whole":
        assert views.first.image is views.second.image is views.target
        assert not torch.equal(views.target, image)
    else:
        assert torch.equal(views.target, image)
        shown = (views.first.inverse < 4).view(3, 4, 4)
        pixels = shown.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
        assert not views.first.image[~pixels].any()  # hidden patches were never read
        assert not torch.equal(views.first.image[pixels], image[pixels])


def test_hidden_pixels_do_not_leak_into_a_jittered_view():
    recipe = tiny_recipe("cmae", "views.jitter.probability=1.0")
    sample, image = torch.tensor([3, 4]), images(2)
    views = make_views(image, sample, recipe=recipe, epoch=0, patch=PATCH)
    shown = (views.first.inverse < 4).view(2, 4, 4)
    pixels = shown.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[..., None]
    other = torch.where(pixels, image, images(2, seed=9))
    again = make_views(other, sample, recipe=recipe, epoch=0, patch=PATCH)
    assert torch.equal(views.first.image, again.first.image)


def test_full_view_shows_everything():
    view = full_view(images(2), PATCH)
    assert view.visible.tolist() == view.inverse.tolist() == [list(range(16))] * 2
    wide = full_view(images(2)[:, :8], PATCH)
    assert wide.visible.tolist() == wide.inverse.tolist() == [list(range(8))] * 2

"""Pictures: patches fold back to the image, true statistics undo norm_pix, grids have columns."""

import pytest
import torch
from tiny import PATCH, images, tiny_recipe

from pipeline import kernels
from pipeline.method.objective import build_objective
from pipeline.method.pictures import as_pixels, decode, draw, fold, paste, shown
from pipeline.method.views import make_views


def positions(batch=3, length=16):
    return torch.arange(length, dtype=torch.int32).expand(batch, length).contiguous()


def test_fold_undoes_patchify():
    image = images()
    patches = torch.stack(
        [
            torch.stack([image[b, r * 4 : r * 4 + 4, c * 4 : c * 4 + 4].flatten()
                         for r in range(4) for c in range(4)])
            for b in range(3)
        ]
    )  # fmt: skip
    assert torch.equal(fold(patches, (4, 4), PATCH), image)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_gives_the_image_back(norm_pix, monkeypatch):
    recipe = tiny_recipe("mae", f"measure.norm_pix={norm_pix}")
    objective, _ = build_objective(recipe)
    image = images()
    target = kernels.patch_target(
        image, positions(), patch=PATCH, mean=recipe.data.mean, std=recipe.data.std,
        norm_pix=norm_pix,
    )  # fmt: skip
    monkeypatch.setattr(objective.measure, "reconstruct", lambda *_: target)
    views = make_views(image, torch.arange(3), recipe=recipe, epoch=0, patch=PATCH)
    assert (as_pixels(decode(objective, views.first, image)).int() - image.int()).abs().max() <= 1


def test_shown_and_paste_split_the_image_at_the_mask():
    recipe = tiny_recipe("mae")
    image = images()
    view = make_views(image, torch.arange(3), recipe=recipe, epoch=0, patch=PATCH).first
    other = 255 - image
    seen, pasted = shown(view, (4, 4), PATCH), paste(other, view, (4, 4), PATCH)
    for b in range(3):
        for p in range(16):
            r, c = divmod(p, 4)
            cut = (b, slice(4 * r, 4 * r + 4), slice(4 * c, 4 * c + 4))
            visible = p in view.visible[b].tolist()
            assert torch.equal(pasted[cut], (image if visible else other)[cut])
            assert torch.equal(seen[cut], image[cut]) if visible else (seen[cut] == 127).all()


@pytest.mark.parametrize(("name", "columns"), [("mae", 4), ("rmae", 4), ("cmae", 3)])
def test_grids(name, columns):
    objective, _ = build_objective(tiny_recipe(name))
    image = images()
    grid = draw(objective, image, torch.arange(3))
    assert grid.shape == (3 * 16, columns * 16, 3)
    assert grid.dtype == torch.uint8
    assert torch.equal(grid[:16, :16], image[0])

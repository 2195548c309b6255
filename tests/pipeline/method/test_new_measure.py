"""A new measure is one file in method/measures and its line in MEASURES; nothing else changes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

SMOOTH_L1 = '''
"""Reconstruction with the smooth L1 distance (Huber), as data2vec has it."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from pipeline import kernels
from pipeline.config.measure_schema import MeasureRecipe, ReconstructionRecipe
from pipeline.method.measures.reconstruction import Reconstruction


class SmoothL1Recipe(ReconstructionRecipe):
    kind: Literal["smooth_l1"]
    beta: float = 1.0


class SmoothL1(Reconstruction):
    settings: ClassVar[type[MeasureRecipe]] = SmoothL1Recipe

    def distances(self, prediction, other, views):
        target = kernels.patch_target(
            views.target, views.region, patch=self.patch, mean=self.data.mean, std=self.data.std,
            norm_pix=self.recipe.norm_pix,
        )
        towards = [target] if other is None else [target, other]
        return torch.stack([
            F.smooth_l1_loss(prediction.float(), t.float(), beta=self.recipe.beta) for t in towards
        ])
'''

USE = """
import sys
from pipeline.config.recipe import RecipeError, load_recipe
assert "pipeline.method" not in sys.modules
recipe = load_recipe("mae", ["measure.kind=smooth_l1", *sys.argv[1:]])
assert (type(recipe.measure).__name__, recipe.measure.beta) == ("SmoothL1Recipe", 0.5)
assert recipe.measure.reconstructs and not recipe.teacher
for change, words in (
    ("measure.gamma=1", "valid keys here: kind, lambda, norm_pix, decoder, beta"),
    ("measure={kind: l3}", "'l3' is none of reconstruction, infonce, byol, smooth_l1"),
    ("views.second=crop", "measure smooth_l1 cannot compare two crops"),
):
    try:
        load_recipe("mae", ["measure.kind=smooth_l1", *sys.argv[1:], change])
        raise SystemExit(f"{change} was accepted")
    except RecipeError as error:
        assert words in str(error), error

import torch
from pipeline.config.recipe import dump_recipe, parse_recipe
import yaml
assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump") == recipe
from pipeline.cost.dry_run import dry_run
from pipeline.method.objective import build_objective
from pipeline.method.pictures import draw
assert dry_run(recipe, 2, "fp32").flops > 0
objective, teacher = build_objective(recipe)
assert teacher is None and objective.reconstructs
image = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
optimizer = torch.optim.SGD(objective.parameters(), 0.1)
losses = []
for step in range(3):
    loss, terms = objective(image, torch.arange(4), 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[2] < losses[1] < losses[0], losses
assert draw(objective, image, torch.arange(4)).shape == (64, 64, 3)
# By hand, from the prediction and the normalised pixels.
from pipeline.method.views import make_views
views = make_views(image, torch.arange(4), recipe=recipe, epoch=0, patch=4)
z = objective.encoder(*views.first)
prediction = objective.measure.decoder(z, views.first, views.region)
mean, std = (torch.tensor(s) for s in (recipe.data.mean, recipe.data.std))
pixels = ((image / 255 - mean) / std).view(4, 4, 4, 4, 4, 3).transpose(2, 3).reshape(4, 16, 48)
pixels = pixels.gather(1, views.region.long()[..., None].expand(-1, -1, 48))
pixels = (pixels - pixels.mean(-1, True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
gap = (prediction - pixels).abs()
expected = torch.where(gap < 0.5, gap**2 / (2 * 0.5), gap - 0.25).mean()
torch.testing.assert_close(objective(image, torch.arange(4), 0)[0], expected)
print("trained")
"""


def test_smooth_l1_is_one_file_and_one_line(tmp_path):
    for package in ("pipeline", "shard_tools"):
        shutil.copytree(ROOT / package, tmp_path / package)
    room = tmp_path / "pipeline/method/measures"
    (room / "smooth_l1.py").write_text(SMOOTH_L1)
    text = (room / "__init__.py").read_text()
    line = '    "byol": BYOL,\n'
    assert line in text
    text = text.replace(line, f'{line}    "smooth_l1": SmoothL1,\n')
    last = "from pipeline.method.teacher import Teacher\n"
    text = text.replace(last, f"from pipeline.method.measures.smooth_l1 import SmoothL1\n{last}")
    (room / "__init__.py").write_text(text)
    sizes = ["encoder={arch: vit_tiny_patch16_224, image_size: 16, options: {patch_size: 4, "
             "embed_dim: 16, depth: 2, num_heads: 2}}", "measure.beta=0.5",
             "measure.decoder={width: 8, depth: 1, heads: 2}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", USE, *sizes], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "trained\n", done.stderr[-2000:]


def test_nothing_asks_for_the_kind_of_a_measure():
    """What depends on the kind asks the measure: needs_teacher, reconstructs, …"""
    asked = re.compile(
        r"isinstance\([^)]*(Reconstruction|Contrast|InfoNCE|BYOL)"
        r"|measure\.kind\s*(==|!=|in\b)|\[\"measure\"\]\[\"kind\"\]\s*(==|!=)"
    )
    for package in ("pipeline", "eval"):
        for path in (ROOT / package).rglob("*.py"):
            assert not asked.search(path.read_text()), path

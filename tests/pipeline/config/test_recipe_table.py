"""pipeline/recipes/README.md: its commands are valid.

That it forgets no row of the paper is a matter of test_reproduce.py, which plans them all.
"""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.config.recipe import RECIPES, load_recipe

ROOT = Path(__file__).parents[3]
TEXT = (RECIPES / "README.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| `pretrain ([^`]+)` \|$", TEXT, re.M)


def options(command):
    """(recipe, overrides, data) of a command."""
    words = shlex.split(command)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert {key for key, _ in pairs} <= {"--recipe", "--set", "--data"}
    single = dict(pairs)
    return single["--recipe"], [v for k, v in pairs if k == "--set"], single.get("--data", "")


def resolved(command):
    path, overrides, _ = options(command)
    return load_recipe(ROOT / path, overrides)


@pytest.mark.parametrize(("name", "command"), ROWS, ids=lambda v: v[:40])
def test_commands_give_valid_recipes(name, command):
    recipe = resolved(command)
    _, _, data = options(command)
    few = re.search(r"train-10*(-|$)", data)
    assert bool(recipe.data.samples_per_epoch) == bool(few)
    assert not data or f"subset.py data/shards/train {data} " in TEXT


def test_tab_5_has_all_combinations():
    seen = set()
    for name, command in ROWS:
        recipe = resolved(command)
        if not recipe.name.endswith("_vits"):
            continue
        assert recipe.encoder.arch.startswith("vit_small")
        on = {"mask": recipe.views.mask_ratio > 0, "cutmix": recipe.views.cutmix > 0,
              "colour": recipe.views.jitter.where == "visible"}  # fmt: skip
        said = name.split(", ", 1)[1]
        for word, value in on.items():
            assert value == (word in said or said == "all"), (name, word)
        seen.add((recipe.name, *on.values()))
    assert len(seen) == 16


def test_mocov3_settings():
    recipe = load_recipe(RECIPES / "mocov3.yaml")
    o, m = recipe.optimizer, recipe.measure
    assert (o.base_lr, o.weight_decay.value, recipe.batch_size) == (1.5e-4, 0.1, 4096)
    assert (o.warmup_epochs, o.betas, recipe.ema.momentum, recipe.ema.schedule) == (
        40, (0.9, 0.999), 0.99, "cosine",
    )  # fmt: skip
    assert (m.heads.hidden, m.heads.out, m.heads.projector_layers, m.heads.predictor_layers) == (
        4096, 256, 3, 2,
    )  # fmt: skip
    assert m.heads.batch_norm
    assert m.symmetric
    assert m.scale_2tau
    assert (recipe.encoder.init, recipe.encoder.freeze_patch) == ("mocov3", True)

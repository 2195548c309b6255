"""Heads by their recipe: activation, norms, initial weights; and MoCo v3's crops."""

import math

import pytest
import torch
from tiny import tiny_recipe

from pipeline.config.ds_config import read_ds_config
from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import RECIPES, HeadsRecipe, RecipeError, load_recipe
from pipeline.distributed import Ranks
from pipeline.method.heads import GlobalBatchNorm, mlp
from pipeline.runtime.setup import loader_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_norm_is_torchs_in_fp32(dtype):
    """Also of rows so close to one another that eps counts, with a weight and a bias."""
    torch.manual_seed(0)
    ours, torchs = GlobalBatchNorm(6, affine=True), torch.nn.BatchNorm1d(6)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(ours, name).copy_(torch.randn(6))
            getattr(torchs, name).copy_(getattr(ours, name))
    x = (0.003 * torch.randn(4, 3, 6) + 1e-3).to(dtype)
    y = ours(x)
    assert y.dtype == dtype
    expected = torchs(x.float().flatten(0, 1)).view_as(x).to(dtype)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch_norm", "activation", "kind"),
    [
        (False, "auto", torch.nn.GELU),
        (True, "auto", torch.nn.ReLU),
        (True, "gelu", torch.nn.GELU),
        (False, "relu", torch.nn.ReLU),
    ],
)
def test_norm_and_activation_are_chosen_apart(batch_norm, activation, kind):
    torch.manual_seed(0)
    recipe = HeadsRecipe(hidden=24, out=12, batch_norm=batch_norm, activation=activation)
    head, x = mlp(16, recipe, 3), torch.randn(5, 1, 16)
    kinds = [type(part) for part in head]
    norm = [GlobalBatchNorm] * batch_norm
    linear = torch.nn.Linear
    assert kinds == [linear, *norm, kind, linear, *norm, kind, linear, *norm]
    y = x[:, 0]
    for number, layer in enumerate(p for p in head if isinstance(p, linear)):
        y = y @ layer.weight.T
        y = torch.nn.BatchNorm1d(len(layer.weight), affine=False)(y) if batch_norm else y
        y = kind()(y) if number < 2 else y
    torch.testing.assert_close(head(x)[:, 0], y, rtol=1e-5, atol=1e-5)


def test_gelu_with_batch_norm_is_a_recipe():
    heads = tiny_recipe("cmae", "measure.heads={batch_norm: true, activation: gelu}").measure.heads
    assert (heads.batch_norm, heads.activation) == (True, "gelu")
    with pytest.raises(RecipeError, match=r"heads\.activation"):
        tiny_recipe("cmae", "measure.heads.activation=tanh")


def test_initial_weights_of_mocos_heads_are_torchs_of_ours_xavier():
    torch.manual_seed(0)
    for batch_norm, bound in ((True, 1 / math.sqrt(64)), (False, math.sqrt(6 / (64 + 512)))):
        weight = mlp(64, HeadsRecipe(hidden=512, out=8, batch_norm=batch_norm), 2)[
            0
        ].weight.detach()
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize(("name", "expected"), [("mocov3", "bilinear"), ("mae", "bicubic")])
def test_crops_are_interpolated_as_by_the_reference(name, expected, tmp_path):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    plan = plan_recipe(read_ds_config("ds_configs/zero0.json"), recipe, 1)
    crop = loader_config(recipe, plan, str(tmp_path), Ranks.alone()).crop
    assert crop.interpolation == expected

"""f: against timm on whole images, against the loop oracle on visible patches; positions; files."""

import json

import oracle
import pytest
import torch
from safetensors.torch import save_file
from tiny import HEADS, PATCH, images, tiny_recipe

from pipeline.config.recipe import RECIPES, load_recipe
from pipeline.errors import UserError
from pipeline.method.encoder import Encoder
from pipeline.method.views import full_view, make_views
from pipeline.method.vit import build_vit, sincos_position
from pipeline.weights.load import random_encoder
from pipeline.weights.run import encoder_info, encoder_state, read_encoder


def normalised(image):
    mean, std = torch.tensor(oracle.MEAN), torch.tensor(oracle.STD)
    return ((image.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("rows", "columns", "width"), [(14, 14, 32), (7, 7, 16), (3, 5, 8)])
def test_position_table_entry_by_entry(rows, columns, width):
    table = sincos_position((rows, columns), width)
    torch.testing.assert_close(table, oracle.sincos(rows, columns, width), rtol=1e-6, atol=1e-6)
    assert not table[0].any()


def test_position_table_needs_a_width_divisible_by_four():
    with pytest.raises(UserError, match="divisible by 4"):
        sincos_position((2, 2), 6)


def test_a_whole_image_gives_timms_own_features(tmp_path):
    recipe = tiny_recipe("mae")
    encoder, image = Encoder(recipe), images()
    (tmp_path / "encoder").mkdir()
    save_file(
        encoder_state(encoder.state_dict(), encoder), tmp_path / "encoder/encoder.safetensors"
    )
    (tmp_path / "encoder/encoder.json").write_text(json.dumps(encoder_info(recipe, 7)))
    vit, info = read_encoder(tmp_path)
    assert info["step"] == 7
    with torch.no_grad():
        theirs = vit.forward_features(normalised(image))
        ours = encoder(*full_view(image, PATCH))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", ["drop", "replace"])
def test_masked_tokens_against_the_loop_oracle(hidden):
    recipe = tiny_recipe("cmae", "measure.tokens=mean_patch", f"encoder.masked_tokens={hidden}")
    encoder, image = Encoder(recipe), images()
    views = make_views(image, torch.arange(3), recipe=recipe, epoch=0, patch=PATCH)
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    for view in (views.first, views.second):
        ours = encoder(*view)
        for b in range(3):
            theirs = oracle.encode(
                weights, view.image[b], view.visible[b].tolist(), patch=PATCH, heads=HEADS,
                tokens=hidden == "replace",
            )  # fmt: skip
            torch.testing.assert_close(ours[b], theirs, rtol=1e-5, atol=1e-5)


def test_initialisation_is_maes():
    encoder = Encoder(load_recipe(RECIPES / "cmae.yaml")).requires_grad_(False)
    qkv = encoder.blocks[0].attn.qkv
    bound = (6 / (768 + 3 * 768)) ** 0.5
    assert qkv.weight.abs().max() <= bound
    assert qkv.weight.std() == pytest.approx(bound / 3**0.5, rel=0.01)
    patch = encoder.patch_embed["proj"]
    bound = (6 / (768 + 16 * 16 * 3)) ** 0.5
    assert patch.weight.abs().max() <= bound
    assert patch.weight.std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not qkv.bias.any()
    assert not patch.bias.any()
    assert encoder.cls_token.std() == pytest.approx(0.02, rel=0.2)
    assert encoder.mask_token.std() == pytest.approx(0.02, rel=0.2)
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 25
    assert {n.eps for n in norms} == {1e-6}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["encoder.image_size=18"], "image_size 18 is not divisible by the patch size 4"),
        (["encoder.arch=vit_nope"], "not a timm model"),
        (["encoder.options={patch_size: 4, nope: 1}"], "nope"),
        (["encoder.arch=resnet18", "encoder.options={}"], "resnet18"),
        (
            [
                "encoder.arch=vit_small_patch16_224",
                "encoder.options={patch_size: 4, reg_tokens: 1}",
            ],
            "plain ViT",
        ),
        (["encoder.options={img_size: 32}"], "image_size"),
        (["encoder.options={patch_size: 4, embed_dim: 16, num_heads: 3}"], "timm refuses"),
        (["encoder.options={patch_size: [4, 4]}"], "patch_size: input should be a valid integer"),
        (["encoder.options={depth: 0}"], "depth: input should be greater than 0, not 0"),
        (["encoder.options={mlp_ratio: wide}"], "mlp_ratio: input should be a valid number"),
    ],
)
def test_unusable_encoders_are_refused_in_one_sentence(overrides, words):
    with pytest.raises(UserError, match=words) as error:
        Encoder(tiny_recipe("mae", *overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        "in_chans: 1", "drop_path_rate: 0.1", "dynamic_img_size: true", "dynamic_img_pad: true",
        "patch_drop_rate: 0.5", "pos_drop_rate: 0.1", "attn_drop_rate: 0.1", "no_embed_class: true",
        "reg_tokens: 1", "class_token: false", "pre_norm: true", "final_norm: false",
        "global_pool: avg", "num_classes: 3", "fc_norm: true", "pos_embed: none",
        "act_layer: relu", "norm_layer: rmsnorm", "weight_init: jax", "pretrained: true",
    ],
)  # fmt: skip
def test_an_option_that_would_be_lost_is_refused_with_the_recipe(option):
    key = option.partition(":")[0]
    with pytest.raises(UserError, match=rf"encoder\.options.*{key} is not an.*patch_size") as e:
        tiny_recipe("mae", f"encoder.options={{{option}}}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "option",
    ["mlp_ratio: 2", "mlp_ratio: 2.5", "qkv_bias: false", "proj_bias: false", "qk_norm: true",
     "init_values: 0.1", "num_heads: 4", "depth: 1"],
)  # fmt: skip
def test_a_known_option_trains_and_is_read_back(option, tmp_path):
    """The encoder that is written gives the features of the one that was trained."""
    recipe = tiny_recipe("mae", f"encoder.options={{{option}}}")
    encoder, image = Encoder(recipe), images()
    encoder(*full_view(image, PATCH)).square().mean().backward()
    assert all(p.grad is not None for n, p in encoder.named_parameters()), option
    save_file(encoder_state(encoder.state_dict(), encoder), tmp_path / "encoder.safetensors")
    (tmp_path / "encoder.json").write_text(json.dumps(encoder_info(recipe, 1)))
    vit, _ = read_encoder(tmp_path)
    with torch.no_grad():
        ours, theirs = encoder(*full_view(image, PATCH)), vit.forward_features(normalised(image))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_convolutional_stem_is_no_patch_embedding_of_ours():
    with pytest.raises(UserError, match=r"not a plain ViT \(patches by one convolution"):
        Encoder(load_recipe(RECIPES / "mae.yaml", ["encoder.arch=vit_small_r26_s32_224"]))


def test_image_size_must_fit_the_patch_in_the_name():
    with pytest.raises(UserError, match="230 is not divisible by the patch size 16"):
        Encoder(load_recipe(RECIPES / "mae.yaml", ["encoder.image_size=230"]))


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no exported encoder"):
        read_encoder(tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps(encoder_info(tiny_recipe("mae"), 1)))
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        read_encoder(tmp_path)


def test_random_encoder_is_fixed_by_its_seed_and_leaves_the_random_state_alone():
    info = encoder_info(tiny_recipe("mae"), 0)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a, b, c = (random_encoder(info, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.blocks[0].attn.qkv.weight, b.blocks[0].attn.qkv.weight)
    assert not torch.equal(a.blocks[0].attn.qkv.weight, c.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(a.pos_embed[0], oracle.sincos(4, 4, 16), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "arch", ["vit_tiny_patch16_224", "vit_small_patch32_224", "vit_base_patch8_224"]
)
def test_any_plain_timm_vit_builds(arch):
    vit = build_vit(arch, {"img_size": 64, "depth": 1})
    assert vit.num_classes == 0

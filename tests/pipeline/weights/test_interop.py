"""facebookresearch/mae's key names: that architecture, written out plainly, gives our outputs."""

import pytest
import torch
from mae_layout import plain_mae, random_mae_state
from tiny import DECODER, PATCH, SIZE, images, tiny_recipe

from pipeline import load_reconstructor
from pipeline.errors import UserError
from pipeline.export import export
from pipeline.method.objective import build_objective
from pipeline.method.views import make_views
from pipeline.weights.interop import (
    from_hf,
    from_hf_decoder,
    from_mae,
    hf_arch,
    hf_eps,
    to_hf_mae,
    to_hf_vit,
    to_mae,
)


def test_a_mae_checkpoint_gives_that_architectures_output():
    state = random_mae_state()
    recipe = tiny_recipe("mae")
    objective, _ = build_objective(recipe)
    from_mae(objective, state)
    image = images()
    views = make_views(image, torch.arange(3), recipe=recipe, epoch=0, patch=PATCH)
    ours = objective.measure.decoder(objective.encoder(*views.first), views.first, views.region)
    for b in range(3):
        theirs = plain_mae(state, image[b], views.first.visible[b].tolist())
        torch.testing.assert_close(ours[b], theirs[views.region[b].long()], rtol=1e-4, atol=1e-4)


def test_there_and_back_is_the_same_state():
    state = random_mae_state()
    objective, _ = build_objective(tiny_recipe("rmae"))
    from_mae(objective, state)
    back = to_mae(objective)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].shape == value.shape, name
        torch.testing.assert_close(back[name], value, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_named():
    state = random_mae_state()
    objective, _ = build_objective(tiny_recipe("mae"))
    with pytest.raises(UserError, match=r"decoder\.head\.bias is missing"):
        from_mae(objective, {k: v for k, v in state.items() if k != "decoder_pred.bias"})
    with pytest.raises(UserError, match=r"head\.foo is not expected"):
        from_mae(objective, state | {"head.foo": torch.zeros(1)})
    with pytest.raises(UserError, match="cls_token has shape"):
        from_mae(objective, state | {"cls_token": torch.zeros(1, 1, 7)})
    with pytest.raises(UserError, match=r"encoder\.cls_token holds int64, not floating-point"):
        from_mae(objective, state | {"cls_token": state["cls_token"].long()})
    contrastive, _ = build_objective(tiny_recipe("cmae"))
    with pytest.raises(UserError, match="MAE recipe"):
        from_mae(contrastive, state)
    with pytest.raises(UserError, match="decoder"):
        to_mae(contrastive)


def test_the_hugging_face_config_by_its_values():
    recipe = tiny_recipe("mae", "views.mask_ratio=0.6", "measure.norm_pix=false")
    objective, _ = build_objective(recipe)
    common = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 16, "patch_size": 4, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02, "layer_norm_eps": 1e-6, "num_channels": 3, "qkv_bias": True,
    }  # fmt: skip
    assert to_hf_vit(objective)[1] == common | {
        "architectures": ["ViTModel"], "model_type": "vit", "encoder_stride": 4,
    }  # fmt: skip
    assert to_hf_mae(objective)[1] == common | {
        "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae",
        "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "mask_ratio": 0.6,
        "norm_pix_loss": False,
    }  # fmt: skip


def test_a_hugging_face_config_that_is_not_its_weights():
    objective, _ = build_objective(tiny_recipe("mae"))
    for state, config in (to_hf_vit(objective), to_hf_mae(objective)):
        assert hf_arch(config)[1]["depth"] == 2
        assert len(from_hf(state, 2)) == len(objective.encoder.state_dict())
        with pytest.raises(UserError, match="num_hidden_layers 1, but the weights go on"):
            from_hf(state, 1)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            for value in (0, None, "2", 2.0, True):
                with pytest.raises(UserError, match=f"{key} {value!r} is not a whole number"):
                    hf_arch(config | {key: value})
        assert (hf_eps(config), hf_eps({})) == (1e-6, 1e-12)
        for value in (None, "1e-6", 0, -1, float("nan"), float("inf")):
            with pytest.raises(UserError, match=r"layer_norm_eps .* is not a number above 0"):
                hf_eps({"layer_norm_eps": value})


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("init_values: 0.1", r"no place for blocks\.0\.ls1\.gamma"),
        ("qkv_bias: false", "needs .*qkv.bias"),
    ],
)
def test_what_hugging_faces_vit_lacks_is_refused(option, words):
    objective, _ = build_objective(tiny_recipe("mae", f"encoder.options={{{option}}}"))
    for write in (to_hf_vit, to_hf_mae):
        with pytest.raises(UserError, match=words):
            write(objective)


def test_a_recipe_that_contradicts_the_file_where_no_shape_shows_it_is_refused(tmp_path):
    """Heads of facebookresearch/mae's decoders (16) and encoders, and its pixels."""
    big = {"width": 64, "decoder": 512, "depth": 1}
    torch.save({"model": random_mae_state(**big)}, tmp_path / "mae.pth")
    sets = [*SIZE, "encoder.options={patch_size: 4, embed_dim: 64, depth: 1, num_heads: 2}"]
    wide = "measure.decoder={{width: 512, depth: 1, heads: {}}}"
    good = load_reconstructor(tmp_path / "mae.pth", "mae", [*sets, wide.format(16)])
    assert good.recipe.measure.decoder.heads == 16
    for more, words in (
        ([wide.format(8)], r"has measure\.decoder\.heads 16, the recipe 8; set"),
        ([wide.format(16), "data.mean=[0.5, 0.5, 0.5]"], r"has data\.mean \[0\.485"),
    ):
        with pytest.raises(UserError, match=words):
            load_reconstructor(tmp_path / "mae.pth", "mae", [*sets, *more])


def test_our_own_file_says_its_heads(tmp_path):
    objective, _ = build_objective(tiny_recipe("mae", "data.std=[0.2, 0.2, 0.2]"))
    export(objective, "mae", tmp_path / "x.pth")
    sets = [*SIZE, *DECODER, "data.std=[0.2, 0.2, 0.2]"]
    load_reconstructor(tmp_path / "x.pth", "mae", sets)
    for more, key in (
        ("encoder.options.num_heads=4", r"encoder\.options\.num_heads 2"),
        ("measure.decoder.heads=4", r"measure\.decoder\.heads 2"),
        ("data.std=[0.2, 0.2, 0.3]", r"data\.std"),
    ):
        with pytest.raises(UserError, match=f"has {key}"):
            load_reconstructor(tmp_path / "x.pth", "mae", [*sets, more])


def test_a_file_without_a_decoder_reconstructs_nothing(tmp_path):
    state = {k: v for k, v in random_mae_state().items() if "decoder" not in k}
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="with a decoder"):
        load_reconstructor(tmp_path / "x.pth", "mae", [*SIZE, *DECODER])


def test_a_decoder_of_hugging_face_as_transformers_5_names_it():
    objective, _ = build_objective(tiny_recipe("mae"))
    state, _ = to_hf_mae(objective)
    renamed = {
        k.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): v
        for k, v in state.items()
    }
    assert renamed.keys() != state.keys()
    found = from_hf_decoder(renamed)
    mine = {k: v for k, v in objective.state_dict().items() if k.startswith("measure.")}
    assert found.keys() == mine.keys()
    assert all(torch.equal(found[k], v) for k, v in mine.items())

"""facebookresearch/mae's key names: that architecture, written out plainly, gives our outputs."""

import pytest
import torch
from mae_layout import plain_mae, random_mae_state
from tiny import PATCH, images, tiny_recipe

from pipeline.errors import UserError
from pipeline.method.interop import from_mae, to_hf_mae, to_hf_vit, to_mae
from pipeline.method.objective import build_objective
from pipeline.method.views import make_views


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

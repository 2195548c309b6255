"""Initial weights and the position table, by their constants."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from pipeline.errors import UserError
from pipeline.method.vit import build_vit, init_as_mocov3, init_weights, is_plain, sincos_position

OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    vit = build_vit("vit_tiny_patch16_224", OPTIONS)
    init_weights(vit)
    return vit.requires_grad_(False)


def test_init_is_xavier_uniform_with_zero_biases(vit):
    """Uniform in ± sqrt(6 / (in + out)); the patch embedding as the linear from p·p·3 values."""
    block = vit.blocks[0]
    for weight, fan in (
        (block.attn.qkv.weight, 192 + 3 * 192),
        (block.mlp.fc1.weight, 192 + 768),
        (vit.patch_embed.proj.weight, 3 * 64 + 192),
    ):
        bound = math.sqrt(6 / fan)
        assert bound * 0.99 < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    for name, value in vit.named_parameters():
        if name.endswith(".bias"):
            assert not value.any(), name
        if "norm" in name and name.endswith(".weight"):
            assert torch.equal(value, torch.ones_like(value)), name
    assert vit.cls_token.std() == pytest.approx(0.02, rel=0.12)


def test_mocov3s_init_has_three_linears_and_a_tiny_cls_token(vit):
    init_as_mocov3(vit)
    bound = math.sqrt(6 / (192 + 192))
    for part in vit.blocks[0].attn.qkv.weight.chunk(3):
        assert bound * 0.99 < part.abs().max() <= bound
    assert vit.cls_token.std() == pytest.approx(1e-6, rel=0.2)


def test_mocov3s_init_of_blocks_with_several_attentions():
    vit = build_vit("vit_small_patch16_18x2_224", OPTIONS | {"embed_dim": 64, "num_heads": 2})
    init_weights(vit)
    init_as_mocov3(vit.requires_grad_(False))
    for branch in vit.blocks[0].attns:
        for part in branch.attn.qkv.weight.chunk(3):
            assert math.sqrt(6 / 128) * 0.97 < part.abs().max() <= math.sqrt(6 / 128)


def test_what_timm_refuses_without_a_reason_is_told_by_its_condition():
    with pytest.raises(UserError, match=r"timm refuses vit_giant_patch14_dinov2 .* % 2 == 0"):
        build_vit("vit_giant_patch14_dinov2", OPTIONS | {"embed_dim": 16, "num_heads": 1})


@pytest.mark.parametrize("row_first", [False, True])
def test_sincos_by_hand(row_first):
    table = sincos_position((2, 3), 16, row_first=row_first)
    assert not table[0].any()
    for row in range(2):
        for column in range(3):
            first, second = (row, column) if row_first else (column, row)
            expected = [
                f(c / 10000 ** (2 * i / 8))
                for c in (first, second)
                for f in (math.sin, math.cos)
                for i in range(4)
            ]
            assert table[1 + 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def kind(**options):
    """A ViT of one narrow block, with the options that f knows or does not know."""
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    return VisionTransformer(**shape | {"num_classes": 0} | options)


def test_plain_is_what_f_has_and_no_more():
    """Of a ViT with any one part more or less f would leave that part out."""
    assert is_plain(kind())
    for options in (
        {"in_chans": 1}, {"dynamic_img_size": True}, {"reg_tokens": 1}, {"pre_norm": True},
        {"class_token": False, "global_pool": "avg"}, {"final_norm": False}, {"pos_embed": "none"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False, "reg_tokens": 1},
        {"no_embed_class": True}, {"embed_norm_layer": torch.nn.LayerNorm},
    ):  # fmt: skip
        assert not is_plain(kind(**options)), options

    class Other(VisionTransformer):
        pass

    vit = kind()
    vit.__class__ = Other
    assert not is_plain(vit)

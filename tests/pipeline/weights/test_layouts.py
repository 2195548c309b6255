"""What a project's code fixes and no name says (heads, eps, pixels): set as there, or refused."""

import argparse
import re

import pytest
import timm
import torch

from pipeline import load_encoder
from pipeline.errors import UserError
from pipeline.method.vit import sincos_position
from pipeline.weights import layouts
from pipeline.weights.files import Found
from pipeline.weights.layouts import fix_norms

IMAGENET, HALF = [0.485, 0.456, 0.406], [0.5, 0.5, 0.5]
SMALL = {"img_size": 32, "depth": 2}


def model(arch="vit_small_patch16_224", **more):
    torch.manual_seed(1)
    vit = timm.create_model(arch, num_classes=0, **SMALL | more).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return vit


def write(path, vit, prefix="", box=None, **beside):
    state = {prefix + k: v for k, v in vit.state_dict().items()}
    torch.save(({box: state} | beside) if box else state, path)
    return path


def same_tokens(found, vit):
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.forward_features(pixels), vit.forward_features(pixels))


@pytest.mark.parametrize(
    ("prefix", "box", "arch", "width", "heads"),
    [
        # MoCo v3's ViT-S is not timm's.
        ("module.base_encoder.", "state_dict", "vit_small_patch16_224", 384, 12),
        ("module.base_encoder.", "state_dict", "vit_base_patch16_224", 768, 12),
        ("backbone.", "teacher", "vit_small_patch16_224", 384, 6),
        ("module.backbone.", "teacher", "vit_base_patch16_224", 384, 6),
        ("", "model", "vit_base_patch16_224", 1024, 16),
        ("module.", "target_encoder", "vit_base_patch16_224", 1280, 16),
    ],
)
def test_heads_are_those_of_the_projects_code(tmp_path, prefix, box, arch, width, heads):
    vit = model(arch, embed_dim=width, num_heads=heads)
    path = write(tmp_path / "x.pth", vit, prefix, box)
    found, info = load_encoder(path, arch=arch, options=SMALL | {"embed_dim": width})
    assert {block.attn.num_heads for block in found.blocks} == {heads}
    same_tokens(found, vit)
    assert info["options"]["num_heads"] == heads
    assert f"{heads} heads" in info["note"]
    again = timm.create_model(arch, num_classes=0, **info["options"])
    assert again.blocks[0].attn.num_heads == heads


def test_other_heads_are_taken_where_asked_for_and_said(tmp_path):
    vit = model()
    path = write(tmp_path / "x.pth", vit, "module.base_encoder.", "state_dict")
    found, info = load_encoder(
        path, arch="vit_small_patch16_224", options={"num_heads": 6, "depth": 2}
    )
    same_tokens(found, vit)
    assert "6 heads (its own code has 12)" in info["note"]


@pytest.mark.parametrize(("box", "told"), [("model", ", 3 heads as vit_tiny_patch16_224 has"), (
    "state_dict", "as timm has them for vit_tiny_patch16_224, 3 heads;")])  # fmt: skip
def test_heads_that_no_project_fixes_are_said(tmp_path, box, told):
    """A ViT-Ti in MAE's code may have 12, as MAE-Lite's, by the same weights."""
    path = write(tmp_path / "x.pth", model("vit_tiny_patch16_224", num_heads=12), "", box)
    _, info = load_encoder(path, arch="vit_tiny_patch16_224", options=dict(SMALL))
    assert told in info["note"]
    _, info = load_encoder(path, arch="vit_tiny_patch16_224", options=SMALL | {"num_heads": 12})
    assert ", 12 heads;" in info["note"]


def test_the_norms_have_the_projects_eps_and_the_mlps_its_activation():
    vit = timm.create_model("vit_small_patch16_224", **SMALL)
    for block in vit.blocks:
        block.norm1.eps = 1e-5  # as in CLIP's of timm
    fix_norms(vit, layouts.TIMM, "x")
    assert vit.blocks[0].norm1.eps == 1e-5
    fix_norms(vit, layouts.DINO, "x")
    assert {m.eps for m in vit.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    vit.blocks[1].mlp.act = torch.nn.GELU(approximate="tanh")
    with pytest.raises(UserError, match="DINO exact GELU"):
        fix_norms(vit, layouts.DINO, "x")


@pytest.mark.parametrize(
    ("prefix", "box", "arch", "mean"),
    [
        ("", None, "vit_small_patch16_224", HALF),  # timm's own file: what timm has for the name
        ("", None, "vit_small_patch16_224.dino", IMAGENET),
        ("_orig_mod.", "state_dict", "vit_small_patch16_224", HALF),
        ("", "model", "vit_small_patch16_224", IMAGENET),
        ("model.", None, "vit_small_patch16_224", HALF),  # a wrapper, as module. is
        ("image_encoder.", None, "vit_small_patch16_224", IMAGENET),  # and no SAM
        ("base_encoder.", "state_dict", "vit_small_patch16_224", IMAGENET),
        ("", "model", "beit_base_patch16_224", HALF),
        ("", "model", "deit3_small_patch16_224", IMAGENET),
        ("", "model", "beitv2_base_patch16_224", IMAGENET),
    ],
)
def test_mean_and_std_are_the_projects(tmp_path, prefix, box, arch, mean):
    width = {"embed_dim": 384, "num_heads": 12 if "base_encoder" in prefix else 6}
    path = write(tmp_path / "x.pth", model(arch.split(".")[0], **width), prefix, box)
    _, info = load_encoder(path, arch=arch, options=SMALL | width)
    assert info["mean"] == pytest.approx(mean)
    assert f"mean and std {mean[0]:g}," in info["note"]
    overlay = {"pretrained_cfg_overlay": {"std": [0.1, 0.2, 0.3]}}
    _, info = load_encoder(path, arch=arch, options=SMALL | width | overlay)
    assert (info["mean"], info["std"]) == (pytest.approx(mean), [0.1, 0.2, 0.3])
    assert "pretrained_cfg_overlay" not in info["options"]


def clips_names(state):
    """timm's names of a ViT → those of CLIP (OpenAI, OpenCLIP), with its projection and texts."""
    swaps = {
        "patch_embed.proj": "conv1", "norm_pre": "ln_pre", "blocks.": "transformer.resblocks.",
        "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "norm1": "ln_1",
        "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    found = {"proj": torch.ones(48, 8)}
    for name, value in state.items():
        for ours, theirs in swaps.items():
            name = name.replace(ours, theirs)
        found[name.replace("norm.", "ln_post.")] = value
    found["class_embedding"] = found.pop("cls_token")[0, 0]
    found["positional_embedding"] = found.pop("pos_embed")[0]
    texts = {"positional_embedding": torch.ones(77, 8), "logit_scale": torch.ones(())}
    return {f"visual.{k}": v for k, v in found.items()} | texts


@pytest.mark.parametrize(("prefix", "box"), [("", None), ("module.", "state_dict"), ("", "model")])
def test_a_file_of_clip_with_its_projection(tmp_path, prefix, box):
    arch, width = "vit_base_patch16_clip_224", {"embed_dim": 48, "num_heads": 3, "depth": 2}
    vit = model(arch, **width)
    state = {prefix + k: v for k, v in clips_names(vit.state_dict()).items()}
    path = tmp_path / "x.pt"
    torch.save({box: state} if box else state, path)
    found, info = load_encoder(path, arch=arch, options=width)  # at the size of its own table
    same_tokens(found, vit)
    assert info["mean"][0] == pytest.approx(0.4815, abs=1e-4)
    with pytest.raises(UserError, match=r"its patches are 16 pixels wide, those of .* 8"):
        load_encoder(path, arch=arch, options=width | {"patch_size": 8})


@pytest.mark.parametrize("box", [None, "model"])
@pytest.mark.parametrize("quick", ["", "quickgelu_"])
def test_clips_visual_tower_alone(tmp_path, box, quick):
    """model.visual.state_dict() of OpenAI's or OpenCLIP's; its GELU is told, which no weight is."""
    arch, width = f"vit_base_patch16_clip_{quick}224", {"embed_dim": 48, "num_heads": 3, "depth": 2}
    vit = model(arch, **width)
    state = clips_names(vit.state_dict())
    state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    path = tmp_path / "x.pt"
    torch.save({box: state} if box else state, path)
    found, info = load_encoder(path, arch=arch, options=width)
    same_tokens(found, vit)
    said = "run QuickGELU" if quick else r"run GELU \(for QuickGELU, .*--arch .*_clip_quickgelu_224"
    assert re.search(said, info["note"])
    for plain in ("vit_base_patch16_224", "beit_base_patch16_224"):
        with pytest.raises(UserError, match=r"CLIP's visual tower, .* give an --arch such as"):
            load_encoder(path, arch=plain, options=width)


@pytest.mark.parametrize(("prefix", "box"), [("vit.", None), ("", "model"), ("backbone.", None)])
def test_a_word_alone_does_not_outdo_what_timm_says_of_the_architecture(tmp_path, prefix, box):
    """Pixels of encoders that are no plain ViT, and of those whose tag says whose they are."""
    width = {"embed_dim": 48, "num_heads": 3}
    vit = model("vit_base_patch16_siglip_gap_224", **width)
    path = write(tmp_path / "x.pth", vit, prefix, box)
    found, info = load_encoder(path, arch="vit_base_patch16_siglip_gap_224", options=width | SMALL)
    same_tokens(found, vit)
    assert info["mean"] == pytest.approx(HALF)
    assert "as timm has them for vit_base_patch16_siglip_gap_224" in info["note"]
    plain = write(tmp_path / "y.pth", model(), prefix, box)
    for tag, mean in (("", IMAGENET), (".augreg_in21k", HALF), (".dino", IMAGENET)):
        _, info = load_encoder(plain, arch=f"vit_small_patch16_224{tag}", options=SMALL)
        assert info["mean"] == pytest.approx(mean), tag


def test_moco_v3_is_known_by_its_positions_where_no_name_says_it(tmp_path):
    """Its linear probe keeps the encoder below `module.` alone: 12 heads are timm's 6 there."""
    vit = model(num_heads=12)
    with torch.no_grad():
        vit.pos_embed.copy_(sincos_position((2, 2), 384, row_first=True))
    for dtype in (torch.float32, torch.float16):
        state = {f"module.{k}": v.to(dtype) for k, v in vit.state_dict().items()}
        head = {"module.head.weight": torch.ones(5, 384)}
        content = {"arch": "vit_small", "state_dict": state | head}
        torch.save(content, tmp_path / "x.pth")
        found, info = load_encoder(
            tmp_path / "x.pth", arch="vit_small_patch16_224", options={"depth": 2}
        )
        assert found.blocks[0].attn.num_heads == 12
        assert info["mean"] == IMAGENET
    table = vit.state_dict()["pos_embed"].to_sparse()
    state = {"patch_embed.proj.weight": torch.ones(384, 3, 16, 16), "pos_embed": table}
    assert layouts.layout_of(Found(state, ()), {}) is layouts.TIMM


def test_beits_pretraining_has_one_bias_for_all_blocks(tmp_path):
    arch, width = "beit_base_patch16_224", {"embed_dim": 48, "num_heads": 3}
    vit = model(arch, **width, global_pool="token")
    state = vit.state_dict()
    table = state["blocks.0.attn.relative_position_bias_table"]
    state["blocks.1.attn.relative_position_bias_table"].copy_(table)
    alone = {k: v for k, v in state.items() if "relative" not in k}
    alone |= {
        "rel_pos_bias.relative_position_bias_table": table,
        "rel_pos_bias.relative_position_index": torch.zeros(5, 5, dtype=torch.int64),
        "mask_token": torch.ones(1, 1, 48), "lm_head.weight": torch.ones(7, 48),
    }  # fmt: skip
    torch.save({"model": alone}, tmp_path / "x.pth")
    found, info = load_encoder(tmp_path / "x.pth", arch=arch, options=SMALL | width)
    same_tokens(found, vit)
    assert info["note"].startswith("a file of BEiT")
    below = {f"encoder.{k}": v for k, v in alone.items()}
    decoder = {"decoder.0.weight": torch.ones(768, 48, 1, 1), "decoder.0.bias": torch.ones(768)}
    torch.save({"model": below | decoder}, tmp_path / "simmim.pth")
    found, info = load_encoder(tmp_path / "simmim.pth", arch=arch, options=SMALL | width)
    same_tokens(found, vit)
    assert info["mean"] == IMAGENET
    assert info["note"].startswith("a file of SimMIM")


@pytest.mark.parametrize("arch", ["eva_giant_patch14_224", "eva02_tiny_patch14_224"])
def test_evas_pretraining_has_its_norm_on_the_tokens(tmp_path, arch):
    """A mask token is to timm the sign to take it for the norm of the mean."""
    width = {"embed_dim": 48, "num_heads": 3, "patch_size": 16}
    vit = model(arch, **width, global_pool="token")
    head = {"mask_token": torch.ones(1, 1, 48), "lm_head.weight": torch.ones(7, 48)}
    torch.save({"model": vit.state_dict() | head}, tmp_path / "x.pth")
    found, _ = load_encoder(tmp_path / "x.pth", arch=arch, options=SMALL | width)
    same_tokens(found, vit)


def dinov3s_names(state):
    """timm's names of a DINOv3 with biases of q and v → Meta's."""
    swaps = {"reg_token": "storage_tokens", "gamma_": "ls", "rope.periods": "rope_embed.periods"}
    found = {"mask_token": torch.ones(1, 384)}
    for name, value in state.items():
        for ours, theirs in swaps.items():
            name = name.replace(ours, theirs)
        name = name + ".gamma" if name.endswith((".ls1", ".ls2")) else name
        if name.endswith("q_bias"):
            parts = (value, torch.full_like(value, 9.0), state[name.replace("q_bias", "v_bias")])
            name, value = name.replace("q_bias", "qkv.bias"), torch.cat(parts)
            found[name + "_mask"] = torch.cat([torch.ones(768), torch.zeros(384)])
        if not name.endswith("v_bias"):
            found[name] = value
    return found


def test_biases_of_dinov3_are_taken_or_refused(tmp_path, capsys):
    vit = model("vit_small_patch16_dinov3_qkvb")
    path = tmp_path / "x.pth"
    torch.save(dinov3s_names(vit.state_dict()), path)
    found, _ = load_encoder(path, arch="vit_small_patch16_dinov3_qkvb", options=SMALL)
    same_tokens(found, vit)
    with pytest.raises(UserError, match=r"qkv.bias is not 0.*give vit_small_patch16_dinov3_qkvb"):
        load_encoder(path, arch="vit_small_patch16_dinov3", options=SMALL)
    for name, value in vit.state_dict().items():
        if name.endswith("_bias"):
            value.zero_()
    torch.save(dinov3s_names(vit.state_dict()), path)
    found, _ = load_encoder(path, arch="vit_small_patch16_dinov3", options=SMALL)
    same_tokens(found, vit)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_gap_224"])
def test_a_random_encoder_has_the_pixels_that_are_said(arch):
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    width = {"embed_dim": 48, "num_heads": 3}
    vit, info = load_encoder("random", arch=arch, options=SMALL | width)
    same, told = load_encoder(
        "random", arch=arch, options=SMALL | width | {"pretrained_cfg_overlay": pixels}
    )
    assert told == info | pixels
    assert info["mean"] == IMAGENET
    same_tokens(same, vit)


def test_a_training_script_of_timm_says_architecture_and_pixels(tmp_path):
    args = argparse.Namespace(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    vit = model()
    path = write(tmp_path / "x.pth", vit, "", "state_dict", arch="vit_small_patch16_224", args=args)
    found, info = load_encoder(path, options={"depth": 2})
    same_tokens(found, vit)
    assert (info["mean"], info["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_the_files_own_image_size_is_taken(tmp_path):
    path = write(tmp_path / "x.pth", model(), "", "model")
    found, info = load_encoder(path, arch="vit_small_patch16_224", options={"depth": 2})
    assert found.patch_embed.img_size == (32, 32)
    assert info["options"]["img_size"] == 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 8}, r"patches are 8 pixels wide, those of vit_small_patch16_224 16"),
        ({"class_token": False, "global_pool": "avg"}, "not a square of patches and 1 further"),
        ({"reg_tokens": 2}, "has 2 register tokens, vit_small_patch16_224 0"),
        ({"qkv_bias": False}, "qkv.bias is missing"),
        ({"init_values": 0.1}, r"ls1\.gamma has no place"),
    ],
)
def test_another_architecture_is_refused(tmp_path, change, words):
    path = write(tmp_path / "x.pth", model(**change), "", "model")
    with pytest.raises(UserError, match=words) as error:
        load_encoder(path, arch="vit_small_patch16_224", options={"depth": 2})
    assert str(error.value).startswith(str(tmp_path / "x.pth"))


def test_dinov2_is_known_by_its_layer_scale():
    state = {"patch_embed.proj.weight": torch.ones(384, 3, 14, 14), "blocks.0.ls1.gamma": None}
    state |= {"cls_token": None}
    for words, layout in (
        (("teacher", "backbone"), layouts.DINO_V2),
        (("model",), layouts.DEIT_III),
        (("state_dict",), layouts.TIMM),
    ):
        assert layouts.layout_of(Found(state, words), {words[0]: {}}) is layout
    registers = Found(state | {"reg_token": None}, ("model",))
    assert layouts.layout_of(registers, {}) is layouts.TIMM
    state |= {"pos_embed": torch.ones(1, 5, 384), "mask_token": torch.ones(1, 384)}
    for words in ((), ("model",), ("teacher", "backbone")):  # as published, without any word
        assert layouts.layout_of(Found(state, words), {}) is layouts.DINO_V2
        registers = state | {"register_tokens": None}
        assert layouts.layout_of(Found(registers, words), {}) is layouts.DINO_V2_REGISTERS


def test_an_encoder_of_ibot_in_no_role_has_its_pixels(tmp_path):
    state = model().state_dict() | {"masked_embed": torch.zeros(1, 384)}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    _, info = load_encoder(tmp_path / "x.pth", arch="vit_small_patch16_224", options=dict(SMALL))
    assert info["mean"] == IMAGENET
    assert info["note"].startswith("a file of DINO")


def test_an_encoder_without_a_cls_token_gets_an_architecture_without_one(tmp_path):
    vit = model("vit_base_patch16_gap_224", embed_dim=384, num_heads=6)
    path = write(tmp_path / "x.pth", vit, "module.", "target_encoder")
    options = SMALL | {"embed_dim": 384}
    with pytest.raises(UserError, match=r"no cls token.* such as vit_base_patch16_gap_224"):
        load_encoder(path, arch="vit_small_patch16_224", options=dict(SMALL))
    found, _ = load_encoder(path, arch="vit_base_patch16_gap_224", options=options)
    same_tokens(found, vit)


def test_timms_own_name_is_not_contradicted():
    with pytest.raises(UserError, match="--arch vit_base_patch16_224: timm:vit_small_patch16_224"):
        load_encoder("timm:vit_small_patch16_224", arch="vit_base_patch16_224")


def test_mocos_convolutional_stem_is_refused(tmp_path):
    state = {"module.base_encoder.patch_embed.proj.0.weight": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="convolutional stem"):
        load_encoder(tmp_path / "x.pth", arch="vit_small_patch16_224")


MMPRETRAIN = [  # (timm's, mmpretrain's) as in its model zoo's files
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.0.norm1.", "layers.0.ln1."),
    ("blocks.0.norm2.", "layers.0.ln2."),
    ("blocks.0.mlp.fc1.", "layers.0.ffn.layers.0.0."),
    ("blocks.0.mlp.fc2.", "layers.0.ffn.layers.1."),
    ("blocks.0.ls1.gamma", "layers.0.attn.gamma1.weight"),
    ("blocks.0.ls2.gamma", "layers.0.ffn.gamma2.weight"),
    ("blocks.0.attn.", "layers.0.attn."),
    ("fc_norm.", "ln2."),
    ("norm.", "ln1."),
]


def mmpretrains(vit):
    """A model's weights as mmpretrain calls them."""
    found = {}
    for name, value in vit.state_dict().items():
        for block in ("0", "1"):
            for ours, theirs in MMPRETRAIN:
                ours, theirs = (part.replace(".0.", f".{block}.", 1) for part in (ours, theirs))
                if name.startswith(ours):
                    name = theirs + name.removeprefix(ours)
        found[name] = value
    return found


@pytest.mark.parametrize(
    ("arch", "more", "row_first", "heads", "mean"),
    [
        ("vit_base_patch16_224", {"embed_dim": 48}, None, 12, IMAGENET),
        ("vit_base_patch16_224", {"embed_dim": 384}, False, 6, IMAGENET),
        ("vit_base_patch16_224", {"embed_dim": 384}, True, 12, IMAGENET),  # MoCo v3's
        ("vit_base_patch16_224", {"embed_dim": 48, "global_pool": "avg"}, None, 12, IMAGENET),
        ("vit_small_patch14_dinov2", {"img_size": 28, "embed_dim": 384}, None, 6, IMAGENET),
        ("vit_base_patch16_224.augreg_in21k", {"embed_dim": 48}, None, 12, HALF),
    ],
)
def test_the_names_of_mmpretrain(tmp_path, arch, more, row_first, heads, mean):
    vit = model(arch, num_heads=heads, **more)
    if row_first is not None:
        with torch.no_grad():
            vit.pos_embed.copy_(sincos_position((2, 2), 384, row_first=row_first))
    state = {f"backbone.{k}": v for k, v in mmpretrains(vit).items()}
    assert not any("block" in name for name in state)
    beside = {f"momentum_encoder.module.0.{k}": v + 1 for k, v in mmpretrains(vit).items()} | {
        "neck.decoder_embed.weight": torch.ones(3, 3),
        "head.layers.head.weight": torch.ones(5, 3),
    }
    torch.save({"meta": {}, "state_dict": state | beside}, tmp_path / "x.pth")
    options = SMALL | more
    found, info = load_encoder(tmp_path / "x.pth", arch=arch, options=options)
    assert {block.attn.num_heads for block in found.blocks} == {heads}
    assert info["mean"] == mean
    assert "mmpretrain" in info["note"]
    size = options["img_size"]
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(found.forward_features(pixels), vit.forward_features(pixels))
        mine, theirs = (v.forward_head(v.forward_features(pixels), True) for v in (found, vit))
    assert torch.equal(mine, theirs)
    averaged, _ = load_encoder(tmp_path / "x.pth", arch=arch, options=options, ema=True)
    assert torch.equal(averaged.cls_token, vit.cls_token + 1)


@pytest.mark.parametrize(
    ("taken", "other", "average"),
    [
        ("teacher_backbone.vit.", "student_backbone.vit.", 0),  # DINO
        ("backbone.vit.", "student_backbone.vit.", 0),  # DINO in the benchmarks
        ("backbone.vit.", "anchor_backbone.vit.", 0),  # MSN
        ("backbone.vit.", "backbone_momentum.vit.", 1),  # MoCo
        ("backbone.", "momentum_backbone.", 1),  # solo-learn's
        ("teacher_embedding_model.wrapped_model._model.", "student_embedding_model.wrapped_model."
         "_model.", 0),  # lightly-train
    ],
)  # fmt: skip
def test_the_roles_of_lightly_and_solo_learn(tmp_path, taken, other, average):
    vit = model()
    state = {f"{taken}{k}": v for k, v in vit.state_dict().items()}
    state |= {f"{other}{k}": v + 1 for k, v in vit.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    for ema in (False, True):
        found, info = load_encoder(
            tmp_path / "x.ckpt", arch="vit_small_patch16_224", options={"depth": 2}, ema=ema
        )
        assert torch.equal(found.cls_token, vit.cls_token + average * ema)
        assert info["mean"] == IMAGENET
        assert "not taken: state_dict." in info["note"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit.embeddings.patch_embeddings.projection.weight", "names of transformers, .* folder"),
        ("embeddings.patch_embeddings.weight", "names of transformers, .* folder"),
        ("backbone.vit.conv_proj.weight", "torchvision's names"),
    ],
)
def test_names_of_which_no_file_is_read_are_said(tmp_path, name, said):
    torch.save({"state_dict": {name: torch.ones(8, 3, 4, 4)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=said):
        load_encoder(tmp_path / "x.pth", arch="vit_small_patch16_224")


def test_dinov3_in_a_role_has_timms_pixels(tmp_path):
    options = {"depth": 2, "embed_dim": 384, "num_heads": 6}
    vit = model("vit_large_patch16_dinov3.sat493m", **options)
    state = {f"backbone.{k}": v for k, v in dinov3s_names(vit.state_dict()).items()}
    torch.save({"teacher": state}, tmp_path / "x.pth")
    found, info = load_encoder(
        tmp_path / "x.pth", arch="vit_large_patch16_dinov3.sat493m", options=options
    )
    same_tokens(found, vit)
    assert info["mean"] == [0.430, 0.411, 0.296]

"""An encoder at another image size: sin-cos tables recomputed for ours and MoCo v3's, others
interpolated as their project does, by an independent hand."""

import json
import math

import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import tiny_recipe

from pipeline import build_objective, load_encoder
from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError
from pipeline.export import main as export
from pipeline.method.vit import sincos_position
from pipeline.weights.positions import resize_positions
from pipeline.weights.run import encoder_info, encoder_state

ARCH = "vit_tiny_patch16_224"
OPTIONS = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(params=["mae", "mocov3"])
def run(request, tmp_path):
    """A run's folder, of MAE's table and of MoCo v3's (row first)."""
    objective, _ = build_objective(tiny_recipe(request.param))
    folder = tmp_path / "run"
    (folder / "encoder").mkdir(parents=True)
    state = encoder_state(objective.encoder.state_dict(), objective.encoder)
    save_file(state, folder / "encoder/encoder.safetensors")
    info = json.dumps(encoder_info(objective.recipe, 3))
    (folder / "encoder/encoder.json").write_text(info)
    (folder / "recipe.yaml").write_text(dump_recipe(objective.recipe))
    full = {k: v.contiguous() for k, v in objective.state_dict().items()}
    save_file(full, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["run", "timm", "mae", "hf"])
@pytest.mark.parametrize("size", [8, 24, 32])
def test_our_tables_are_made_again(run, kind, size, tmp_path):
    source = run
    if kind != "run":
        source = tmp_path / {"timm": "x.safetensors", "mae": "x.pth", "hf": "x"}[kind]
        if export([str(run), "--format", kind, str(source)]):
            pytest.skip("MoCo v3 has no decoder")
    vit, info = load_encoder(source, options={"img_size": size})
    row_first = "mocov3" in (run / "recipe.yaml").read_text()
    assert info["options"]["img_size"] == size
    assert vit.patch_embed.img_size == (size, size)
    exact = sincos_position((size // 4, size // 4), 16, row_first=row_first)
    torch.testing.assert_close(vit.pos_embed[0], exact, rtol=0, atol=1e-6)
    if not row_first:
        by_hand = oracle.sincos(size // 4, size // 4, 16)
        torch.testing.assert_close(vit.pos_embed[0], by_hand, rtol=0, atol=1e-6)
    assert vit(torch.zeros(1, 3, size, size)).shape == (1, 16)
    trained = load_encoder(source)[0]
    assert torch.equal(vit.cls_token, trained.cls_token)


def foreign(path, table, box, prefix=""):
    vit = timm.create_model(ARCH, num_classes=0, img_size=16, **OPTIONS)
    state = vit.state_dict() | {"pos_embed": table}
    torch.save({box: {prefix + k: v for k, v in state.items()}}, path)
    return path


def bicubic(table, **how):
    image = table[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    image = F.interpolate(image, mode="bicubic", align_corners=False, **how)
    return torch.cat([table[:, :1], image.permute(0, 2, 3, 1).flatten(1, 2)], 1)


@pytest.mark.parametrize("size", [8, 24, 28])
def test_maes_and_learned_tables_are_interpolated_as_by_their_projects(size, tmp_path):
    """MAE interpolates its sin-cos table too (util/pos_embed.py), DINO by a factor of + 0.1."""
    grid = size // 4
    mae, learned = sincos_position((4, 4), 16)[None], torch.randn(1, 17, 16)
    scaled = bicubic(learned, scale_factor=(grid + 0.1) / 4, recompute_scale_factor=False)
    moco = sincos_position((grid, grid), 16, row_first=True)[None]
    for table, box, prefix, expected in (
        (mae, "model", "", bicubic(mae, size=(grid, grid))),
        (learned, "model", "", bicubic(learned, size=(grid, grid))),
        (learned, "teacher", "backbone.", scaled),
        (sincos_position((4, 4), 16, row_first=True)[None], "state_dict", "base_encoder.", moco),
    ):
        path = foreign(tmp_path / "x.pth", table, box, prefix)
        vit, _ = load_encoder(path, arch=ARCH, options=OPTIONS | {"img_size": size})
        torch.testing.assert_close(vit.pos_embed.detach(), expected)
        assert not torch.allclose(expected[:, -1], table[:, -1])


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2s_table_is_interpolated_as_in_its_code(registers, tmp_path):
    """By a factor of + 0.1, but antialiased to the size where there are registers."""
    named = "reg4_" * bool(registers)
    arch, options = f"vit_small_patch14_{named}dinov2", {"depth": 1, "embed_dim": 16}
    options |= {"num_heads": 2, "patch_size": 4}
    vit = timm.create_model(arch, num_classes=0, img_size=16, **options)
    state, learned = vit.state_dict(), torch.randn(1, 17, 16)
    state |= {"pos_embed": learned, "mask_token": torch.zeros(1, 16)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
    torch.save(state, tmp_path / "x.pth")
    vit, _ = load_encoder(tmp_path / "x.pth", arch=arch, options=options | {"img_size": 8})
    if registers:
        expected = bicubic(learned, size=(2, 2), antialias=True)[:, 1:]  # timm adds the cls part
        torch.testing.assert_close(vit.pos_embed[:, -4:].detach(), expected)
    else:
        expected = bicubic(learned, scale_factor=2.1 / 4, recompute_scale_factor=False)
        torch.testing.assert_close(vit.pos_embed.detach(), expected)


def test_a_finetuned_table_of_ours_is_interpolated():
    table = sincos_position((4, 4), 16)[None] + 0.01 * torch.randn(1, 17, 16)
    torch.testing.assert_close(
        resize_positions(table, 1, (6, 6), "exact"), bicubic(table, size=(6, 6))
    )


def test_a_table_saved_in_bf16_is_still_the_exact_one():
    table = sincos_position((4, 4), 16)[None]
    made = resize_positions(table.bfloat16(), 1, (6, 6), "exact")
    exact = sincos_position((6, 6), 16)[None]
    torch.testing.assert_close(made.float(), exact, rtol=0, atol=2**-8)


def test_a_table_of_no_square_is_refused():
    with pytest.raises(UserError, match="13 entries, not a square of patches and 1 further"):
        resize_positions(torch.zeros(1, 13, 8), 1, (2, 2), "bicubic")
    assert math.isqrt(12) ** 2 != 12


def test_another_size_of_a_random_encoder(run):
    vit, info = load_encoder(run, options={"img_size": 32}, random=True, seed=1)
    torch.testing.assert_close(vit.pos_embed[0], oracle.sincos(8, 8, 16), rtol=0, atol=1e-6)
    assert info["options"]["img_size"] == 32

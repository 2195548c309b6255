"""Pictures from inside encoders: components, attention, similarity against plain computations."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_helpers import coloured_images, spoil_encoder, write_encoder, write_shards
from PIL import Image

from eval import reconstruct, visualise
from eval.reporting import gallery
from eval.shared import inside
from eval.shared.options import EncoderChoice
from pipeline.errors import UserError
from pipeline.weights.load import load_encoder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visualise")
    write_shards(folder / "shards", *coloured_images(9, 3, seed=1))
    write_encoder(folder / "run")
    return folder


def test_components_are_the_principal_ones() -> None:
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6)).Q
    truth = torch.randn(400, 3) * torch.tensor([9.0, 4.0, 2.0])
    x = truth @ axes[:3] + 0.01 * torch.randn(400, 6) + 5
    scores = inside.components(x, 3)
    for number in range(3):
        assert np.corrcoef(scores[:, number], truth[:, number])[0, 1] ** 2 > 0.99
        column = scores[:, number]
        assert column[column.abs().argmax()] > 0
    assert scores.var(0)[0] == pytest.approx(81, rel=0.2)


def test_otsu_splits_two_groups() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(300) * 0.1, 4 + torch.randn(40) * 0.1])
    assert 1 < inside.otsu(values) < 3  # the middle of the gap
    assert inside.otsu(torch.ones(5)) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_object_is_what_stands_in_the_middle(sign: int) -> None:
    torch.manual_seed(0)
    grid = (6, 8)
    object_ = torch.zeros(grid, dtype=torch.bool)
    object_[2:4, 3:6] = True
    tokens = 0.1 * torch.randn(2, 48, 5)
    tokens[:, object_.flatten(), 0] += 3 * sign
    mask = inside.foreground(tokens, grid)
    assert torch.equal(mask, object_.flatten().expand(2, -1))
    colours = inside.pca_colours(tokens, grid, mask)
    assert colours.shape == (2, 6, 8, 3)
    assert (colours[0][~object_] == 0).all()
    assert (colours[0][object_] >= 25).all()  # never black


def test_cosine_is_one_at_the_chosen_patch() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 12, 5)
    maps = inside.cosine_map(tokens, (3, 4), (2, 1))
    assert maps.shape == (2, 3, 4)
    assert maps[:, 2, 1].tolist() == pytest.approx([1, 1])
    expected = F.cosine_similarity(tokens[1, 3], tokens[1, 9], dim=0)
    assert maps[1, 0, 3].item() == pytest.approx(expected.item(), abs=1e-6)
    assert visualise.patch_at((0.99, 0.5), (3, 4)) == (1, 3)  # x is the column
    assert visualise.patch_at((1, 1), (3, 4)) == (2, 3)


def test_attention_is_that_of_the_cls_token(home: Path) -> None:
    vit, _ = load_encoder(home / "run")
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16)
    found, from_cls = inside.last_attention(vit, pixels)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    x = vit.blocks[-1].norm1(vit.blocks[0](x))
    q, k, _ = vit.blocks[-1].attn.qkv(x).view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 16**0.5).softmax(-1)
    assert from_cls
    torch.testing.assert_close(found, weights[:, :, 0, 1:].detach())
    assert vit.blocks[-1].attn.fused_attn  # as it was


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}),
        ("beit_base_patch16_224", {"img_size": 64, "depth": 1}),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 1}),
        ("samvit_base_patch16", {"img_size": 64, "depth": 3}),
        ("vit_small_patch16_18x2_224", {"depth": 1}),
    ],
)
def test_attention_of_every_family(arch: str, options: dict) -> None:
    vit, _ = load_encoder("random", arch=arch, options={"img_size": 64} | options)
    height, width = vit.patch_embed.img_size
    maps, from_cls = inside.last_attention(vit, torch.randn(2, 3, height, width))
    assert maps.shape[0::2] == (2, vit.patch_embed.num_patches)
    assert maps.shape[1] > 1
    assert from_cls == (getattr(vit, "cls_token", None) is not None)
    assert (maps.sum(-1) <= 1 + 1e-5).all()


def test_attention_of_a_block_with_several_is_that_of_all_their_heads() -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    vit, _ = load_encoder("random", arch="vit_small_patch16_18x2_224", options=options)
    maps, _ = inside.last_attention(vit, torch.randn(2, 3, 32, 32))
    assert maps.shape == (2, 4, 16)
    assert not torch.equal(maps[:, :2], maps[:, 2:])
    assert all(branch.attn.fused_attn for branch in vit.blocks[0].attns)


def settings(home: Path, *more: str) -> visualise.Settings:
    words = ["--encoder", home / "run", "random", "--images", home / "shards"]
    words += ["--output", home / "look", *more]
    return visualise.settings_of(visualise.build_parser().parse_args([str(w) for w in words]))


def test_the_page_and_its_pictures(home: Path) -> None:
    more = ["--count", "3", "--size", "32", "--point", "0.5", "0.5", "--point", "0", "1"]
    names = visualise.draw(settings(home, *more))
    assert names == [
        "pca.png", "pca-object.png", "cosine-1.png", "cosine-2.png", "attention-1.png",
        "attention-2.png",
    ]  # fmt: skip
    cell = visualise.CELL + visualise.MARGIN
    assert visualise.CELL >= 224
    assert Image.open(home / "look/pca.png").width == 3 * cell + visualise.MARGIN
    assert Image.open(home / "look/attention-1.png").width == 4 * cell + visualise.MARGIN
    assert Image.open(home / "look/pca.png").height > 3 * cell
    text = (home / "look/index.html").read_text()
    assert text.count("data:image/png;base64,") == 6
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "32 pixels, 8 × 8 patches" in text
    settings(home, *more)  # what it wrote itself may be written again


def test_encoders_whose_folders_are_called_alike_are_told_apart() -> None:
    sources = ("a/run", "b/run", "timm:vit_base", "random")
    names = visualise.names_of([EncoderChoice(source) for source in sources])
    assert names == ["a/run", "b/run", "timm:vit_base", "random"]


def test_random_takes_the_architecture_of_the_first(home: Path) -> None:
    s = settings(home)
    first, second = visualise.choices(s.encoders, s.archs, s.options, s.size, s.seed)
    assert (second.source, second.random) == (first.source, True)
    words = ["--encoder", "random", "--images", str(home / "shards")]
    args = visualise.build_parser().parse_args(words)
    with pytest.raises(UserError, match="random: needs --arch where it is the first"):
        visualise.settings_of(args)


def test_what_cannot_be_shown(home: Path) -> None:
    with pytest.raises(UserError, match=r"--point 1\.5 0: must be shares from 0 to 1"):
        settings(home, "--point", "1.5", "0")
    with pytest.raises(UserError, match="--count 0: must be at least 1"):
        settings(home, "--count", "0")
    with pytest.raises(UserError, match="2 names for 1 files and random"):
        settings(home, "--arch", "a", "b")
    with pytest.raises(UserError, match="--size 32: --options say img_size 64; give one of them"):
        settings(home, "--size", "32", "--options", "{img_size: 64}")


@pytest.mark.parametrize("name", ["index.html", "pca.png", "cosine-1.png", "attention-2.png"])
def test_what_others_wrote_stays(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<title>Holidays</title>")
    with pytest.raises(UserError, match=f"{name}: not written by eval/visualise.py; move it away"):
        settings(home, "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_no_utf8_is_shown_with_escapes(home: Path) -> None:
    section = gallery.Section(os.fsdecode(b"caf\xe9.png"), ())
    text = gallery.render_gallery("t", (), (section,))
    assert r"caf\udce9.png" in text
    text.encode()


def test_damaged_weights_are_named(home: Path) -> None:
    run = spoil_encoder(home / "run", home / "spoilt")
    words = ["--encoder", str(run), "--images", str(home / "shards"), "--output", str(home / "no")]
    s = visualise.settings_of(visualise.build_parser().parse_args(words))
    with pytest.raises(UserError, match=f"^{run}: the encoder gives features that are not finite;"):
        visualise.draw(s)
    assert not (home / "no").exists()


@pytest.mark.parametrize("module", [visualise, reconstruct])
def test_no_option_is_offered_that_does_nothing(module, capsys) -> None:
    with pytest.raises(SystemExit):
        module.build_parser().parse_args(["--help"])
    assert "--workers" not in capsys.readouterr().out

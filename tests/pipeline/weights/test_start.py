"""A fresh pretraining from weights that there are: which tensors, and that they are the same
function; another architecture is refused."""

import json

import oracle
import pytest
import timm
import torch
from mae_layout import plain_mae, random_mae_state
from safetensors.torch import save_file
from tiny import PATCH, images, tiny_recipe

from pipeline import build_objective, load_reconstructor
from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError
from pipeline.export import main as export
from pipeline.method.views import full_view, make_views
from pipeline.weights.run import encoder_info, encoder_state
from pipeline.weights.start import start_from

SAMPLE = torch.tensor([5, 1, 8])
TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def objective_of(name="mae", *overrides):
    return build_objective(tiny_recipe(name, *overrides))[0]


def reference_loss(state, image, visible, hidden):
    """MAE's loss, Eq. 3 with norm_pix, by hand: its predictions against normalised patches."""
    target = image.float() / 255
    mean, std = torch.tensor(oracle.MEAN), torch.tensor(oracle.STD)
    target = ((target - mean) / std).unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
    target = target.permute(0, 1, 3, 4, 2).reshape(16, -1)  # (row, column, channel)
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    error = (plain_mae(state, image, visible) - target).square().mean(1)
    return error[hidden].mean()


def test_mae_goes_on_from_a_file_in_its_layout_at_the_reference_loss(tmp_path):
    state = random_mae_state()
    torch.save({"model": state, "epoch": 3, "args": None}, tmp_path / "mae.pth")
    objective = objective_of()
    start = start_from(objective, str(tmp_path / "mae.pth"))
    assert (start.fresh, start.left, start.remade) == ([], [], [])
    assert sorted(start.taken) == sorted(objective.state_dict())
    image = images()
    loss, _ = objective(image, SAMPLE, 0)
    views = make_views(image, SAMPLE, recipe=objective.recipe, epoch=0, patch=PATCH)
    expected = [
        reference_loss(state, image[b], views.first.visible[b].tolist(), views.region[b].long())
        for b in range(3)
    ]
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert objective_of()(image, SAMPLE, 0)[0].item() != pytest.approx(loss.item(), rel=1e-2)


def write_run(folder, objective):
    (folder / "encoder").mkdir(parents=True)
    encoder = encoder_state(objective.encoder.state_dict(), objective.encoder)
    save_file(encoder, folder / "encoder/encoder.safetensors")
    (folder / "encoder/encoder.json").write_text(json.dumps(encoder_info(objective.recipe, 1)))
    (folder / "recipe.yaml").write_text(dump_recipe(objective.recipe))
    full = {k: v.contiguous() for k, v in objective.state_dict().items()}
    save_file(full, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["run", "encoder", "timm", "mae", "hf", "hf-mae"])
def test_our_runs_and_exports(kind, tmp_path):
    theirs = objective_of("rmae", "seed=4")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    run = write_run(tmp_path / "run", theirs)
    source = {"run": run, "encoder": run / "encoder"}.get(kind, tmp_path / "x")
    if kind in ("timm", "mae"):
        source = tmp_path / {"timm": "x.safetensors", "mae": "x.pth"}[kind]
    if kind not in ("run", "encoder"):
        assert export([str(run), "--format", kind, str(source)]) == 0
    mine = objective_of()
    start = start_from(mine, str(source))
    with_decoder = kind in ("run", "mae", "hf-mae")
    for name, value in theirs.state_dict().items():
        if name.startswith("encoder.") or with_decoder:
            torch.testing.assert_close(mine.state_dict()[name], value, msg=name)
            assert name in start.taken
        else:
            assert name in start.fresh
    lines = start.lines(str(source))
    assert lines[0].startswith(f"starts from {source}: {len(start.taken)} tensors taken, 0 resized")
    assert ("left fresh: measure.decoder" in "".join(lines)) != with_decoder


def test_a_run_whose_blocks_have_several_attentions(tmp_path):
    """Its heads are counted too: its own to start from it, and to reconstruct from an export."""
    arch = "encoder.arch=vit_small_patch16_18x2_224"
    theirs = objective_of("mae", arch, "seed=4")
    run, file = write_run(tmp_path / "run", theirs), tmp_path / "x.pth"
    assert export([str(run), "--format", "mae", str(file)]) == 0
    for source in (run, file):
        mine = objective_of("mae", arch)
        start_from(mine, str(source))
        assert all(map(torch.equal, mine.state_dict().values(), theirs.state_dict().values()))
        with pytest.raises(UserError, match=r"with 2 heads where the recipe's encoder has 4"):
            start_from(objective_of("mae", arch, "encoder.options.num_heads=4"), str(source))
    recipe = str(run / "recipe.yaml")
    assert load_reconstructor(file, recipe).grid == (4, 4)
    with pytest.raises(UserError, match=r"encoder\.options\.num_heads 2, the recipe 4"):
        load_reconstructor(file, recipe, ["encoder.options.num_heads=4"])


def test_a_hugging_face_vit_that_does_not_say_its_pixels_has_those_of_transformers(tmp_path):
    """As load_encoder takes it: mean and std 0.5, folded into the patch embedding."""
    theirs = objective_of("mae", "seed=4")
    run, source = write_run(tmp_path / "run", theirs), tmp_path / "vit"
    assert export([str(run), "--format", "hf", str(source)]) == 0
    (source / "preprocessor_config.json").unlink()
    mine = objective_of()
    start_from(mine, str(source))
    std = torch.tensor(mine.recipe.data.std)[:, None, None]
    found, expected = (o.encoder.patch_embed["proj"].weight for o in (mine, theirs))
    torch.testing.assert_close(found, expected * std / 0.5)


def test_another_image_size_makes_the_positions_again(tmp_path):
    run = write_run(tmp_path / "run", objective_of("mae", "seed=4"))
    mine = objective_of("mae", "encoder.image_size=24")
    expected = mine.encoder.pos_embed.clone()
    start = start_from(mine, str(run))
    assert start.remade == ["encoder.pos_embed", "measure.decoder.pos_embed"]
    assert torch.equal(mine.encoder.pos_embed, expected)
    assert start.fresh == []
    mine(images(size=24), SAMPLE, 0)


def test_contrast_from_mae_and_from_contrast(tmp_path):
    """Only the encoder of a MAE; encoder, mask token and heads of a C-MAE, or of its teacher."""
    mae = write_run(tmp_path / "mae", objective_of("mae", "seed=4"))
    mine = objective_of("cmae")
    start = start_from(mine, str(mae))
    assert "encoder.mask_token" in start.fresh
    assert any(name.startswith("measure.projector") for name in start.fresh)
    assert any(name.startswith("measure.decoder") for name in start.left)
    theirs, teacher = build_objective(tiny_recipe("cmae", "seed=4"))
    run = write_run(tmp_path / "cmae", theirs)
    start = start_from(mine, str(run))
    assert (start.fresh, start.left) == ([], [])
    assert torch.equal(mine.measure.projector[0].weight, theirs.measure.projector[0].weight)
    with pytest.raises(UserError, match="no checkpoint with an EMA teacher"):
        start_from(mine, str(run), ema=True)
    newest = run / "checkpoints/step-1"
    newest.mkdir(parents=True)
    (run / "checkpoints/latest").write_text("step-1\n")
    with torch.no_grad():
        teacher.encoder.cls_token.fill_(3.0)
    save_file(teacher.state_dict(), newest / "teacher.safetensors")
    start_from(mine, str(run), ema=True)
    assert bool((mine.encoder.cls_token == 3).all())


def foreign(arch="vit_tiny_patch16_224", **more):
    torch.manual_seed(2)
    vit = timm.create_model(arch, num_classes=0, **TIMM | more).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


def same_function(mine, vit, mean, std):
    """f on the recipe's pixels against timm's model on its own, with f's positions."""
    vit.pos_embed.data[:, 1:] = mine.encoder.pos_embed[:, 1:]
    image = images()
    mean, std = torch.tensor(mean), torch.tensor(std)
    pixels = ((image.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        ours, theirs = mine.encoder(*full_view(image, PATCH)), vit.forward_features(pixels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("box", "prefix", "mean", "std"),
    [
        ("teacher", "backbone.", oracle.MEAN, oracle.STD),  # DINO
        (None, "", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # timm's own
        ("model", "module.", oracle.MEAN, oracle.STD),  # DeiT
    ],
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_foreign_encoder_is_the_same_function_but_for_learned_positions(
    box, prefix, mean, std, scale, tmp_path
):
    """Layer scale, the cls token's position and other statistics of the pixels are folded in."""
    if scale and box is None:
        pytest.skip("timm's own")
    vit = foreign(init_values=scale)
    state = {prefix + k: v for k, v in vit.state_dict().items()}
    torch.save({box: state} if box else state, tmp_path / "x.pth")
    mine = objective_of()
    start = start_from(mine, str(tmp_path / "x.pth"))
    assert start.left == ["pos_embed (learned; f has fixed sin-cos positions)"]
    assert all(name.startswith("measure.") for name in start.fresh)
    same_function(mine, vit, mean, std)
    scaled = objective_of("mae", "encoder.options.init_values=0.1")
    if scale:
        start_from(scaled, str(tmp_path / "x.pth"))
        assert torch.equal(scaled.encoder.blocks[1].ls2.gamma, vit.blocks[1].ls2.gamma)


def test_mocov3_with_its_own_positions(tmp_path):
    vit = foreign()
    mocov3 = objective_of("mocov3")
    vit.pos_embed.data.copy_(mocov3.encoder.pos_embed)
    state = {f"module.base_encoder.{k}": v for k, v in vit.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    start = start_from(mocov3, str(tmp_path / "x.pth"))
    assert "encoder.pos_embed" in start.taken
    same_function(mocov3, vit, oracle.MEAN, oracle.STD)
    with pytest.raises(UserError, match=r"row first; set encoder\.init=mocov3"):
        start_from(objective_of(), str(tmp_path / "x.pth"))


def test_beit_without_its_relative_positions(tmp_path):
    vit = foreign("beit_base_patch16_224", use_abs_pos_emb=False)
    torch.save({"model": vit.state_dict()}, tmp_path / "x.pth")
    mine = objective_of()
    start = start_from(mine, str(tmp_path / "x.pth"))
    assert any("relative_position" in name for name in start.left)
    assert set(start.fresh) >= {"encoder.norm.weight", "encoder.norm.bias"}  # BEiT has fc_norm
    attention = mine.encoder.blocks[1].attn
    theirs = vit.blocks[1]
    bias = torch.cat([theirs.attn.q_bias, torch.zeros(16), theirs.attn.v_bias])
    torch.testing.assert_close(attention.qkv.bias, bias)
    folded = theirs.gamma_1[:, None] * theirs.attn.proj.weight
    torch.testing.assert_close(attention.proj.weight, folded)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["encoder.options.depth=3"], r"without encoder\.blocks\.2\."),
        (["encoder.options.depth=1"], r"with blocks\.1\..* no place"),
        (["encoder.options={embed_dim: 32}"], "shape|position table of"),
        (["encoder.options.patch_size=8"], r"proj\.weight has shape \[16, 3, 4, 4\]"),
        (["encoder.options.num_heads=4"], r"2 heads .* 4; set encoder\.options\.num_heads=2"),
        (["encoder.options.qkv_bias=false"], r"with blocks\.0\.attn\.qkv\.bias"),
        (["encoder.options.mlp_ratio=2"], r"mlp\.fc1.* has shape"),
        (["encoder.init=mocov3"], r"column first; set encoder\.init=mae"),
    ],
)
def test_another_architecture_is_one_sentence(overrides, words, tmp_path):
    run = write_run(tmp_path / "run", objective_of("mae", "seed=4"))
    with pytest.raises(UserError, match=words) as error:
        start_from(objective_of("mae", *overrides), str(run))
    assert str(run) in str(error.value)
    assert "\n" not in str(error.value)


def test_registers_and_other_families_are_refused(tmp_path):
    for more in (
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"pre_norm": True},
    ):
        torch.save({"model": foreign(**more).state_dict()}, tmp_path / "x.pth")
        with pytest.raises(UserError, match="another architecture"):
            start_from(objective_of(), str(tmp_path / "x.pth"))


def test_another_decoder_is_left_fresh_as_a_whole(tmp_path):
    run = write_run(tmp_path / "run", objective_of("mae", "seed=4"))
    for change in ("{width: 12, depth: 1, heads: 2}", "{width: 8, depth: 1, heads: 4}",
                   "{width: 8, depth: 2, heads: 2}"):  # fmt: skip
        mine = objective_of("mae", f"measure.decoder={change}")
        before = {k: v.clone() for k, v in mine.state_dict().items()}
        start = start_from(mine, str(run))
        assert start.fresh == [k for k in before if k.startswith("measure.decoder")]
        assert all(torch.equal(mine.state_dict()[k], before[k]) for k in start.fresh)


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(UserError, match=r"^/home/me/x\.pth: no such file or folder"):
        start_from(objective_of(), "~/x.pth")
    (tmp_path / "runs/b/encoder").mkdir(parents=True)
    (tmp_path / "runs/b/encoder/encoder.json").write_text("{}")
    for source, words in (
        (tmp_path / "runs", r"there; give one of the runs in it, such as .*/runs/b$"),
        (tmp_path, "no exported encoder there; give a run, an export or a file of weights$"),
        (tmp_path / "x.pth", r"x\.pth: no such file or folder$"),
    ):
        with pytest.raises(UserError, match=words):
            start_from(objective_of(), str(source))
    with pytest.raises(UserError, match=r"init\.ema"):
        start_from(objective_of(), "timm:vit_tiny_patch16_224", ema=True)

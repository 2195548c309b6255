"""Export: other projects' names, read back by independent code, give our outputs."""

import json

import oracle
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import DECODER_HEADS, HEADS, PATCH, images, tiny_recipe

from pipeline import load_encoder
from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError
from pipeline.export import main
from pipeline.method.checks import vit_options
from pipeline.method.objective import build_objective
from pipeline.method.views import full_view, make_views
from pipeline.weights.interop import from_mae
from pipeline.weights.run import encoder_info, encoder_state, load_run, read_encoder

SAMPLE = torch.tensor([5, 1, 8])


MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


def write_run(tmp_path, *overrides):
    """A run folder with a tiny MAE of random weights, and its objective."""
    recipe = tiny_recipe("mae", *overrides)
    objective, _ = build_objective(recipe)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_(std=0.2)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    save_file({k: v.contiguous() for k, v in objective.state_dict().items()},
              folder / "model.safetensors")  # fmt: skip
    return folder, objective.eval()


def pixels(image):
    return ((image / 255 - torch.tensor(oracle.MEAN)) / torch.tensor(oracle.STD)).permute(
        0, 3, 1, 2
    )


def test_timm_opens_the_checkpoint_and_gives_the_same_features(run, tmp_path, capsys):
    folder, objective = run
    out = tmp_path / "encoder.safetensors"
    assert main([str(folder), "--format", "timm", str(out)]) == 0
    assert "timm.create_model('vit_tiny_patch16_224'" in capsys.readouterr().out
    recipe = objective.recipe.encoder
    vit = timm.create_model(
        recipe.arch, checkpoint_path=str(out), num_classes=0, **vit_options(recipe)
    ).eval()
    with torch.no_grad():
        theirs = vit.forward_features(pixels(images()))
        ours = objective.encoder(*full_view(images(), PATCH))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name"), [("timm", "x.safetensors"), ("mae", "x.pth"), ("hf", "x")]
)
def test_a_file_keeps_its_pixel_statistics(tmp_path, capsys, kind, name):
    """Ours says them itself; timm learns them by the pretrained_cfg_overlay that is printed."""
    folder, _ = write_run(tmp_path, f"data.mean={list(MEAN)}", f"data.std={list(STD)}")
    assert main([str(folder), "--format", kind, str(tmp_path / name)]) == 0
    _, info = load_encoder(tmp_path / name)
    assert (info["mean"], info["std"]) == (list(MEAN), list(STD))
    if kind == "timm":
        call = capsys.readouterr().out.strip().partition("open it with ")[2]
        model = eval(call, {"timm": timm})
        config = timm.data.resolve_model_data_config(model)
        assert (config["mean"], config["std"]) == (MEAN, STD)
        loaded = load_file(tmp_path / name)
        assert torch.equal(model.cls_token, loaded["cls_token"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"arch": "vit_base_patch16_224"}, "says itself that it is vit_tiny_patch16_224"),
        ({"options": {"num_heads": 4}}, "says itself how it is built, with num_heads 2"),
        ({"options": {"drop_rate": 0.1}}, "with no drop_rate; only img_size"),
        ({"options": {"img_size": 18}}, "img_size 18 is not a multiple of the patch size 4"),
        ({"options": {"img_size": 0}}, "img_size 0: must be a whole number"),
    ],
)
@pytest.mark.parametrize("kind", ["timm", "mae", "hf", "run"])
def test_what_says_its_architecture_is_not_contradicted(run, tmp_path, kind, words, sentence):
    folder, objective = run
    out = tmp_path / {"timm": "x.safetensors", "mae": "x.pth"}.get(kind, "x")
    if kind == "run":
        out = folder
        (folder / "encoder").mkdir()
        state = encoder_state(objective.encoder.state_dict(), objective.encoder)
        save_file(state, folder / "encoder/encoder.safetensors")
        (folder / "encoder/encoder.json").write_text(json.dumps(encoder_info(objective.recipe, 1)))
    else:
        main([str(folder), "--format", kind, str(out)])
    if kind == "hf" and "arch" in words:
        words, sentence = {"arch": "vit_tiny_patch16_224"}, "is vit_base_patch16_224"
    with pytest.raises(UserError, match=sentence) as error:
        load_encoder(out, **words)
    assert str(out) in str(error.value)


def test_mae_checkpoint_goes_there_and_back(run, tmp_path, capsys):
    folder, objective = run
    out = tmp_path / "mae.pth"
    assert main([str(folder), "--format", "mae", str(out)]) == 0
    assert not capsys.readouterr().err
    state = torch.load(out, weights_only=True)["model"]
    fresh, _ = build_objective(tiny_recipe("mae", "seed=9"))
    from_mae(fresh, state)
    for name, value in objective.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("option", "weight"),
    [("init_values: 0.1", "blocks.0.ls1.gamma"), ("qkv_bias: false", "blocks.0.attn.qkv.bias")],
)
def test_an_encoder_that_maes_code_does_not_load_is_said(option, weight, tmp_path, capsys):
    sizes = "patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2"
    folder, _ = write_run(tmp_path, f"encoder.options={{{sizes}, {option}}}")
    assert main([str(folder), "--format", "mae", str(tmp_path / "mae.pth")]) == 0
    said = capsys.readouterr().err
    assert "facebookresearch/mae's own model does not load it" in said
    assert said.endswith(f"such as {weight}\n")


def from_hf(state, layers, ours):
    """Weights of transformer blocks, from Hugging Face's names to the oracle's."""
    names = {
        "layernorm_before": "norm1", "attention.output.dense": "attn.proj",
        "layernorm_after": "norm2", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    }  # fmt: skip
    w = {}
    number = 0
    while f"{layers}.{number}.layernorm_before.weight" in state:
        for kind in ("weight", "bias"):
            for theirs, mine in names.items():
                w[f"{ours}.{number}.{mine}.{kind}"] = state[f"{layers}.{number}.{theirs}.{kind}"]
            w[f"{ours}.{number}.attn.qkv.{kind}"] = torch.cat(
                [state[f"{layers}.{number}.attention.attention.{p}.{kind}"]
                 for p in ("query", "key", "value")]
            )  # fmt: skip
        number += 1
    return w


def hf_encoder_weights(state, prefix=""):
    e = f"{prefix}embeddings."
    w = {
        "encoder.cls_token": state[e + "cls_token"],
        "encoder.patch_embed.proj.weight": state[e + "patch_embeddings.projection.weight"],
        "encoder.patch_embed.proj.bias": state[e + "patch_embeddings.projection.bias"],
        "encoder.norm.weight": state[f"{prefix}layernorm.weight"],
        "encoder.norm.bias": state[f"{prefix}layernorm.bias"],
    }
    return w | from_hf(state, f"{prefix}encoder.layer", "encoder.blocks")


def test_hugging_face_vit(run, tmp_path):
    folder, objective = run
    out = tmp_path / "hf"
    assert main([str(folder), "--format", "hf", str(out)]) == 0
    state = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "vit"
    assert (config["hidden_size"], config["num_hidden_layers"], config["patch_size"]) == (16, 2, 4)
    torch.testing.assert_close(
        state["embeddings.position_embeddings"][0], oracle.sincos(4, 4, 16), rtol=1e-5, atol=1e-6
    )
    w = hf_encoder_weights(state)
    z = oracle.encode(w, images()[0], list(range(16)), patch=PATCH, heads=HEADS)
    with torch.no_grad():
        ours = objective.encoder(*full_view(images(), PATCH))[0]
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)


def test_hugging_face_mae(run, tmp_path):
    folder, objective = run
    out = tmp_path / "hf"
    assert main([str(folder), "--format", "hf-mae", str(out)]) == 0
    state = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    assert (config["decoder_hidden_size"], config["mask_ratio"], config["norm_pix_loss"]) == (
        8, 0.75, True,
    )  # fmt: skip
    d = "measure.decoder"
    w = hf_encoder_weights(state, "vit.") | from_hf(state, "decoder.decoder_layers", f"{d}.blocks")
    w[f"{d}.mask_token"] = state["decoder.mask_token"].reshape(-1)
    for theirs, mine in (("decoder_embed", "embed"), ("decoder_norm", "norm"),
                         ("decoder_pred", "head")):  # fmt: skip
        for kind in ("weight", "bias"):
            w[f"{d}.{mine}.{kind}"] = state[f"decoder.{theirs}.{kind}"]
    views = make_views(images(), SAMPLE, recipe=objective.recipe, epoch=0, patch=PATCH)
    with torch.no_grad():
        ours = objective.measure.reconstruct(objective.encoder(*views.first), views.first)[0]
    visible = views.first.visible[0].tolist()
    z = oracle.encode(w, images()[0], visible, patch=PATCH, heads=HEADS)
    theirs = oracle.decode(w, z, visible, (4, 4), DECODER_HEADS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_transformers_itself_opens_them(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, objective = run
    main([str(folder), "--format", "hf", str(tmp_path / "vit")])
    main([str(folder), "--format", "hf-mae", str(tmp_path / "mae")])
    vit = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    mae = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "mae").eval()
    noise = torch.rand(3, 16)
    kept = noise.argsort(1)[:, :4].sort(1).values.int()
    inverse = torch.full((3, 16), 4, dtype=torch.int32)
    inverse.scatter_(1, kept.long(), torch.arange(4, dtype=torch.int32).expand(3, 4))
    with torch.no_grad():
        theirs = vit(pixels(images())).last_hidden_state
        ours = objective.encoder(*full_view(images(), PATCH))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        theirs = mae(pixels(images()), noise=noise).logits
        view = full_view(images(), PATCH)._replace(visible=kept, inverse=inverse)
        ours = objective.measure.reconstruct(objective.encoder(*view), view)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_classifier_becomes_an_encoder(run, tmp_path):
    _, objective = run
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, global_pool="avg", fc_norm=True,
        **vit_options(objective.recipe.encoder),
    ).eval()  # fmt: skip
    folder = tmp_path / "classifier"
    folder.mkdir()
    save_file(vit.state_dict(), folder / "classifier.safetensors")
    info = {"arch": "vit_tiny_patch16_224", "options": vit_options(objective.recipe.encoder)}
    info |= {"mean": oracle.MEAN, "std": oracle.STD, "step": 3, "classes": list("abcde")}
    (folder / "classifier.json").write_text(json.dumps(info))
    assert main([str(folder), "--format", "run", str(tmp_path / "supervised")]) == 0
    encoder, info = read_encoder(tmp_path / "supervised")
    assert info["recipe"] == "supervised"
    x = pixels(images())
    with torch.no_grad():
        tokens = encoder.patch_drop(encoder._pos_embed(encoder.patch_embed(x)))
        for block in encoder.blocks:
            tokens = block(tokens)
        ours = vit.head(encoder.norm(tokens[:, 1:].mean(1)))
        torch.testing.assert_close(ours, vit(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", ""),  # the tag of timm's weights, which name pixels
        ("vit_small_patch14_reg4_dinov2", "no run can hold its encoder (encoder.arch"),
        ("vit_small_patch16_224", "its weights do not fit vit_small_patch16_224"),
    ],
)
def test_a_classifier_becomes_an_encoder_that_opens_or_none(arch, words, tmp_path, capsys):
    width = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32, "patch_size": 8}
    vit = timm.create_model(
        arch.split(".")[0], num_classes=2, global_pool="avg", fc_norm=True, **width
    )
    save_file(vit.state_dict(), tmp_path / "classifier.safetensors")
    options = width if "small_patch16" not in arch else width | {"depth": 2}
    about = ABOUT | {"arch": arch, "options": options}
    (tmp_path / "classifier.json").write_text(json.dumps(about))
    code = main([str(tmp_path), "--format", "run", str(tmp_path / "out")])
    assert words in capsys.readouterr().err
    assert (code, (tmp_path / "out").exists()) == ((2, False) if words else (0, True))
    if not words:
        read_encoder(tmp_path / "out")


SMALL = {"img_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 1}
ABOUT = {"arch": "vit_tiny_patch16_224", "options": SMALL, "classes": ["a"]}
ABOUT |= {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({}, "arch is missing"),
        ([], "it is not an object with arch, options, mean and std"),
        (ABOUT | {"arch": 5}, "arch is not a name"),
        (ABOUT | {"arch": "vit_tony"}, "classifier.json: arch 'vit_tony' is not a timm model"),
        (ABOUT | {"options": []}, "options is not an object"),
        (ABOUT | {"options": {}}, "img_size is missing"),
        (ABOUT | {"options": {"img_size": "16"}}, "img_size '16' is not a number of pixels"),
        ({k: v for k, v in ABOUT.items() if k != "mean"}, "classifier.json: mean is missing"),
        (ABOUT | {"std": [1, 2]}, "std is not a list of three numbers"),
        (ABOUT | {"classes": 3}, "classes is not a list of names"),
    ],
)
def test_a_classifier_that_does_not_say_what_it_is(about, words, tmp_path, capsys):
    (tmp_path / "classifier.json").write_text(json.dumps(about))
    save_file({"fc_norm.weight": torch.ones(2)}, tmp_path / "classifier.safetensors")
    assert main([str(tmp_path), "--format", "run", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def places(run, tmp_path):
    """A run with encoder/ and a checkpoint, a classifier, shards, a ViT of somebody else's."""
    folder, _ = run
    step, other = folder / "checkpoints/step-1", tmp_path / "other"
    for place in (folder / "encoder", step, folder / "eval/x", tmp_path / "shards", other):
        place.mkdir(parents=True)
    (folder / "encoder/encoder.json").write_text(json.dumps(ABOUT))
    (folder / "eval/x/classifier.json").write_text(json.dumps(ABOUT))
    (tmp_path / "shards/manifest.json").write_text("{}")
    (other / "config.json").write_text("{}")
    weights = {"fc_norm.weight": torch.ones(2)}
    for place in (folder / "encoder/encoder", step / "teacher", other / "model"):
        save_file(weights, place.with_suffix(".safetensors"))
    vit = timm.create_model(ABOUT["arch"], num_classes=1, fc_norm=True, global_pool="avg", **SMALL)
    save_file(vit.state_dict(), folder / "eval/x/classifier.safetensors")
    (step / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    (tmp_path / "link").symlink_to(folder)
    return tmp_path


def contents(top):
    return {path: path.read_bytes() for path in top.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "source", "out", "words"),
    [
        *(("hf", "run", out, "there is something else (recipe.yaml)") for out in ("run", "link")),
        ("hf-mae", "run", "run/encoder", "is in encoder/ of a run"),
        ("hf", "run", "run/checkpoints/step-1", "is in checkpoints/ of a run"),
        ("hf", "run", "run/checkpoints/new", "is in checkpoints/ of a run"),
        ("hf", "run", "shards", "there is something else (manifest.json)"),
        ("hf", "run", "run/eval/x", "there is something else (classifier.safetensors)"),
        ("hf", "run", "other", "other/model.safetensors: is there, and no earlier export"),
        ("timm", "run", "run/model.safetensors", "there is something else (recipe.yaml)"),
        ("timm", "run", "run/encoder/encoder.safetensors", "is in encoder/ of a run"),
        ("timm", "run", "run/encoder/new.safetensors", "is in encoder/ of a run"),
        ("timm", "run", "run/checkpoints/step-1/teacher.safetensors", "is in checkpoints/ of"),
        ("timm", "run", "run/eval/x/classifier.safetensors", "is there, and no earlier export"),
        ("mae", "run", "run/checkpoints/x.pth", "is in checkpoints/ of a run"),
        ("run", "run/eval/x", "run", "there is something else (recipe.yaml)"),
        ("run", "run/eval/x", "run/eval/x", "there is something else (classifier.safetensors)"),
        ("run", "run/eval/x", "other", "there is something else (config.json)"),
        ("run", "run/eval/x", "copy", "copy/encoder/encoder.json: is there, and no earlier"),
        ("hf", "run", "copy", "there is something else (encoder/encoder.json)"),
    ],
)
def test_an_export_takes_the_place_of_nothing_else(kind, source, out, words, places, capsys):
    (places / "copy").mkdir()
    (places / "run/encoder").rename(places / "copy/encoder") if out == "copy" else None
    before = contents(places)
    assert main([str(places / source), "--format", kind, str(places / out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert contents(places) == before


@pytest.mark.parametrize(
    ("kind", "source", "out"),
    [
        ("timm", "run", "run/x.safetensors"),
        ("mae", "run", "run/x.pth"),
        ("hf", "run", "run/hf"),
        ("hf-mae", "run", "hf"),
        ("run", "run/eval/x", "supervised"),
    ],
)
def test_an_export_may_be_repeated(kind, source, out, places):
    words = [str(places / source), "--format", kind, str(places / out)]
    assert [main(words), main(words)] == [0, 0]


def test_an_encoder_beside_the_result_of_its_finetuning(places):
    """recipes/README.md: --output runs/supervised/classifier.json, then runs/supervised."""
    folder = places / "supervised"
    folder.mkdir()
    (places / "run/eval/x").rename(folder / "classifier")
    (folder / "classifier.json").write_text('{"protocol": "finetune"}')
    assert main([str(folder / "classifier"), "--format", "run", str(folder)]) == 0
    assert (folder / "encoder/encoder.json").is_file()


def test_an_export_for_transformers_does_not_take_the_place_of_its_other_format(places, capsys):
    for kind, other in (("hf", "hf-mae"), ("hf-mae", "hf")):
        assert main([str(places / "run"), "--format", kind, str(places / kind)]) == 0
        before = contents(places / kind)
        assert main([str(places / "run"), "--format", other, str(places / kind)]) == 2
        assert "is an export in another format" in capsys.readouterr().err
        assert contents(places / kind) == before


@pytest.mark.parametrize(
    ("kind", "out", "words"),
    [
        ("timm", "x.pth", "name the output with .safetensors"),
        ("mae", "x", "name the output with .pth"),
        ("run", "x", "no classifier"),
    ],
)
def test_bad_outputs_are_one_sentence(kind, out, words, run, tmp_path, capsys):
    assert main([str(run[0]), "--format", kind, str(tmp_path / out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_weights_of_another_recipe_are_refused(run, tmp_path):
    folder, _ = run
    (folder / "recipe.yaml").write_text(dump_recipe(tiny_recipe("cmae")))
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit"):
        load_run(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is not a run folder: it has no recipe\.yaml$"):
        load_run(tmp_path / "empty")
    with pytest.raises(UserError, match=rf"no recipe\.yaml; it holds runs, such as {folder}$"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="none: no such file or folder"):
        load_run(tmp_path / "none")

"""The door: `from pipeline import load_encoder` for runs, exports and foreign files."""

import json
import subprocess
import sys

import oracle
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import PATCH, images, tiny_recipe

import pipeline
from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError
from pipeline.export import main as export
from pipeline.method.views import full_view
from pipeline.weights.header import METADATA
from pipeline.weights.run import encoder_info, encoder_state
from pipeline.weights.source import check_start

PIXELS = ((images() / 255 - torch.tensor(oracle.MEAN)) / torch.tensor(oracle.STD)).movedim(-1, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, objective): a finished run of a tiny MAE with other pixel statistics than usual."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe("mae", "data.std=[0.2, 0.3, 0.25]")
    objective, _ = pipeline.build_objective(recipe)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_(std=0.2)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    state = {k: v.contiguous() for k, v in objective.state_dict().items()}
    (folder / "checkpoints/step-7").mkdir(parents=True)
    for place in ("model.safetensors", "checkpoints/step-7/model.safetensors"):
        save_file(state, folder / place)
    (folder / "encoder").mkdir()
    encoder = encoder_state(objective.encoder.state_dict(), objective.encoder)
    save_file(encoder, folder / "encoder/encoder.safetensors")
    (folder / "encoder/encoder.json").write_text(json.dumps(encoder_info(recipe, 7)))
    return folder, objective.eval()


OWN = {  # what a run's folder has itself; its files say what the run's encoder.json says
    "run": "",
    "encoder": "encoder",
    "its file": "encoder/encoder.safetensors",
    "model": "model.safetensors",
    "checkpoint": "checkpoints/step-7/model.safetensors",
}


@pytest.mark.parametrize("kind", [*OWN, "timm", "hf", "hf-mae", "mae"])
def test_every_form_of_a_run_gives_the_same_tokens(kind, run, tmp_path):
    folder, objective = run
    if kind in OWN:
        source = folder / OWN[kind]
        check_start(str(source))
    else:
        source = tmp_path / {"timm": "x.safetensors", "mae": "x.pth"}.get(kind, "x")
        assert export([str(folder), "--format", kind, str(source)]) == 0
    model, info = pipeline.load_encoder(source)
    assert not model.training
    assert info["source"] == str(source)
    assert info["std"] == [0.2, 0.3, 0.25]
    assert info["mean"] == pytest.approx(oracle.MEAN)
    std = torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    x = PIXELS * torch.tensor(oracle.STD)[:, None, None] / std
    with torch.no_grad():
        tokens = model.forward_features(x)
        ours = objective.encoder(*full_view(images(), PATCH))
    torch.testing.assert_close(tokens, ours, rtol=1e-4, atol=1e-4)


def test_an_exported_file_may_be_built_at_another_size(run, tmp_path):
    export([str(run[0]), "--format", "timm", str(tmp_path / "x.safetensors")])
    model, info = pipeline.load_encoder(tmp_path / "x.safetensors", options={"img_size": 32})
    assert model.pos_embed.shape == (1, 65, 16)
    assert info["options"]["img_size"] == 32


def test_random_weights_of_the_same_architecture(run):
    trained, _ = pipeline.load_encoder(run[0])
    model, info = pipeline.load_encoder(run[0], random=True, seed=3)
    again, _ = pipeline.load_encoder(run[0], random=True, seed=3)
    assert info["random"]
    assert info["random_seed"] == 3
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(model.state_dict()[name], trained.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_hidden_layers": 5}, "blocks|encoder.layer.2"),
        ({"hidden_size": 24}, "do not fit"),
    ],
)
def test_another_hugging_face_model_is_refused(change, words, run, tmp_path):
    export([str(run[0]), "--format", "hf", str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        pipeline.load_encoder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([127.5] * 3, [127.5] * 3),  # of pixels in 0 … 255
        (0.5, 0.5),
        ([0.5], [0.5]),
        ([0.5] * 3, [0.0] * 3),
        (["a"] * 3, [0.5] * 3),
        ([float("nan")] * 3, [0.5] * 3),
    ],
)
def test_pixels_outside_0_to_1_are_refused(mean, std, run, tmp_path):
    """Where a folder of transformers, an export or an option says them."""
    words = r"(mean|std) is not a list of three numbers in 0 … 1"
    export([str(run[0]), "--format", "hf", str(tmp_path / "hf")])
    about = {"image_mean": mean, "image_std": std}
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: image_{words}"):
        pipeline.load_encoder(tmp_path / "hf")
    about = {"arch": "vit_tiny_patch16_224", "options": {"img_size": 16}, "mean": mean, "std": std}
    (tmp_path / "encoder.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=rf"encoder\.json: {words}"):
        pipeline.load_encoder(tmp_path)
    options = {"pretrained_cfg_overlay": {"mean": mean, "std": std}}
    with pytest.raises(UserError, match=rf"--options {{pretrained_cfg_overlay: .*}}: {words}"):
        pipeline.load_encoder("random", arch="vit_tiny_patch16_224", options=options)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_a_hugging_face_folder_without_its_weights_in_one_file(name, run, tmp_path):
    export([str(run[0]), "--format", "hf", str(tmp_path / "hf")])
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf" / name)
    for opened in (pipeline.load_encoder, check_start):
        with pytest.raises(UserError, match=r"hf: has no model\.safetensors; open .* transformers"):
            opened(str(tmp_path / "hf"))


def test_a_hugging_face_model_of_pixels_that_are_not_normalised(run, tmp_path):
    export([str(run[0]), "--format", "hf", str(tmp_path / "hf")])
    path = tmp_path / "hf/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": False}))
    _, info = pipeline.load_encoder(tmp_path / "hf")
    assert (info["mean"], info["std"]) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("name", ["", "step-00000010"])
def test_checkpoints_are_told_to_be_of_a_run(name, tmp_path):
    (tmp_path / "run/checkpoints/step-00000010").mkdir(parents=True)
    (tmp_path / "run/recipe.yaml").touch()
    with pytest.raises(UserError, match=r"give \S+/run, the run of these checkpoints"):
        pipeline.load_encoder(tmp_path / "run/checkpoints" / name)


@pytest.mark.parametrize("name", ["", "global_step10", "global_step10/x_optim_states.pt"])
def test_parts_of_deepspeed_are_told_to_be_put_together(name, tmp_path):
    (tmp_path / "global_step10").mkdir()
    torch.save({"ds_version": "0"}, tmp_path / "global_step10/x_optim_states.pt")
    with pytest.raises(UserError, match=r"give the file of full weights that DeepSpeed's zero_to"):
        pipeline.load_encoder(tmp_path / name)


def test_what_is_no_encoder_is_one_sentence(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth does not say its architecture"):
        pipeline.load_encoder(tmp_path / "x.pth")
    with pytest.raises(UserError, match="no exported encoder"):
        pipeline.load_encoder(tmp_path)
    about = {"arch": "vit_tiny_patch16_224", "options": {"img_size": 16}, "mean": [0.5] * 3}
    (tmp_path / "encoder.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"no exported encoder .*\(encoder\.json: std is missing\)"):
        pipeline.load_encoder(tmp_path)
    text = json.dumps(about | {"options": {}})
    save_file({"x": torch.ones(1)}, tmp_path / "y.safetensors", metadata={METADATA: text})
    with pytest.raises(UserError, match=r"y\.safetensors: .* \(relaxmim: img_size is missing\)"):
        pipeline.load_encoder(tmp_path / "y.safetensors")


def test_the_door_imports_little():
    """Neither deepspeed nor anything of training; `import pipeline` alone not even torch."""
    code = (
        "import sys, pipeline; assert 'torch' not in sys.modules, 'torch'; "
        "from pipeline import load_encoder, load_reconstructor, load_recipe, build_objective; "
        "late = {'deepspeed', 'tensorboard', 'scipy', 'matplotlib', 'pipeline.runtime', 'eval', "
        "'torchvision.models', 'torchvision.ops', 'torch._dynamo', 'torch._inductor', 'sympy'}; "
        "assert not late & sys.modules.keys(), late & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_door_has_no_other_names():
    assert set(pipeline.__all__) <= set(dir(pipeline))
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        _ = pipeline.load_decoder

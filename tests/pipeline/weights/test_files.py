"""Where in a file an encoder is found, which of several, and what a file may hold beside it."""

import argparse
import collections
import datetime
import json
import pathlib
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import tiny_recipe

from pipeline import build_objective, load_encoder
from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError
from pipeline.weights.files import find_encoder, load_tensors
from pipeline.weights.run import encoder_info, encoder_state, load_run
from pipeline.weights.start import start_from

ARCH = "vit_tiny_patch16_224"
OPTIONS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def state(value=1.0):
    """An encoder's weights, all of one value."""
    vit = timm.create_model(ARCH, num_classes=0, **OPTIONS)
    return {k: torch.full_like(v, value) for k, v in vit.state_dict().items()}


def under(prefix, value=1.0):
    return {prefix + k: v for k, v in state(value).items()}


def loaded(path, content, **words):
    torch.save(content, path)
    vit, info = load_encoder(path, arch=ARCH, options=OPTIONS, **words)
    values = {float(p.mean()) for p in vit.state_dict().values()}
    assert len(values) == 1
    return values.pop(), info


@pytest.mark.parametrize(
    "prefix",
    [
        "", "module.", "_orig_mod.", "model.", "encoder.", "student.", "teacher.", "backbone.",
        "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "net.", "trunk.",
        "student.backbone.", "teacher.backbone.", "module.encoder.", "model.encoder.module.",
        "target_encoder.", "base_encoder.", "visual.trunk.", "vit.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("box", [None, "model", "state_dict", "module", "encoder", "weights"])
def test_any_prefix_in_any_container(tmp_path, prefix, box):
    content = under(prefix) if box is None else {box: under(prefix), "epoch": 3}
    assert loaded(tmp_path / "x.pth", content)[0] == 1


def test_wrappers_in_the_middle_of_names(tmp_path):
    """torch.compile, FSDP and activation checkpointing of single blocks."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        renamed = {k.replace("blocks.0.", f"blocks.0.{wrapper}"): v for k, v in state().items()}
        assert loaded(tmp_path / "x.pth", {"model": renamed})[0] == 1
    chunks = {k.replace("blocks.1.", "blocks.0.1."): v for k, v in state().items()}
    chunks = {k.replace("blocks.0.norm", "blocks.0.0.norm"): v for k, v in chunks.items()}
    chunks = {k.replace("blocks.0.attn", "blocks.0.0.attn"): v for k, v in chunks.items()}
    chunks = {k.replace("blocks.0.mlp", "blocks.0.0.mlp"): v for k, v in chunks.items()}
    assert loaded(tmp_path / "x.pth", {"teacher": chunks})[0] == 1


@pytest.mark.parametrize(
    ("content", "value"),
    [
        # I-JEPA evaluates its target encoder, DINO its teacher, MoCo v3 its online encoder.
        ({"encoder": under("module.", 2), "target_encoder": under("module."), "predictor": {}}, 1),
        ({"student": under("module.backbone.", 2), "teacher": under("backbone.")}, 1),
        (under("student.", 2) | under("teacher."), 1),
        ({"model": under("student.backbone.", 2) | under("teacher.backbone.")}, 1),
        ({"state_dict": under("module.momentum_encoder.", 2) | under("module.base_encoder.")}, 1),
        ({"state_dict": state(), "state_dict_ema": state(2)}, 1),
        ({"model": state(), "model_ema": state(2), "optimizer": {"state": {0: state(3)}}}, 1),
        ({"state_dict_ema": state()}, 1),  # all that there is
        ({"state_dict": under("model.") | under("ema_model.", 2)}, 1),  # of Lightning
        ({"state_dict": under("net.model.vit.") | under("ema.module.", 2)}, 1),
    ],
)
def test_the_encoder_that_its_project_evaluates(tmp_path, content, value):
    found, info = loaded(tmp_path / "x.pth", content)
    assert found == value
    if len(content) > 1 and "state_dict_ema" in content:
        assert "not taken: state_dict_ema (--ema takes state_dict_ema)" in info["note"]


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": state(), "state_dict_ema": state(2)},
        {"model": state(), "model_ema": under("module.", 2)},
        {"model": state(), "ema": state(2)},
        {"state_dict": under("model.") | under("ema_model.module.", 2)},
        {"model": under("student.") | under("teacher.", 2)},
        {"encoder": under("module."), "target_encoder": under("module.", 2)},
        {"state_dict": under("module.base_encoder.") | under("module.momentum_encoder.", 2)},
    ],
)
def test_ema_takes_the_average(tmp_path, content):
    assert loaded(tmp_path / "x.pth", content, ema=True)[0] == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("cls_token", torch.empty(0), "cls_token is empty, as in a rank's part of a ZeRO-3"),
        ("patch_embed.proj.weight", torch.tensor(1.0), r"has shape \[\], which no"),
        ("pos_embed", torch.ones(17), r"pos_embed has shape \[17\], which no"),
    ],
)
def test_weights_that_are_not_there_or_of_no_vit_are_refused(tmp_path, name, value, words):
    for content in (state() | {name: value}, {"module": state() | {name: value}}):
        with pytest.raises(UserError, match=rf"x\.pth: .*{words}"):
            loaded(tmp_path / "x.pth", content)


def test_a_program_of_torchscript_is_called_that(tmp_path):
    """As OpenAI publishes CLIP."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:  # the names of torch.jit.save
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            file.writestr(f"x/{name}", b"")
    with pytest.raises(UserError, match=r"a TorchScript program, .* save its state_dict"):
        load_encoder(tmp_path / "x.pt", arch=ARCH)


def test_ema_where_there_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--ema: .*x\.pth keeps no average"):
        loaded(tmp_path / "x.pth", {"model": state()}, ema=True)
    for source in ("random", "timm:vit_tiny_patch16_224"):
        with pytest.raises(UserError, match="--ema"):
            load_encoder(source, arch=ARCH, ema=True)


def test_ema_of_a_run_is_its_teacher(tmp_path):
    objective, teacher = build_objective(tiny_recipe("cmae"))
    (tmp_path / "encoder").mkdir()
    online = encoder_state(objective.encoder.state_dict(), objective.encoder)
    save_file(online, tmp_path / "encoder/encoder.safetensors")
    info = json.dumps(encoder_info(objective.recipe, 1))
    (tmp_path / "encoder/encoder.json").write_text(info)
    with pytest.raises(UserError, match="no checkpoint with an EMA teacher"):
        load_encoder(tmp_path, ema=True)
    newest = tmp_path / "checkpoints/step-1"
    newest.mkdir(parents=True)
    (tmp_path / "checkpoints/latest").write_text("step-1\n")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(0.25)
    save_file(teacher.state_dict(), newest / "teacher.safetensors")
    for source in (tmp_path, tmp_path / "encoder"):
        vit, _ = load_encoder(source, ema=True)
        assert all(bool((v == 0.25).all()) for k, v in vit.state_dict().items() if k != "pos_embed")
        assert torch.equal(vit.pos_embed, online["pos_embed"])
        assert not bool((load_encoder(source)[0].cls_token == 0.25).any())


def whole(weights, name):
    """The weights, one of them as whole numbers."""
    return weights | {name: weights[name].to(torch.int8)}


def test_weights_of_whole_numbers_are_refused(tmp_path):
    """Wherever a file gives a model its parameters; load_state_dict casts without a word."""
    name, path = "blocks.1.mlp.fc1.weight", tmp_path / "x.pth"
    with pytest.raises(UserError, match=rf"x\.pth: {name} holds int8, not floating-point numbers"):
        loaded(path, whole(state(), name))
    for kind in (torch.float16, torch.bfloat16):
        assert loaded(path, {k: v.to(kind) for k, v in state().items()})[0] == 1
    objective, teacher = build_objective(tiny_recipe("cmae"))
    mine = whole(objective.state_dict(), f"encoder.{name}")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(objective.recipe))
    save_file(mine, tmp_path / "model.safetensors")
    for read in (lambda: load_run(tmp_path), lambda: start_from(objective, str(tmp_path))):
        with pytest.raises(UserError, match=f"encoder.{name} holds int8"):
            read()
    encoder = encoder_state(objective.encoder.state_dict(), objective.encoder)
    (tmp_path / "encoder").mkdir()
    save_file(encoder, tmp_path / "encoder/encoder.safetensors")
    info = json.dumps(encoder_info(objective.recipe, 1))
    (tmp_path / "encoder/encoder.json").write_text(info)
    save_file(whole(teacher.state_dict(), f"encoder.{name}"), tmp_path / "teacher.safetensors")
    with pytest.raises(UserError, match=rf"teacher\.safetensors: {name} holds int8"):
        load_encoder(tmp_path, ema=True)
    save_file(whole(encoder, name), tmp_path / "encoder/encoder.safetensors")
    with pytest.raises(UserError, match=rf"encoder\.safetensors: {name} holds int8"):
        load_encoder(tmp_path)


def test_buffers_of_whole_numbers_load(tmp_path):
    """BEiT keeps the indices of its relative positions in a file."""
    arch, options = "beit_base_patch16_224", OPTIONS
    beit = timm.create_model(arch, num_classes=0, **options)
    content = beit.state_dict() | {
        k: v for k, v in beit.named_buffers() if k.endswith("relative_position_index")
    }
    assert any(not v.is_floating_point() for v in content.values())
    torch.save({"model": content}, tmp_path / "beit.pth")
    vit, _ = load_encoder(tmp_path / "beit.pth", arch=arch, options=options)
    assert torch.equal(vit.state_dict()["cls_token"], content["cls_token"])


def test_two_encoders_of_the_same_kind_are_refused(tmp_path):
    content = {"left": state(), "right": state(2)}
    with pytest.raises(UserError, match="holds two encoders, left and right"):
        find_encoder(content, tmp_path / "x.pth")


PLAIN = [
    np.float64(3), np.float32(2), np.float16(1), np.int64(4), np.uint8(3), np.bool_(True),
    np.arange(3.0), np.array(["a"]), np.dtype("float32"), np.str_("x"),
    pathlib.Path("a/b"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("d:/e"),
    argparse.Namespace(path=pathlib.Path("a"), lr=np.float64(0.1)), datetime.date(2026, 1, 2),
    datetime.datetime(2026, 1, 2, 3), collections.OrderedDict(a=1), collections.Counter("ab"),
    frozenset([1]), slice(1, 2), range(3), 1j,
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda v: type(v).__name__)
def test_plain_values_beside_the_weights(tmp_path, value):
    torch.save({"model": state(), "extra": value}, tmp_path / "x.pth")
    extra = load_tensors(tmp_path / "x.pth")["extra"]
    assert type(extra) is type(value)
    assert np.array_equal(extra, value) if isinstance(value, np.ndarray) else extra == value


class Settings:
    pass


def test_objects_with_code_are_named_and_not_made(tmp_path):
    torch.save({"model": state(), "config": Settings()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: .*holds .*Settings.*code is not run") as error:
        load_encoder(tmp_path / "x.pth", arch=ARCH)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found(tmp_path):
    torch.save({"model": state()}, path := tmp_path / "damaged.pth")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda record: record.file_size)
    data[largest.header_offset + largest.file_size // 2 + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged \(the checksum of its damaged/data/\d+"):
        load_tensors(path)


def test_a_file_without_checksums_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        assert loaded(tmp_path / "unchecked.pth", {"model": state()})[0] == 1
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("size", [1, 20, 30, 60, 100, 300, 1000])
def test_a_cut_file_is_refused_with_a_reason(tmp_path, size):
    torch.save(
        {"model": state()}, path := tmp_path / "cut.pth", _use_new_zipfile_serialization=False
    )
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"cut\.pth: cannot be read as a file of weights \(.+\)$"):
        load_tensors(path)


@pytest.mark.parametrize(("has", "asked"), [("", "reg4_"), ("reg4_", "")])
def test_other_numbers_of_registers_are_refused(tmp_path, has, asked):
    """timm would cut the position table by them, and torch would speak of its shape."""
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    source = timm.create_model(f"vit_small_patch14_{has}dinov2", num_classes=0, **small)
    torch.save(source.state_dict(), path := tmp_path / "dinov2.pth")
    words = rf"it has {4 if has else 0} register tokens, \w+ {4 if asked else 0}; give an --arch"
    with pytest.raises(UserError, match=words):
        load_encoder(path, arch=f"vit_small_patch14_{asked}dinov2", options=small)

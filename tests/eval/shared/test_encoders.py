"""Encoders of other projects give the features that they give in timm, or one clear sentence."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from eval_helpers import ALONE, OPTIONS, coloured_images, write_encoder, write_shards
from safetensors.torch import save_file
from tiny import tiny_recipe

from eval import cka, finetune, knn
from eval.shared.classifier import build_classifier, layer_groups
from eval.shared.encoders import EncoderInfo
from eval.shared.features import image_features
from eval.shared.options import check_encoder, encoder_of, parser, settings_of
from eval.shared.results import output_path
from eval.shared.session import session_of
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.method.objective import build_objective
from pipeline.weights.interop import to_mae

ARCH = "vit_base_patch16_224"
WORDS = ["--arch", ARCH, "--options", json.dumps(OPTIONS)]
RANDOM = ["--encoder", "random", "--arch", "vit_tiny_patch16_224", "--options"]


def parse(*words: object, feature: str = "mean_patch") -> argparse.Namespace:
    args = parser("").parse_args([str(word) for word in words])
    args.feature = feature
    return args


def open_encoder(args: argparse.Namespace, ranks: Ranks) -> tuple:
    session = session_of(args, ranks, args.feature)
    return session.vit, session.info.record


def tiny(arch: str = ARCH, **more: object) -> torch.nn.Module:
    torch.manual_seed(3)
    model = timm.create_model(arch, num_classes=7, **OPTIONS, **more).eval()
    for parameter in model.parameters():  # so that no norm or bias is trivial
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def features(args: argparse.Namespace, pixels: torch.Tensor) -> torch.Tensor:
    vit, info = open_encoder(args, ALONE)
    assert not vit.training
    assert info["options"]["img_size"] == 16
    return image_features(vit, pixels, args.feature, "fp32")


@pytest.mark.parametrize(
    ("file", "wrap", "mean"),
    [
        ("timm.safetensors", lambda s: s, 0.5),
        ("timm.pth", lambda s: {"state_dict": s, "arch": ARCH}, 0.5),
        ("mocov3.pth.tar", lambda s: {"state_dict": moco(s), "epoch": 3}, 0.485),
        ("dino.pth", lambda s: {"teacher": dino(s), "args": argparse.Namespace(a=1)}, 0.485),
        ("mae.pth", lambda s: {"model": s, "args": argparse.Namespace(a=1)}, 0.485),
    ],
)
def test_checkpoint_files_give_the_features_of_timm(tmp_path, file, wrap, mean):
    model = tiny(global_pool="token")
    path = tmp_path / file
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(wrap(state), path)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = model.forward_features(pixels)
    for feature, expected in (("cls", tokens[:, 0]), ("mean_patch", tokens[:, 1:].mean(1))):
        found = features(parse("--encoder", path, *WORDS, feature=feature), pixels)
        torch.testing.assert_close(found, expected)
    _, info = open_encoder(parse("--encoder", path, *WORDS), ALONE)
    assert info["mean"][0] == mean
    assert (info["recipe"], info["random"]) == (path.stem, False)


def moco(state):
    online = {f"module.base_encoder.{k}": v for k, v in state.items() if "head" not in k}
    heads = {"module.base_encoder.head.0.weight": torch.ones(2), "module.predictor.0.weight": 0}
    slow = {k.replace("base", "momentum"): v + 1 for k, v in online.items()}
    return online | heads | slow


def dino(state):
    kept = {f"backbone.{k}": v for k, v in state.items() if "head" not in k}
    return kept | {"head.mlp.0.weight": torch.ones(2)}


def test_a_masked_autoencoder_with_its_decoder(tmp_path):
    objective, _ = build_objective(tiny_recipe("mae"))
    torch.save({"model": to_mae(objective)}, tmp_path / "mae.pth")
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    words = ["--arch", "vit_tiny_patch16_224", "--options", json.dumps(options)]
    vit, _ = open_encoder(parse("--encoder", tmp_path / "mae.pth", *words), ALONE)
    ours = objective.encoder.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in vit.state_dict().items())


def test_pooled_norms_registers_and_beit(tmp_path):
    """A supervised ViT (fc_norm), a BEiT and one with registers give their own pre-logits."""
    pixels = torch.randn(2, 3, 16, 16)
    for number, (arch, more) in enumerate(
        [
            (ARCH, {"global_pool": "avg"}),
            ("beit_base_patch16_224", {}),
            (ARCH, {"global_pool": "avg", "class_token": False, "reg_tokens": 2}),
        ]
    ):
        model = tiny(arch, **more)
        path = tmp_path / f"{number}.pth"
        torch.save(model.state_dict(), path)
        more.pop("global_pool", None)
        words = ["--arch", arch, "--options", json.dumps(OPTIONS | more)]
        args = parse("--encoder", path, *words)
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(features(args, pixels), expected)
        with pytest.raises(UserError, match="take the mean of the patches"):
            open_encoder(parse("--encoder", path, *words, feature="cls"), ALONE)
        vit, info = open_encoder(args, ALONE)
        classifier = build_classifier(vit, EncoderInfo.of(info), 5, drop_path=0.1)
        assert torch.equal(classifier.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
        assert torch.equal(classifier.fc_norm.weight, torch.ones(32))
        groups = layer_groups(classifier, weight_decay=0.1, layer_decay=0.5)
        assert min(g["lr_scale"] for g in groups) == 0.125
    with pytest.raises(UserError, match="Beit, whose blocks know patches by their position"):
        cka.check_encoder(tiny("beit_base_patch16_224"), "beit", "mean")


def test_positions_fit_another_image_size(tmp_path):
    model = tiny(global_pool="token")
    torch.save(model.state_dict(), tmp_path / "small.pth")
    options = json.dumps(OPTIONS | {"img_size": 24})
    args = parse("--encoder", tmp_path / "small.pth", "--arch", ARCH, "--options", options)
    vit, info = open_encoder(args, ALONE)
    assert vit.pos_embed.shape == (1, 37, 32)
    assert info["options"]["img_size"] == 24


def test_random_encoders_depend_on_the_seed_alone(tmp_path):
    first, info = open_encoder(parse("--encoder", "random", *WORDS, "--seed", 4), ALONE)
    run = write_encoder(tmp_path / "run")
    same, _ = open_encoder(parse("--encoder", run, "--random", "--seed", 4), ALONE)
    assert (info["random"], info["random_seed"]) == (True, 4)
    for name, value in same.state_dict().items():
        assert torch.equal(first.state_dict()[name], value), name
    tagged = parse("--encoder", "random", "--arch", f"{ARCH}.mae", *WORDS[2:], "--seed", 4)
    assert torch.equal(open_encoder(tagged, ALONE)[0].cls_token, first.cls_token)


def test_every_protocol_takes_a_file(tmp_path):
    """Through the command lines: k-NN of a DINO file; finetuning accepts the same words."""
    write_shards(tmp_path / "train", *coloured_images(40, 4, seed=1))
    write_shards(tmp_path / "val", *coloured_images(12, 4, seed=2))
    torch.save({"teacher": dino(tiny(global_pool="token").state_dict())}, tmp_path / "dino.pth")
    data = ["--train", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--workers", "0"]
    words = ["--encoder", str(tmp_path / "dino.pth"), *WORDS, *data]
    args = knn.build_parser().parse_args([*words, "--k", "3"])
    session = session_of(args, ALONE, args.feature)
    result = knn.evaluate(settings_of(knn.Settings, args), session)
    assert result["images"] == 12
    assert result["encoder"]["recipe"] == "dino"
    args = finetune.build_parser().parse_args(words)
    name = settings_of(finetune.Settings, args).name
    path = output_path(None, encoder_of(args), name)
    assert path.parent.parent.name.startswith("dino-")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--encoder", "random"], "give it with --arch"),
        (["--encoder", "random", "--arch", "vit_huge"], "not a timm model"),
        (["--encoder", "random", "--arch", ARCH, "--options", "[1]"], "--options"),
        (
            [*RANDOM, "{img_size: 32, patch_size: 64}"],
            "img_size 32 is not a multiple of the patch size 64; take one such as 64",
        ),
        ([*RANDOM, "{img_size: 32, patch_size: 7}"], "not a multiple of the patch size 7"),
        ([*RANDOM, "{img_size: 24}"], r"not a multiple of the patch size 16; take one such as 32$"),
        ([*RANDOM, "{patch_size: 15}"], "img_size 224 is not a multiple of the patch size 15"),
        ([*RANDOM, "{depth: 0}"], "--options {depth: 0}: must be a whole number from 1 up"),
        ([*RANDOM, "{embed_dim: true}"], "--options {embed_dim: True}: must be a whole number"),
        (["--encoder", "random", "--ema", *WORDS], "--ema: a random encoder has no average"),
        (["--encoder", "FILE/whole.pth", "--random", "--ema", *WORDS], "--ema: a random encoder"),
        (["--encoder", "FILE/bad.pth", *WORDS], "cannot be read as a file of weights"),
        (["--encoder", "FILE/evil.pth", *WORDS], "cannot be read as a file of weights"),
        (["--encoder", "FILE/other.pth", *WORDS], r"first entries are conv\.weight"),
        (["--encoder", "FILE/list.pth", *WORDS], "holds a list, where weights by their names"),
        (["--encoder", "FILE/empty.pth", *WORDS], "holds an empty dictionary, where weights"),
        (["--encoder", "FILE/part.pth", *WORDS], r"norm\.bias is missing"),
        (["--encoder", "FILE/whole.pth", "--arch", ARCH], "do not fit"),
        (["--encoder", "FILE/whole.pth", "--arch", "resnet18"], "is a ResNet|do not fit"),
        (["--encoder", "timm:nothing"], "not a timm model"),
        (["--encoder", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, words, sentence):
    whole = tiny(global_pool="token").state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    torch.save({k: v for k, v in whole.items() if k != "norm.bias"}, tmp_path / "part.pth")
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    torch.save([*whole.values()], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    torch.save({"model": whole, "f": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(UserError, match=sentence):
        open_encoder(parse(*[w.replace("FILE", str(tmp_path)) for w in words]), ALONE)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_pictures_have_three_channels():
    """Every encoder of an evaluation; load_encoder itself builds others."""
    with pytest.raises(UserError, match="in_chans: 1}: the pictures have 3 channels"):
        check_encoder(encoder_of(parse(*RANDOM, "{in_chans: 1}")))
    check_encoder(encoder_of(parse(*RANDOM, "{in_chans: 3}")))


def test_unreachable_hub_is_one_sentence(tmp_path):
    """A process of its own: the hub's client reads its environment when it is imported."""
    command = [sys.executable, knn.__file__, "--encoder", f"timm:{ARCH}.dino"]
    for number, name in enumerate(("train", "val")):
        write_shards(tmp_path / name, *coloured_images(8, 2, seed=number))
    data = ["--train", tmp_path / "train", "--val", tmp_path / "val", "--k", "1"]
    done = subprocess.run(
        [*command, *data], capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be fetched" in done.stderr.splitlines()[-1]
    assert f"--encoder FILE --arch {ARCH}.dino" in done.stderr.splitlines()[-1]


def test_what_was_taken_to_be_so_is_printed_and_kept(tmp_path, capsys):
    """A DINO file: heads, mean and std are in no name; the student beside it is not taken."""
    state = dino(tiny(global_pool="token").state_dict())
    torch.save({"teacher": state, "student": state}, tmp_path / "dino.pth")
    session = session_of(parse("--encoder", tmp_path / "dino.pth", *WORDS), ALONE)
    line = capsys.readouterr().out.strip()
    assert line.startswith("encoder: a file of DINO: mean and std 0.485,0.456,0.406 0.229")
    assert line.endswith("weights from teacher.backbone; not taken: student.backbone")
    assert session.info.record["note"] == line.removeprefix("encoder: ")
    drawn = session_of(parse("--encoder", tmp_path / "dino.pth", *WORDS, "--random"), ALONE)
    assert drawn.info.record["note"] == session.info.record["note"].partition("; weights from")[0]


def test_what_of_a_file_is_left_out_is_said(tmp_path, capsys):
    """Heads and decoders are; a weight that only begins like one has no place in the encoder."""
    plain, path, one = tiny().state_dict(), tmp_path / "a.pth", torch.ones(1)
    more = dict.fromkeys(("head_dist.weight", "decoder_pred.weight", "fc.bias", "mask_token"), one)
    for state, said in (
        (plain, "head"),
        (plain | more, "decoder_pred, fc, head, head_dist, mask_token"),
        ({k: v for k, v in plain.items() if "head" not in k}, ""),
    ):
        torch.save(state, path)
        session = session_of(parse("--encoder", path, *WORDS), ALONE)
        line = capsys.readouterr().out.strip()
        assert line.partition("; left out, as no part of an encoder: ")[2] == said
        assert ", ".join(session.info.record.get("left_out", [])) == said
        assert "left out" not in session.info.record["note"]
    for name in ("header.weight", "headgate.weight", "fcs.bias"):
        torch.save(plain | {name: one}, path)
        with pytest.raises(UserError, match=f"do not fit {ARCH}: {name} has no place in it"):
            session_of(parse("--encoder", path, *WORDS), ALONE)


def test_another_image_size_and_resize_reach_the_result(tmp_path):
    """--options on a run folder is not ignored; above 224 pixels nothing is cut off (MAE)."""
    run = write_encoder(tmp_path / "run")
    write_shards(tmp_path / "train", *coloured_images(12, 2, seed=1))
    write_shards(tmp_path / "val", *coloured_images(12, 2, seed=2))
    data = ["--train", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--workers", "0"]
    results = {}
    for size, more in ((16, []), (32, []), (16, ["--resize", "16"]), (232, [])):
        options = ["--options", json.dumps({"img_size": size})]
        words = ["--encoder", str(run), *options, *more, *data, "--k", "3"]
        args = knn.build_parser().parse_args(words)
        session = session_of(args, ALONE, "cls")
        assert session.image_size == size
        result = knn.evaluate(settings_of(knn.Settings, args), session)
        assert result["encoder"]["options"]["img_size"] == size
        results[size, *more] = result["resize"]
        batch = next(iter(session.loader(tmp_path / "train", 4)))
        assert batch.image.shape[1:3] == (size, size)
    assert results == {(16,): 18, (32,): 36, (16, "--resize", "16"): 16, (232,): 232}
    with pytest.raises(UserError, match="resize 15 is smaller than image_size 16"):
        session_of(parse("--encoder", run, "--resize", "15"), ALONE)


def test_results_of_another_size_ema_or_resize_have_names_of_their_own(tmp_path):
    names = set()
    for words in ([], ["--ema"], ["--resize", "20"], ["--options", "{img_size: 32}"]):
        choice = encoder_of(parse("--encoder", tmp_path, *words))
        names.add(output_path(None, choice, "knn").name)
    assert len(names) == 4
    assert "knn.json" in names

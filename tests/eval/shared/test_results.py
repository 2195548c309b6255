"""Every result has a path of its own: of two files named alike, of two options, of two lists."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from eval_helpers import write_encoder

from eval import attentive, cka, finetune, linprobe, psnr, shape_bias
from eval.finetune import Settings
from eval.shared.options import EncoderChoice
from eval.shared.results import (
    check_other_settings,
    check_output,
    in_a_name,
    output_path,
    write_result,
)
from pipeline.errors import UserError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def path_of(source: object, **more: object) -> Path:
    return output_path(None, EncoderChoice(str(source), **more), "knn")


def test_files_named_alike_have_two_results_and_one_file_has_one(tmp_path):
    for folder in ("A", "B"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "checkpoint.safetensors").touch()
    (tmp_path / "C").symlink_to("A")
    first, second = (path_of(f"{n}/checkpoint.safetensors") for n in "AB")
    assert first != second
    for path in (first, second):
        assert path.parent.parent.name.startswith("checkpoint-")
        assert (path.parts[0], path.name) == ("runs", "knn.json")
    for same in (tmp_path / "A/checkpoint.safetensors", "C/checkpoint.safetensors"):
        assert path_of(same) == first


def test_runs_keep_their_results_and_options_have_their_own(tmp_path):
    run = write_encoder(tmp_path / "run")
    assert path_of(run) == path_of(run / "encoder") == run / "eval/knn.json"
    assert path_of(run, random=True, seed=3) == run / "eval/knn-random-3.json"
    assert path_of(run, options={"img_size": 384}) == run / "eval/knn-img_size-384.json"
    assert path_of("timm:vit.dino") == Path("runs/timm-vit.dino/eval/knn.json")
    paths = [
        path_of("random", arch=arch, options=options, seed=seed)
        for arch in ("vit_tiny", "vit_small")
        for options in ({}, {"depth": 3}, {"depth": 4}, {"d": "x" * 50}, {"d": "y" * 50})
        for seed in (0, 1)
    ]
    assert len(set(paths)) == 20
    assert paths[0] == Path("runs/random-vit_tiny/eval/knn-random-0.json")


@pytest.mark.parametrize("text", ['{"images": 3}', "[1]", "{"])
def test_what_is_no_result_is_not_overwritten(text, tmp_path):
    """A manifest, say, or a recipe's record."""
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        check_output(path)
    path.write_text('{"protocol": "knn"}')
    check_output(path)


def test_a_result_of_another_protocol_is_not_replaced(tmp_path, capsys):
    """Whichever --output was copied: k-NN's result is not CKA's to overwrite."""
    path = tmp_path / "x.json"
    path.write_text('{"protocol": "knn"}')
    check_output(path, protocol="knn")
    for module in (attentive, cka, finetune, linprobe, psnr):
        words = [
            "--encoder",
            str(write_encoder(tmp_path / module.__name__)),
            "--val",
            "val",
            "--output",
            str(path),
        ]
        words += ["--train", "train"] if module in (attentive, finetune, linprobe) else []
        with pytest.raises(UserError, match=r"x\.json: holds a result of knn, this is .*remove it"):
            module.prepare(module.build_parser().parse_args(words))
    decisions = ["--decisions", "a.csv", "--output", str(path)]
    with pytest.raises(UserError, match=r"x\.json: holds a result of knn, this is shape-bias"):
        shape_bias.prepare(shape_bias.build_parser().parse_args(decisions))
    with pytest.raises(UserError, match="holds a result of knn, this is cka"):  # side by side
        write_result(path, {"protocol": "cka"})
    assert 'not written: {"protocol": "cka"}' in capsys.readouterr().out
    assert path.read_text() == '{"protocol": "knn"}'


def test_lists_of_labels_named_alike_have_two_results(tmp_path):
    names = {
        replace(Settings("", ""), subset=f"{folder}/10percent.txt").name for folder in ("A", "B")
    }
    assert len(names | {Settings("", "", fraction=0.1).name}) == 3
    absolute = Settings("", "", subset=str(tmp_path / "A/10percent.txt")).name
    assert absolute in names


def test_a_name_has_no_separators():
    assert in_a_name('{"a/b": [1, 2]}') == "a-b-1-2"
    assert len(in_a_name("x" * 41)) == 8


def test_a_result_of_images_that_were_read_otherwise_is_not_replaced(tmp_path):
    """With --output: without it, what is read otherwise has another name."""
    run, path = write_encoder(tmp_path / "run"), tmp_path / "x.json"
    encoder = {"source": str(run), "random": False, "options": {"img_size": 16, "depth": 2}}
    args = {"output": "x", "encoder": str(run), "arch": None, "options": "{}", "random": False,
            "seed": 0, "ema": False, "resize": 0}  # fmt: skip
    result = {"protocol": "knn", "encoder": encoder, "resize": 18, "settings": {}}
    path.write_text(json.dumps(result))
    check_other_settings(path, Namespace(**args))
    check_other_settings(path, Namespace(**args | {"resize": 18, "options": "{img_size: 16}"}))
    for change, said in (({"resize": 40}, r"resize \(18, now 40\)"),
                         ({"options": "{img_size: 64}"}, r"img_size \(16, now 64\)")):  # fmt: skip
        with pytest.raises(UserError, match=f"holds a result with another {said}"):
            check_other_settings(path, Namespace(**args | change))
    pixels = "{pretrained_cfg_overlay: {mean: [0.1, 0.2, 0.3]}}"
    told = encoder | {"mean": [0.5] * 3, "std": [0.5] * 3}
    file = {"encoder": "random", "arch": "vit_base_patch16_224", "options": pixels}
    random = told | {"source": "random", "random": True}
    path.write_text(json.dumps(result | {"encoder": random}))
    with pytest.raises(UserError, match=r"another mean \(\[0.5, 0.5, 0.5\], now \[0.1, 0.2, 0.3\]"):
        check_other_settings(path, Namespace(**args | file))
    path.write_text(json.dumps(result | {"encoder": told}))
    with pytest.raises(UserError, match="another std "):  # what only the encoder itself says
        write_result(path, result | {"encoder": told | {"std": [0.2] * 3}}, Namespace(**args))
    assert json.loads(path.read_text())["encoder"] == told
    larger = encoder | {"options": {"img_size": 64}}
    for change, said in (({"resize": 40}, r"resize \(40, now 18\)"),
                         ({"encoder": encoder | {"ema": True}}, r"ema \(true, now false\)"),
                         ({"encoder": larger}, r"img_size \(64, now 16\)")):  # fmt: skip
        path.write_text(json.dumps(result | change))
        with pytest.raises(UserError, match=f"holds a result with another {said}"):
            check_other_settings(path, Namespace(**args))
        check_other_settings(path, Namespace(**args | {"output": None}))
    psnr = {key: args[key] for key in ("output", "encoder", "resize")}
    path.write_text(json.dumps({"protocol": "psnr", "settings": {}, "encoder": encoder}))
    check_other_settings(path, Namespace(**psnr))
    with pytest.raises(UserError, match=r"resize \(0, now 40\)"):
        check_other_settings(path, Namespace(**psnr | {"resize": 40}))


def test_a_result_of_other_settings_is_not_replaced(tmp_path):
    path = tmp_path / "knn.json"
    args = {"feature": "cls", "k": 20, "grid": (0.1, 1.0), "val": "val", "micro_batch": 256,
            "output": None, "encoder": "moved", "random": False}  # fmt: skip
    check_other_settings(path, Namespace(**args))  # there is none
    told = {"k": 20, "grid": [0.1, 1.0], "val": str(tmp_path / "val"), "micro_batch": 8}
    result = {"protocol": "knn", "feature": "cls", "settings": told | {"classes": 3},
              "encoder": {"source": str(tmp_path / "run"), "random": False}}  # fmt: skip
    path.write_text(json.dumps(result))
    check_other_settings(path, Namespace(**args))  # of a longer training, perhaps
    for key, value, said in (
        ("k", 1, r"k \(20, now 1\)"),
        ("feature", "own", r'feature \("cls", now "own"\)'),
        ("grid", (0.1,), "grid"),
        ("val", "other", "val"),
    ):
        with pytest.raises(UserError, match=f"holds a result with another {said}.*; remove it"):
            check_other_settings(path, Namespace(**args | {key: value}))
    named = args | {"output": str(path), "encoder": "run"}
    check_other_settings(path, Namespace(**named))
    for key, value in (("encoder", "other"), ("random", True)):
        with pytest.raises(UserError, match=f"holds a result with another {key}"):
            check_other_settings(path, Namespace(**named | {key: value}))

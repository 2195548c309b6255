"""What would fail at the end of an evaluation is refused at its start."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_helpers import coloured_images, write_encoder, write_shards

from eval import attentive, cka, finetune, knn, linprobe, psnr, reconstruct, shape_bias
from eval.shared import finetune_plan
from eval.shared.command import run_command
from eval.shared.labels import class_count, labelled
from eval.shared.results import check_output, named_json
from eval.shared.subsets import keep_subset
from pipeline.errors import UserError
from shard_tools.manifest import read_manifest, write_manifest


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_shards(folder / "train", *coloured_images(12, 3, seed=1))
    write_shards(folder / "val", *coloured_images(6, 3, seed=2))
    write_encoder(folder / "run")
    return folder


def test_a_result_is_a_json_file():
    assert named_json("o/ft") == Path("o/ft.json")
    assert named_json("o/lr-0.1") == Path("o/lr-0.1.json")
    assert named_json("o/ft.json") == Path("o/ft.json")
    for name in (".", "..", "/", "o/"):
        with pytest.raises(UserError, match=r"--output .*: must be a file"):
            named_json(name)


def test_an_output_that_cannot_be_written_is_refused_and_nothing_is_created(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder.json: cannot be written \(Is a directory\)"):
        check_output(tmp_path / "folder.json")
    with pytest.raises(UserError, match=r"x.json: cannot be written \(.*file: Not a directory\)"):
        check_output(tmp_path / "file/deep/x.json")
    with pytest.raises(UserError, match=r"x.json: cannot be written \(.*file: Not a directory\)"):
        check_output(tmp_path / "x.json", tmp_path / "file")  # where checkpoints would go
    check_output(tmp_path / "new/deep/x.json", tmp_path / "new/deep/x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.json"]


COMMANDS = [
    (linprobe, ["--train", "no", "--val", "no"]),
    (finetune, ["--train", "no", "--val", "no"]),
    (attentive, ["--train", "no", "--val", "no"]),
    (knn, ["--train", "no", "--val", "no"]),
    (cka, ["--val", "no"]),
    (psnr, ["--val", "no"]),
    (reconstruct, ["--data", "no"]),
    (shape_bias, ["--classifier", "no", "--images", "no"]),
]


@pytest.mark.parametrize(("module", "words"), COMMANDS, ids=[m.__name__ for m, _ in COMMANDS])
def test_every_command_looks_at_its_output_first(module, words, tmp_path, monkeypatch, capsys):
    """Neither encoder nor data are there: the output is named all the same."""
    (tmp_path / "file").write_text("x")
    output = tmp_path / "file" / ("x.png" if module is reconstruct else "x.json")
    encoder = [] if module is shape_bias else ["--encoder", "nowhere"]
    monkeypatch.setattr(sys, "argv", ["x.py", *encoder, *words, "--output", str(output)])
    # The command leaves the ranks at its end; other tests of this process are still in them.
    monkeypatch.setattr("pipeline.distributed.close", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        run_command(module.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {output}: cannot be written")


def test_labels_and_classes_are_those_of_one_data_set(tmp_path):
    image, label = coloured_images(6, 3, seed=2)
    train = labelled(write_shards(tmp_path / "train", image, label))
    more = labelled(write_shards(tmp_path / "more", image, label, classes=4))
    with pytest.raises(UserError, match=r"do not have the same classes \(3 and 4\)"):
        class_count(train, more)
    other = replace(train, classes=("class0", "class2", "class1"))
    with pytest.raises(
        UserError, match=r"\(number 1 is class1 and class2\); make .*--classes-from"
    ):
        class_count(train, other)
    for labels in (label, label * 2):  # of a set that names none
        rows = write_shards(tmp_path / f"rows-{labels.max()}", image, labels)
        found = read_manifest(rows)
        index = np.array(found.index)
        write_manifest(rows, shards=found.shards, index=index, classes=())
    unlike = labelled(write_shards(tmp_path / "unlike", *coloured_images(6, 3, seed=3)))
    assert class_count(unlike, labelled(tmp_path / "rows-2")) == 3
    for pair in ((train, labelled(rows)), (labelled(rows), train)):
        with pytest.raises(UserError, match=r"rows-4: has label 4 where .*train names 3 classes"):
            class_count(*pair)
    assert class_count(labelled(rows), labelled(tmp_path / "rows-2")) == 5
    index["label"][5] = 10**9
    write_manifest(rows, shards=found.shards, index=index, classes=())
    few = labelled(tmp_path / "rows-2")
    for pair in ((few, labelled(rows)), (labelled(rows), few)):
        with pytest.raises(
            UserError, match=r"rows-4: has label 1000000000 among .* names no classes"
        ):
            class_count(*pair)
    with pytest.raises(UserError, match="without: some samples have no label"):
        labelled(write_shards(tmp_path / "without", image, label - 1))


def test_training_images_as_validation_images_are_said_once(tmp_path, capsys):
    image, label = coloured_images(6, 3, seed=2)
    train = labelled(write_shards(tmp_path / "train", image, label))
    copy = labelled(shutil.copytree(tmp_path / "train", tmp_path / "copy"))
    other = labelled(write_shards(tmp_path / "other", image[::-1], label[::-1]))
    for val, lines in ((train, 1), (copy, 1), (copy, 0), (other, 0)):
        assert class_count(train, val) == 3
        said = capsys.readouterr().err
        assert said.count(f"warning: --val {val.folder} has the images of --train") == lines
        assert said.count("\n") == lines


def test_validation_images_that_are_training_images_are_counted(tmp_path, capsys):
    image, label = coloured_images(40, 4, seed=2)
    train = labelled(write_shards(tmp_path / "train", image, label))
    for name, samples in (("half", range(20)), ("rest", range(20, 40)), ("last", range(12, 40))):
        keep_subset(train, tmp_path / name, np.array(samples), {})
    half, rest, last = (labelled(tmp_path / name) for name in ("half", "rest", "last"))
    for one, other, shared in ((train, rest, 20), (half, rest, 0), (half, last, 8)):
        class_count(one, other)
        said = capsys.readouterr().err
        told = f"warning: {shared} of {other.samples} images of --val {other.home} are in --train"
        assert said.startswith(told) if shared else not said


def test_classes_of_two_subsets_of_one_folder_are_those_of_both(tmp_path):
    image, label = coloured_images(12, 3, seed=2)
    found = read_manifest(write_shards(tmp_path / "all", image, label))
    whole = write_manifest(tmp_path / "all", shards=found.shards, index=np.array(found.index))
    for name, labels in (("train", (0, 1, 2)), ("val", (0, 1))):
        keep_subset(whole, tmp_path / name, np.flatnonzero(np.isin(label, labels)), {})
    assert class_count(labelled(tmp_path / "train"), labelled(tmp_path / "val")) == 3


def test_validation_images_of_classes_without_training_images_are_said_once(tmp_path, capsys):
    """Of what is left by --subset too; training images of other classes do no harm."""
    image, label = coloured_images(12, 3, seed=2)
    every = labelled(write_shards(tmp_path / "every", image, label))
    others, _ = coloured_images(12, 3, seed=3)
    two = labelled(write_shards(tmp_path / "two", others, label % 2, classes=3))
    text = f"warning: 4 of 12 images of --val {every.folder} are of classes of which "
    for train, val, told in ((two, every, 1), (two, every, 0), (every, two, 0)):
        assert class_count(train, val) == 3
        said = capsys.readouterr().err
        assert said.count(f"{text}--train {train.folder} has no image") == told
        assert said.count("\n") == told
    chosen, names = tmp_path / "names.txt", [f"{n}.png" for n in range(12)]
    write_manifest(Path(every.folder), shards=every.shards, index=np.array(every.index),
                   names=names, classes=every.classes)  # fmt: skip
    chosen.write_text("\n".join(names[:2]))
    settings = finetune_plan.Settings(every.folder, two.folder, batch_size=2, subset=str(chosen))
    finetune_plan.check_input(settings, 1)
    assert capsys.readouterr().err == ""
    few = replace(settings, train=every.folder, val=every.folder)
    finetune_plan.check_input(few, 1)
    assert f"{text}what --subset {chosen} leaves of" in capsys.readouterr().err


def test_images_of_one_class_are_not_scored(tmp_path, capsys):
    """Every encoder is right about them; validation images may be of one, with a warning."""
    image, label = coloured_images(6, 3, seed=2)
    folder = write_shards(tmp_path / "train", image, label)
    one = labelled(write_shards(tmp_path / "one", image, label * 0))
    some = labelled(write_shards(tmp_path / "some", image, label * 0 + 1, classes=3))
    for train, val in ((one, one), (some, labelled(folder))):
        with pytest.raises(UserError, match=f"{train.folder}: all images are of one class"):
            class_count(train, val)
    capsys.readouterr()
    assert class_count(labelled(folder), some) == 3
    said = capsys.readouterr().err
    assert f"warning: all 6 images of --val {some.home} are of one class, class1: " in said
    assert class_count(labelled(folder), labelled(folder)) == 3
    assert "of one class" not in capsys.readouterr().err
    found, names = read_manifest(folder), [f"{n}.png" for n in range(6)]
    write_manifest(folder, shards=found.shards, index=np.array(found.index), names=names,
                   classes=found.classes)  # fmt: skip
    chosen = tmp_path / "chosen.txt"
    settings = finetune_plan.Settings(str(folder), some.folder, batch_size=2, subset=str(chosen))
    chosen.write_text("0.png\n1.png\n")
    finetune_plan.check_input(settings, 1)
    chosen.write_text("0.png\n3.png\n")
    with pytest.raises(UserError, match=r"chosen\.txt leaves of .*train: all images are of one"):
        finetune_plan.check_input(settings, 1)


@pytest.mark.parametrize("seed", ["-1", str(2**32), "x"])
def test_a_seed_that_no_generator_takes_is_refused(seed, capsys):
    with pytest.raises(SystemExit) as stopped:
        knn.build_parser().parse_args(
            ["--encoder", "x", "--train", "x", "--val", "x", "--seed", seed]
        )
    assert stopped.value.code == 2
    assert "--seed" in capsys.readouterr().err


def test_an_output_without_a_suffix_has_its_result_beside_its_folder(
    home, tmp_path, monkeypatch, capsys
):
    """From another folder, with the default --ds_config, to the result."""
    words = ["--encoder", home / "run", "--train", home / "train", "--val", home / "val"]
    words += ["--batch-size", 6, "--epochs", 1, "--warmup-epochs", 0, "--workers", 0]
    words += ["--output", "o/lr-0.1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words)])
    monkeypatch.setattr("pipeline.distributed.close", lambda: None)
    run_command(finetune.main)
    assert json.loads((tmp_path / "o/lr-0.1.json").read_text())["images"] == 6
    assert (tmp_path / "o/lr-0.1/classifier.json").is_file()
    assert "→ o/lr-0.1.json" in capsys.readouterr().out

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from shard_samples import (
    SMALL,
    image_tree,
    images_of,
    jpeg,
    labels_of,
    make,
    read_samples,
    report,
    tar_of,
    tars_of,
)

from pipeline.errors import UserError
from shard_tools.cli import ToolError
from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest
from shard_tools.sharding.items import read_item
from shard_tools.sharding.sources import open_source

COUNTS = {"n03": 17, "n01": 9, "n02": 30}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("source") / "train", COUNTS)


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("shards") / "train"
    assert main([str(tree), str(dest), *SMALL]) == 0
    return dest


def test_imagenets_tar_of_tars(tree: Path, shards: Path, tmp_path: Path) -> None:
    inner = {}
    for name in ("n03", "n01", "n02"):
        files = {path.name: path.read_bytes() for path in sorted((tree / name).iterdir())}
        inner[f"{name}.tar"] = tar_of(tmp_path / f"{name}.tar", files).read_bytes()
    outer = tar_of(tmp_path / "ILSVRC2012_img_train.tar", inner)
    assert tars_of(make(outer, tmp_path / "d")).keys() == tars_of(shards).keys()
    for name, data in tars_of(tmp_path / "d").items():  # the names are the same, so the order too
        assert name in ("manifest.json", "names.bin") or data == tars_of(shards)[name]


def test_a_tar_with_class_folders(tree: Path, shards: Path, tmp_path: Path) -> None:
    paths = sorted(tree.rglob("*.JPEG"))
    files = {str(path.relative_to(tree)): path.read_bytes() for path in paths}
    archive = tar_of(tmp_path / "set.tar", files | {"n01/readme.txt": b"x"})
    dest = make(archive, tmp_path / "d")
    assert tars_of(dest)["shard-000000.tar"] == tars_of(shards)["shard-000000.tar"]
    assert labels_of(dest) == labels_of(shards)
    assert report(dest) == {"n01/readme.txt": ("ignored", "not an image by its name")}
    mixed = tar_of(tmp_path / "mixed.tar", files | {"loose.jpg": jpeg(1)})
    assert main([str(mixed), str(tmp_path / "e"), *SMALL]) == 2


def test_imagenets_validation_tar_with_each_kind_of_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in range(1, 8)}
    synsets = ["n2", "n1", "n3", "n1", "n2", "n2", "n3"]
    truth = dict(zip(files, synsets, strict=True))
    archive = tar_of(tmp_path / "val.tar", dict(reversed(files.items())))
    by_line = tmp_path / "by_line.txt"
    by_line.write_text("\n".join(synsets))
    by_name = tmp_path / "by_name.txt"
    by_name.write_text("\n".join(f"{name} {s}" for name, s in reversed(truth.items())))
    devkit = tmp_path / "ILSVRC2012_devkit_t12"
    (devkit / "data").mkdir(parents=True)
    # ILSVRC2012_IDs are not in synset order; the last row is an inner node of the tree.
    rows = [(1, "n3", "w", "g", 0), (2, "n1", "w", "g", 0), (3, "n2", "w", "g", 0)]
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    table = np.array([*rows, (4, "n9", "w", "g", 3)], dtype=[(name, "O") for name in fields])
    scipy.io.savemat(devkit / "data" / "meta.mat", {"synsets": table})
    numbers = {"n3": 1, "n1": 2, "n2": 3}
    lines = "\n".join(str(numbers[s]) for s in synsets)
    (devkit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(lines + "\n")
    with tarfile.open(tmp_path / "devkit.tar.gz", "w:gz") as packed:
        packed.add(devkit, "ILSVRC2012_devkit_t12")
    for number, options in enumerate(
        [
            ("--synsets", str(by_line)),
            ("--synsets", str(by_name)),
            ("--devkit", str(devkit)),
            ("--devkit", str(tmp_path / "devkit.tar.gz")),
        ]
    ):
        dest = make(archive, tmp_path / f"d{number}", *options)
        assert labels_of(dest) == truth
        assert images_of(dest) == files
        assert read_manifest(dest).classes == ("n1", "n2", "n3")
    by_line.write_text(lines)
    assert main([str(archive), str(tmp_path / "numbers"), "--synsets", str(by_line), *SMALL]) == 2
    assert "the labels are numbers such as 1, not synsets" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("1\n2\n3\n")
    given = ("--synsets", str(by_line), "--classes-from", str(tmp_path / "classes.txt"))
    assert read_manifest(make(archive, tmp_path / "given", *given)).classes == ("1", "2", "3")


def test_csv_and_jsonl(tree: Path, tmp_path: Path) -> None:
    paths = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.JPEG"))
    labels = [path.split("/")[0] for path in paths]
    table = tree.parent / "list.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, ["label", "path"])
        writer.writeheader()
        writer.writerows({"path": f"train/{p}", "label": s} for p, s in zip(paths, labels))  # noqa: B905
    dest = make(table, tmp_path / "csv")
    assert labels_of(dest) == {os.path.basename(p): p.split("/")[0] for p in paths}
    lines = [{"path": path, "label": int(s[2])} for path, s in zip(paths, labels, strict=True)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dest = make(tmp_path / "list.jsonl", tmp_path / "jsonl", "--root", str(tree))
    assert labels_of(dest) == {os.path.basename(p): p[2] for p in paths}
    assert read_manifest(dest).classes == ("0", "1", "2", "3")
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps({"path": path}) for path in paths))
    dest = make(tmp_path / "bare.jsonl", tmp_path / "bare", "--root", str(tree))
    assert all("cls" not in sample for sample in read_samples(dest))
    assert set(read_manifest(dest).index["label"].tolist()) == {-1}


def test_a_folder_without_classes_has_no_labels(tree: Path, tmp_path: Path) -> None:
    dest = make(tree / "n01", tmp_path / "d")
    manifest = read_manifest(dest)
    assert (manifest.samples, manifest.classes) == (9, ())
    assert all("cls" not in sample for sample in read_samples(dest))


@pytest.mark.parametrize("source", [".", "train"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,label\na.jpg,dog\nb.jpg,cat\n"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "label": "dog"}\n'
                           '{"file_name": "b.jpg", "label": "cat"}\n'),
    ],
)  # fmt: skip
def test_a_list_among_the_images_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, name: str, text: str
) -> None:
    """As Hugging Face's ImageFolder has it: its labels are not lost."""
    folder = tmp_path / "train"
    folder.mkdir()
    for number, image in enumerate(("a.jpg", "b.jpg")):
        (folder / image).write_bytes(jpeg(number))
    (folder / name).write_text(text)
    assert main([str(tmp_path / source), str(tmp_path.parent / f"{tmp_path.name}-no"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert f"{folder / name}: lists images with labels (its column `label`)" in error
    dest = tmp_path.parent / f"{tmp_path.name}-shards"
    make(folder, dest / "unlabelled", "--unlabelled")
    make(folder / name, dest / "labelled")
    assert images_of(dest / "labelled") == images_of(dest / "unlabelled")
    assert read_manifest(dest / "labelled").classes == ("cat", "dog")
    packed = {path.name: path.read_bytes() for path in folder.iterdir()}
    archive = tar_of(dest / "flat.tar", packed)
    assert main([str(archive), str(dest / "no"), *SMALL]) == 2
    assert f"flat.tar: holds {name}, which is not read in an archive" in capsys.readouterr().err
    make(archive, dest / "packed", "--unlabelled")
    (folder / name).write_text(text.replace("label", "text"))
    make(folder, dest / "captions")


def test_validation_classes_follow_the_training_set(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = image_tree(tmp_path / "val", {"n03": 2, "n02": 2})  # n01 has no validation image
    dest = make(val, tmp_path / "d", "--classes-from", str(shards))
    assert read_manifest(dest).classes == ("n01", "n02", "n03")
    labels = {
        os.path.dirname(n): i["label"]
        for n, i in zip(  # noqa: B905
            read_manifest(dest).names, read_manifest(dest).index
        )
    }
    assert labels == {"n02": 1, "n03": 2}
    image_tree(val, {"n09": 1})
    assert main([str(val), str(tmp_path / "e"), *SMALL, "--classes-from", str(shards)]) == 2
    assert "class 'n09' is not among the 3 given" in capsys.readouterr().err


def test_classes_that_look_alike_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two forms of one name, in one set or in training and validation set."""
    composed, split = "Zo\xeb", "Zoe\u0308"
    forms = f"{split!a} and {composed!a} are both"
    image_tree(tmp_path / "one", {composed: 2, split: 2})
    image_tree(tmp_path / "two" / "train", {composed: 2})
    image_tree(tmp_path / "two" / "val", {split: 2})
    for source in ("one", "two"):
        assert main([str(tmp_path / source), str(tmp_path / "dest"), *SMALL]) == 2
        assert forms in capsys.readouterr().err


def test_a_file_that_changes_under_way_is_named(tree: Path, tmp_path: Path) -> None:
    source = open_source(image_tree(tmp_path / "s", {"a": 1}))
    (item,) = source.items
    (tmp_path / "s" / item.file).write_bytes(b"shorter")
    with pytest.raises(ToolError, match=r"a_000.JPEG: changed since it was listed"):
        read_item(source.root, item)
    (tmp_path / "s" / item.file).unlink()
    with pytest.raises(UserError, match=r"a_000.JPEG: cannot be read \(No such file"):
        read_item(source.root, item)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["tree/a/a_000.JPEG"], "a_000.JPEG: is one image; give its folder, or a table of paths"),
        (["empty"], "empty: holds no images"),
        (["others"], r"others: holds no images \(.*\), but notes.pdf$"),
        (["flat.tar", "--devkit", "two.txt"], r"ILSVRC2012_devkit_t12 \(not a tar\)$"),
        (["unlabelled.csv", "--classes-from", "two.txt"], "has no column `label` to match"),
        (["list.csv"], "the header has no column `path`; found file, label"),
        (["gone.jsonl"], "row 1: .*ghost.jpg: No such file"),
        (
            ["list.tsv"],
            r"neither a folder, a tar, a zip, Parquet nor a list \(.csv .jsonl .ndjson\)",
        ),
        (["text.tar"], "not a readable, uncompressed tar"),
        (["packed.tar"], "damaged or cut gzip stream"),
        (["cut.tar"], "cut inside"),
        (["tree", "--quality", "0"], "--quality 0: must be at least 1 and at most 100"),
        (["tree", "--max-side", "0"], "--max-side 0: must be at least 1"),
        (["tree", "--num-tasks", "3", "--task-id", "3"], "--task-id 3: must be between 0 and"),
        (["tree", "--name", "a.b"], "--name 'a.b': must be a plain word"),
        (["tree", "--merge"], "nothing to merge"),
        (["."], "dest: is inside . and would become part of it"),
        (["flat.tar", "--synsets", "two.txt"], "1 images, but 2 labels"),
        (["tree", "--classes-from", "list.csv"], "class 'a' is not among"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "unlabelled.csv").write_text("path\ntree/a/a_000.JPEG\n")
    (tmp_path / "list.csv").write_text("file,label\nx.jpg,1\n")
    (tmp_path / "list.tsv").write_text("path\tlabel\nx.jpg\t1\n")
    (tmp_path / "gone.jsonl").write_text('{"path": "ghost.jpg"}\n')
    (tmp_path / "text.tar").write_text("x" * 2000)
    (tmp_path / "two.txt").write_text("n1\nn2\n")
    image_tree(tmp_path / "tree", {"a": 2})
    flat = tar_of(tmp_path / "flat.tar", {"x.JPEG": jpeg(1, (60, 60))})
    (tmp_path / "cut.tar").write_bytes(flat.read_bytes()[:900])
    (tmp_path / "packed.tar").write_bytes(gzip.compress(flat.read_bytes())[:-400])
    assert main([arguments[0], "dest", *arguments[1:], "--workers", "1"]) == 2
    captured = capsys.readouterr()
    assert re.search(sentence, captured.err), captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "dest" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["tree", "all.tar", "all.tar.gz", "class_tars", "list.csv"])
def test_a_relative_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The same shards by its relative and absolute path, and resumed from another folder."""
    monkeypatch.chdir(tmp_path)
    there = Path("in/here")
    tree = image_tree(tmp_path / there / "tree", {"n00000001": 3, "n00000002": 2})
    files = {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*.JPEG")}
    assert len(files) == 5
    tar_of(there / "all.tar", files)
    (there / "all.tar.gz").write_bytes(gzip.compress((there / "all.tar").read_bytes()))
    (there / "class_tars").mkdir()
    for name in ("n00000001", "n00000002"):
        inside = {Path(file).name: data for file, data in files.items() if file.startswith(name)}
        tar_of(there / "class_tars" / f"{name}.tar", inside)
    lines = (f"tree/{file},{file.split('/')[0]}" for file in files)
    (there / "list.csv").write_text("\n".join(["path,label", *lines]))
    make(there / kind, tmp_path / "relative")
    make(tmp_path / there / kind, tmp_path / "absolute")
    assert tars_of(tmp_path / "relative") == tars_of(tmp_path / "absolute")
    assert len(images_of(tmp_path / "relative")) == 5

    if kind.endswith(".gz"):
        return  # tasks cannot share it
    two = ["--num-tasks", "2", *SMALL]
    assert main([str(there / kind), "parts", "--task-id", "0", *two]) == 0
    monkeypatch.chdir(tmp_path / "in")
    assert main([f"here/{kind}", "../parts", "--task-id", "1", *two]) == 0
    assert main([f"here/{kind}", "../parts", "--merge"]) == 0
    assert tars_of(tmp_path / "parts") == tars_of(tmp_path / "absolute")


def test_a_source_that_moved(tmp_path: Path) -> None:
    """A stopped job resumes from where its source is now."""
    tree = image_tree(tmp_path / "tree", {"a": 12})
    make(tree, tmp_path / "whole")
    damaged = sorted(tree.rglob("*.JPEG"))[-1]
    good = damaged.read_bytes()
    damaged.write_bytes(bytes(len(good)))
    assert main([str(tree), str(tmp_path / "dest"), *SMALL, "--workers", "1"]) == 2
    damaged.write_bytes(good)
    moved = tmp_path / "another disk" / "tree"
    moved.parent.mkdir()
    tree.rename(moved)
    make(moved, tmp_path / "dest", "--resume")
    assert tars_of(tmp_path / "dest") == tars_of(tmp_path / "whole")

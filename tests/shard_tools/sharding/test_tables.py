"""CSV and JSONL: labels are all integers, all names, or absent; nothing else passes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from shard_samples import SMALL, jpeg, labels_of

from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest

IMAGES = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


def write_csv(path: Path, labels: list[Any], header: str = "path,label") -> Path:
    rows = [f"{number}.jpg,{label}" for number, label in enumerate(labels)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def write_jsonl(path: Path, labels: list[Any]) -> Path:
    rows = [json.dumps({"path": f"{n}.jpg", "label": label}) for n, label in enumerate(labels)]
    path.write_text("\n".join(rows) + "\n")
    return path


def labels(table: Path, images: Path, dest: Path, *options: str) -> list[int]:
    """Label of image 0, 1, …"""
    assert main([str(table), str(dest), *SMALL, "--root", str(images), *options]) == 0
    manifest = read_manifest(dest)
    found = zip(manifest.names, manifest.index["label"].tolist(), strict=True)
    return [label for _, label in sorted(found, key=lambda pair: int(pair[0].split(".")[0]))]


def test_integers_stay_as_they_are(images: Path, tmp_path: Path) -> None:
    numbers = [10, 9, 2, 0, 11, 2, 3, 3, 10, 1, 0, 5]
    for write in (write_csv, write_jsonl):
        table = write(tmp_path / f"t{'.csv' if write is write_csv else '.jsonl'}", numbers)
        dest = tmp_path / write.__name__
        assert labels(table, images, dest) == numbers
        assert read_manifest(dest).classes == tuple(map(str, range(12)))


def test_names_are_sorted(images: Path, tmp_path: Path) -> None:
    names = ["cat", "ant", "dog ", "New York"] * 3
    dest = tmp_path / "d"
    table = write_csv(tmp_path / "t.csv", names)
    assert labels(table, images, dest) == [2, 1, 3, 0] * 3
    assert read_manifest(dest).classes == ("New York", "ant", "cat", "dog")
    assert labels_of(dest)["1.jpg"] == "ant"


def test_no_labels_in_each_form(images: Path, tmp_path: Path) -> None:
    tables = [
        write_csv(tmp_path / "empty.csv", [""] * IMAGES),
        write_jsonl(tmp_path / "null.jsonl", [None] * IMAGES),
    ]
    bare = tmp_path / "bare.csv"
    bare.write_text("path\n" + "\n".join(f"{n}.jpg" for n in range(IMAGES)))
    for table in (*tables, bare):
        assert labels(table, images, tmp_path / table.stem) == [-1] * IMAGES
        assert read_manifest(tmp_path / table.stem).classes == ()


def test_headers_without_case_and_space(images: Path, tmp_path: Path) -> None:
    for number, header in enumerate(("Path, Label", "\ufeffPATH ,LABEL", '"path","label"')):
        table = write_csv(tmp_path / f"{number}.csv", [1, 0] * 6, header)
        assert labels(table, images, tmp_path / f"d{number}") == [1, 0] * 6
    (tmp_path / "j.jsonl").write_text(
        '{"Path": "0.jpg", " Label": 4}\r\n{"PATH": "1.jpg", "LABEL": 0}'
    )
    assert labels(tmp_path / "j.jsonl", images, tmp_path / "j") == [4, 0]


def test_given_classes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("zebra\nant\ncat\n")
    names = write_csv(tmp_path / "n.csv", ["ant", "cat"] * 6)
    numbers = write_csv(tmp_path / "i.csv", [0, 2] * 6)
    options = ("--classes-from", str(classes))
    assert labels(names, images, tmp_path / "n", *options) == [1, 2] * 6
    capsys.readouterr()
    assert labels(numbers, images, tmp_path / "i", *options) == [0, 2] * 6
    assert "12 images of 3 classes; no image of 1 of them (ant)" in capsys.readouterr().out
    assert read_manifest(tmp_path / "i").classes == ("zebra", "ant", "cat")
    beyond = write_csv(tmp_path / "b.csv", [0, 3] * 6)
    dest = str(tmp_path / "b")
    assert main([str(beyond), dest, *SMALL, "--root", str(images), *options]) == 2
    assert "label 3, but 3 classes are given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("path,label\n0.jpg,1\n1.jpg\n", "row 2 has 1 fields where the header has 2"),
        ("path,label\n0.jpg,1\n1.jpg,2,3\n", "row 2 has 3 fields where the header has 2"),
        ("path,label\n0.jpg,1\n1.jpg,\n", "row 2 has no label, others do"),
        ("path,label\n0.jpg,1\n1.jpg,None\n", "row 2 has no label, others do"),
        ("path,label\n0.jpg,1\n1.jpg,cat\n", "row 2 has the label 'cat', row 1 1; labels are all"),
        ("path,label\n0.jpg,1.5\n", "row 1 has the label '1.5', which is neither"),
        ("path,label\n0.jpg,1.0\n", "row 1 has the label '1.0', which is neither"),
        ("path,label\n0.jpg,-1\n", "row 1 has the label '-1', which is neither"),
        ("path,label\n0.jpg,07\n", "row 1 has the label '07', which is neither"),
        ("path,label\n0.jpg,1000000\n", "row 1 has the label 1000000, which is neither"),
        ("path,synset\n0.jpg,n01\n", "a column `synset`, which looks like labels"),
        ("path,label,Class Name\n0.jpg,1,x\n", "a column `class name`, which looks like labels"),
        ("path,label,Label\n0.jpg,1,1\n", "the header has the column `label` twice"),
        ("file,label\n0.jpg,1\n", "the header has no column `path`; found file, label"),
        ("path;label\n0.jpg;1\n", "the header has no column `path`"),
        ("path,label,Split\n0.jpg,1,train\n1.jpg,0,Test \n", "column `split` names a training set"),
        ('{"path": "0.jpg", "set": "val"}\n{"path": "1.jpg", "set": "train"}', r"\(train, val\)"),
        ('{"path": "\\ud800.jpg"}', "row 1 has no usable path"),
        ("", "is empty; it needs a header line"),
        ("path,label\n", "holds no images"),
        ('path,label\n"0.jpg,1\n', "cannot be read"),
        ("path,label\n,1\n", "row 1 has no usable path"),
        ("path,label\n.,1\n", "row 1: .* is not a regular file"),
        ("path,label\n0.jpg,1\n./0.jpg,2\n", "row 2 gives ./0.jpg the label 2, row 1 1"),
        ('{"path": "0.jpg", "label": 1}\n{"path": "1.jpg", "label": null}', "row 2 has no label"),
        ('{"path": "0.jpg", "label": 1}\n{"path": "1.jpg"}', "row 2 has no label"),
        (
            '{"path": "0.jpg", "label": 1}\n{"path": "1.jpg", "label": "a"}',
            "row 2 has the label 'a'",
        ),
        ('{"path": "0.jpg", "label": true}', "row 1 has the label True, which is neither"),
        ('{"path": "0.jpg", "label": 2.0}', "row 1 has the label 2.0, which is neither"),
        ('{"path": "0.jpg", "label": NaN}', "row 1 has the label nan, which is neither"),
        ('{"path": "0.jpg", "label": [1]}', r"row 1 has the label \[1\], which is neither"),
        ('{"path": "0.jpg", "wnid": "n01"}', "row 1 has a column `wnid`, which looks like labels"),
        ('{"path": "0.jpg", "label": 1, "label": 2}', "row 1 has the column `label` twice"),
        ('{"path": ["0.jpg"]}', "row 1 has no usable path"),
        ('{"path": 3}', "row 1 has no usable path"),
        ('["0.jpg"]', "row 1 is no JSON object"),
        ('{"path": "0.jpg"', r"row 1 is no JSON \(Expecting ',' delimiter at character 17\)"),
        ("{}", "row 1 has no column `path`"),
    ],
)
def test_anything_else_names_its_row(
    content: str,
    sentence: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = tmp_path / ("t.jsonl" if content[:1] in ("{", "[") else "t.csv")
    table.write_text(content)
    dest = tmp_path / "d"
    assert main([str(table), str(dest), *SMALL, "--root", str(images)]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert error.count("\n") == 1
    assert not dest.exists()


def test_a_huge_image_names_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.jpg").touch()
    os.truncate(tmp_path / "0.jpg", (1 << 30) + 1)  # sparse
    table = write_csv(tmp_path / "t.csv", [1])
    assert main([str(table), str(tmp_path / "d"), *SMALL, "--root", str(tmp_path)]) == 2
    assert "row 1: " in (error := capsys.readouterr().err)
    assert "0.jpg: is 1073741825 bytes long, the limit is 1073741824" in error


def test_an_image_may_come_twice_with_one_label(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,label\n0.jpg,1\n0.jpg,1\n1.jpg,0\n")
    assert labels(table, images, tmp_path / "d") == [1, 1, 0]

"""Parquet files as Hugging Face's `datasets` and others write them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from shard_samples import SMALL, encode, image_tree, jpeg, picture, read_samples, refused, report

from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest
from shard_tools.sharding.parquet import Wanted, list_parquet
from shard_tools.sharding.parquet_sets import parquet_sets

NAMES = ("ship / boat", "cat", "aeroplane")  # not in alphabetical order
CLASSES = {"_type": "ClassLabel", "names": list(NAMES)}


def table(
    path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Write columns; features: Hugging Face's description of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pyarrow.table(columns)
    if features is not None:
        said = json.dumps({"info": {"features": features}})
        made = made.replace_schema_metadata({"huggingface": said})
    parquet.write_table(made, path, **options)
    return path


def structs(images: Sequence[bytes | None], paths: Sequence[str | None] | None = None) -> Any:
    """The storage of Hugging Face's Image: {bytes, path}."""
    names = paths or [None] * len(images)
    values = [
        None if image is None and name is None else {"bytes": image, "path": name}
        for image, name in zip(images, names, strict=True)
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array(values, kind)


def labelled(path: Path, first: int = 0, count: int = 6, **options: Any) -> Path:
    """`count` images, of which number i has the label i % 3 and no name."""
    numbers = range(first, first + count)
    images = structs([jpeg(number) for number in numbers])
    labels = [number % 3 for number in numbers]
    features = {"image": {"_type": "Image"}, "label": CLASSES}
    return table(path, {"image": images, "label": labels}, features, **options)


def made(source: Path, dest: Path, *options: str) -> dict[bytes, tuple[str, str]]:
    """Bytes of each image → its name and class."""
    assert main([str(source), str(dest), *SMALL, *options]) == 0
    classes = read_manifest(dest).classes
    found = {}
    for sample in read_samples(dest):
        said = json.loads(sample["json"])
        label = classes[int(sample["cls"])] if "cls" in sample else ""
        found[sample["jpg"]] = (said["name"], label)
    return found


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_images_keep_their_bytes_and_labels_the_order_of_their_names(
    tmp_path: Path, compression: str
) -> None:
    options = {"compression": compression, "row_group_size": 4, "data_page_size": 500}
    source = labelled(tmp_path / "in" / "train.parquet", count=9, **options)
    found = made(source, tmp_path / "out")
    assert found == {jpeg(i): (f"train/{i:08d}", NAMES[i % 3]) for i in range(9)}
    assert read_manifest(tmp_path / "out").classes == NAMES
    assert not (tmp_path / "out" / "parts").exists()
    assert report(tmp_path / "out") == {}


def test_train_and_validation_set_of_a_repository(tmp_path: Path) -> None:
    data = tmp_path / "repo" / "data"
    for part in range(3):
        labelled(data / f"train-{part:05d}-of-00003-ab12.parquet", 4 * part, 4)
    labelled(data / "validation-00000-of-00001.parquet", 50, 5)
    labelled(data / "test-00000-of-00001.parquet", 60, 5)
    (tmp_path / "repo" / "README.md").write_text("---\n")
    assert main([str(tmp_path / "repo"), str(tmp_path / "out"), *SMALL]) == 0
    for split, numbers in (("train", range(12)), ("val", range(50, 55))):
        assert read_manifest(tmp_path / "out" / split).classes == NAMES
        found = {
            sample["jpg"]: int(sample["cls"]) for sample in read_samples(tmp_path / "out" / split)
        }
        assert found == {jpeg(number): number % 3 for number in numbers}


@pytest.mark.parametrize(
    "files",
    [
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["data/train.parquet", "data/valid.parquet"],
        ["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"],
        ["default/train/0000.parquet", "default/test/0000.parquet"],
        ["train/0000.parquet", "test/0000.parquet"],
        ["train/0000.parquet", "val/0000.parquet"],
    ],
)
def test_where_the_files_of_two_splits_are(tmp_path: Path, files: list[str]) -> None:
    for number, name in enumerate(files):
        labelled(tmp_path / "in" / name, 10 * number)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *SMALL]) == 0
    assert {sample["jpg"] for sample in read_samples(tmp_path / "out" / "val")} == {
        jpeg(number) for number in range(10, 16)
    }


def test_the_splits_of_a_folder(tmp_path: Path) -> None:
    assert parquet_sets(tmp_path) == {}
    names = ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet"]
    names.append("Test-00000-OF-00001.PARQUET")
    for name in names:
        (tmp_path / name).touch()
    assert parquet_sets(tmp_path) == {
        "Test": (tmp_path / names[2],),
        "train": (tmp_path / names[1], tmp_path / names[0]),
    }
    for name in ("in/data/test.parquet", "in/assets/logo.png", "no/1.parquet", "no/0.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert parquet_sets(tmp_path / "in") == {"test": (tmp_path / "in" / "data" / "test.parquet",)}
    assert parquet_sets(tmp_path / "no") == {
        "": (tmp_path / "no" / "0.parquet", tmp_path / "no" / "1.parquet")
    }


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["train-00001-of-00002", "test"], "part 0 is missing beside train-00001-of-00002"),
        (["train-00000-of-00003", "train-00002-of-00003"], "part 1 is missing beside train-00000"),
        (["in/train/a-00001-of-00002", "in/test/a"], "part 0 is missing beside a-00001-of-00002"),
        (
            ["train-00000-of-00001-a", "train-00000-of-00001-b"],
            "more .parquet files than the parts",
        ),
        (["train-00000-of-00001", "train"], "more .parquet files than the parts"),
        (["test", "validation"], "holds test and validation, which are not classes; give a folder"),
        (["test/0000", "validation/0000"], "holds test and validation, which are not classes"),
        (["default/partial-train/0000", "default/validation/0000"], "gigabytes of train only"),
        (["default/train/0000", "default/partial-test/0000"], "gigabytes of test only"),
        (["cats/train", "dogs/train"], "sets in Parquet; give the folder of one: cats, dogs"),
        (["cats/data/train", "dogs/0000"], "give the folder of one: cats/data, dogs"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], sentence: str
) -> None:
    for name in names:
        labelled(tmp_path / "in" / f"{name}.parquet")
    assert sentence in refused(capsys, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("source", ["in", "in/train", "in/train/data-00000-of-00001.arrow"])
def test_files_of_save_to_disk_say_how_to_make_parquet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff")
    (tmp_path / "in" / "train" / "state.json").write_text("{}")
    error = refused(capsys, tmp_path / source, tmp_path / "out")
    assert error.endswith(
        "; datasets.load_from_disk(FOLDER)[SPLIT].to_parquet(SPLIT.parquet) makes what is read\n"
    )


def test_the_part_that_was_converted_can_be_taken(tmp_path: Path) -> None:
    source = labelled(tmp_path / "in" / "partial-train" / "0000.parquet", count=4)
    assert len(made(source.parent, tmp_path / "out")) == 4


def test_other_splits_are_named_beside_train_and_validation_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "test", "extra"):
        labelled(tmp_path / "in" / name / "0000.parquet")
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *SMALL]) == 0
    assert "validation set in test; not read: extra" in capsys.readouterr().out


def test_names_of_the_rows_are_kept_where_each_has_its_own(tmp_path: Path) -> None:
    images, labels = structs([jpeg(1), jpeg(2)], ["a.jpg", "b.png"]), ["dog", "cat"]
    source = table(tmp_path / "x.parquet", {"image": images, "label": labels})
    assert made(source, tmp_path / "out") == {jpeg(1): ("a.jpg", "dog"), jpeg(2): ("b.png", "cat")}
    for letter, names in (("y", ["a.jpg", "a.jpg"]), ("z", ["a.jpg", None])):
        others = structs([jpeg(1), jpeg(2)], names)
        source = table(tmp_path / f"{letter}.parquet", {"image": others, "label": labels})
        assert made(source, tmp_path / f"out-{letter}") == {
            jpeg(1): (f"{letter}/00000000", "dog"), jpeg(2): (f"{letter}/00000001", "cat")
        }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "features", "kind"),
    [
        ({"jpg": [jpeg(1)], "cls": [7], "key": ["k"]}, None, "7"),
        ({"jpg": [jpeg(1)], "class_id": [7], "Label": ["dog"]}, None, "dog"),
        ({"img": structs([jpeg(1)]), "thumbnail": [b"t"], "label": ["dog"]}, None, "dog"),
        (
            {"photo": structs([jpeg(1)]), "mask": structs([b"m"]), "y": [2], "label": [1.5]},
            {"photo": {"_type": "Image"}, "y": CLASSES, "mask": {"_type": "Value"}},
            NAMES[2],
        ),
        ({"image": pyarrow.array([jpeg(1)], pyarrow.large_binary()), "text": ["a"]}, None, ""),
    ],
)
def test_columns_are_found_by_description_type_and_name(
    tmp_path: Path, columns: dict[str, Any], features: dict[str, Any] | None, kind: str
) -> None:
    source = table(tmp_path / "x.parquet", columns, features)
    assert made(source, tmp_path / "out") == {jpeg(1): ("x/00000000", kind)}


CIFAR100 = {
    "img": structs([jpeg(1), jpeg(2)]),
    "fine_label": [1, 0],
    "coarse_label": [2, 2],
}
CIFAR100_FEATURES = {"img": {"_type": "Image"}, "fine_label": CLASSES, "coarse_label": CLASSES}


def test_one_of_several_columns_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "x.parquet", CIFAR100, CIFAR100_FEATURES)
    error = refused(capsys, source, tmp_path / "out")
    assert "has several columns of labels, fine_label, coarse_label; choose with --label-c" in error
    assert made(source, tmp_path / "coarse", "--label-column", "coarse_label") == {
        jpeg(1): ("x/00000000", NAMES[2]), jpeg(2): ("x/00000001", NAMES[2])
    }  # fmt: skip
    assert made(source, tmp_path / "fine", "--label-column", "fine_label") == {
        jpeg(1): ("x/00000000", NAMES[1]), jpeg(2): ("x/00000001", NAMES[0])
    }  # fmt: skip
    assert made(source, tmp_path / "none", "--unlabelled") == {
        jpeg(1): ("x/00000000", ""), jpeg(2): ("x/00000001", "")
    }  # fmt: skip
    two = {"a": structs([jpeg(1)]), "b": structs([jpeg(2)])}
    source = table(tmp_path / "two.parquet", two)
    assert "several columns of images, a, b; choose with --image-column" in refused(
        capsys, source, tmp_path / "out"
    )
    assert made(source, tmp_path / "b", "--image-column", "b") == {jpeg(2): ("two/00000000", "")}


@pytest.mark.parametrize(
    ("columns", "features", "options", "sentence"),
    [
        ({"text": ["a"]}, None, [], "x.parquet: has no column of images; found text"),
        ({"image": [b"x"]}, None, ["--label-column", "y"], "--label-column y: "),
        (
            {"image": [b"x"]},
            None,
            ["--synsets", "synsets.txt"],
            "so --synsets and --devkit do nothing",
        ),
        ({"image": [b"x"], "label": [-1]}, None, [], "row 0 has the label -1, which says"),
        ({"image": [b"x"], "label": [1.5]}, None, [], "row 0 has the label 1.5, which is neither"),
        ({"image": [b"x"], "label": [[1]]}, None, [], "row 0 has the label [1], which is neither"),
        ({"image": [b"x"] * 2, "label": [1, None]}, None, [], "row 1 has no label, others do"),
        ({"image": [b"x"] * 2, "label": ["a", "3"]}, None, [], "row 1 has the label 3, row 0 'a'"),
        ({"image": [b"x"], "label": [None]}, None, [], "its column `label` is empty; see --unl"),
        (
            {"image": [b"x"], "label": [0]},
            {"label": {"_type": "ClassLabel", "names": ["a", "b", "a"]}},
            [],
            "two classes of its column `label` are called 'a'",
        ),
        ({"image": [b"x"], "label": [3]}, {"label": CLASSES}, [], "label 3, but 3 classes have"),
        ({"image": [jpeg(1), b""], "label": [0, 1]}, None, [], "row 1 holds no image; --on-error"),
        ({"image": structs([None], ["a/b.jpg"])}, None, [], "only the name of a file (a/b.jpg)"),
        ({"image": [b"GIF"], "label": [0]}, None, [], "x/00000000"),
    ],
)
def test_what_cannot_be_taken_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: dict[str, Any],
    features: dict[str, Any] | None,
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synsets.txt").write_text("n00000001\n")
    source = table(tmp_path / "x.parquet", columns, features)
    capsys.readouterr()
    assert main([str(source), str(tmp_path / "out"), *SMALL, *options]) == 2
    assert sentence in capsys.readouterr().err.split("error: ")[-1]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_image_beyond_the_limit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = sorted((jpeg(1), jpeg(2)), key=len)
    monkeypatch.setattr("shard_tools.sharding.parquet.LONGEST_IMAGE", len(small))
    source = table(tmp_path / "x.parquet", {"image": [small, large]})
    error = refused(capsys, source, tmp_path / "out")
    assert f"x.parquet: row 1: is {len(large)} bytes long, the limit" in error


def test_rows_and_files_that_are_skipped_are_reported(tmp_path: Path) -> None:
    columns = {"image": structs([jpeg(1), None, jpeg(3)], ["a", "b", "c"]), "label": [0, 1, 2]}
    table(tmp_path / "in" / "train-00000-of-00004.parquet", columns)
    torn = tmp_path / "in" / "train-00001-of-00004.parquet"
    torn.write_bytes(with_a_damaged_page(torn))
    other = {"image": structs([jpeg(5)], ["d"]), "label": [1]}
    table(tmp_path / "in" / "train-00002-of-00004.parquet", other)
    (tmp_path / "in" / "train-00003-of-00004.parquet").write_bytes(b"PAR1 and no more")
    found = made(tmp_path / "in", tmp_path / "out", "--on-error", "skip")
    assert found == {jpeg(1): ("a", "0"), jpeg(3): ("c", "2"), jpeg(5): ("d", "1")}
    lines = report(tmp_path / "out")
    assert "row 1 holds no image" in str(lines)
    assert str(lines).count("cannot be read as Parquet") == 2


def with_a_damaged_page(path: Path) -> bytes:
    """A Parquet file with the checksums of its pages, of which one is wrong."""
    columns = {"image": structs([jpeg(7)], ["e"]), "label": [1]}
    table(path, columns, compression="none", write_page_checksum=True)
    data = path.read_bytes()
    at = data.index(jpeg(7)) + len(jpeg(7)) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_damaged_file_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.parquet"
    for damaged in (b"", b"PAR1", labelled(path).read_bytes()[:-20], with_a_damaged_page(path)):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert main([str(path), str(tmp_path / "out"), *SMALL]) == 2
        assert f"{path}: cannot be read as Parquet (" in capsys.readouterr().err


def test_images_beside_parquet_and_other_misunderstandings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_tree(tmp_path / "in", {"a": 2, "b": 2})
    table(tmp_path / "in" / "metadata.parquet", {"file_name": ["x"], "label": [1]})
    assert "and beside them" in refused(capsys, tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "metadata.parquet").unlink()
    for source in (tmp_path / "in", tmp_path / "in" / "list.csv"):
        (tmp_path / "in" / "list.csv").write_text("path,label\na/a_000.JPEG,1\n")
        error = refused(capsys, source, tmp_path / "out", "--image-column", "x")
        assert "--image-column and --label-column are for" in error
    source = labelled(tmp_path / "x.parquet")
    error = refused(capsys, source, tmp_path / "out", "--num-tasks", "2")
    assert "is Parquet and must be unpacked first; shard_tools/make_shards.py, without" in error
    labelled(tmp_path / "two" / "a.parquet")
    table(tmp_path / "two" / "b.parquet", {"image": structs([jpeg(1)]), "label": [1]})
    capsys.readouterr()
    assert main([str(tmp_path / "two"), str(tmp_path / "o"), *SMALL]) == 2
    assert "b.parquet: has other columns or classes than" in capsys.readouterr().err


def test_without_pyarrow_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = labelled(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = refused(capsys, source, tmp_path / "out", "--on-error", "skip")
    assert "is Parquet, which needs pyarrow, which is not installed: pip install pyarrow" in error


def test_synsets_in_file_names_are_the_classes_in_the_order_of_the_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"n0000000{digit}_{digit}_n0000000{digit}.JPEG" for digit in (7, 3, 5)]
    images = structs([jpeg(number) for number in range(3)], names)
    features = {"image": {"_type": "Image"}, "label": CLASSES}
    source = table(tmp_path / "x.parquet", {"image": images, "label": [1, 0, 2]}, features)
    assert made(source, tmp_path / "out") == {
        jpeg(i): (f"n0000000{d}/n0000000{d}_{d}.JPEG", f"n0000000{d}")
        for i, d in enumerate((7, 3, 5))
    }
    synsets = ("n00000003", "n00000007", "n00000005")
    assert read_manifest(tmp_path / "out").classes == synsets
    source = table(tmp_path / "z.parquet", {"image": images})
    assert {kind for _, kind in made(source, tmp_path / "out-z").values()} == {*synsets}
    source = table(tmp_path / "y.parquet", {"image": images, "label": [1, 1, 2]}, features)
    error = refused(capsys, source, tmp_path / "out-y")
    assert "its labels and the synsets in its file names disagree" in error


def test_a_resumed_job_takes_the_tar_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = labelled(tmp_path / "x.parquet")
    first = list_parquet([source], tmp_path / "unpacked", False, Wanted())
    monkeypatch.setattr("shard_tools.sharding.parquet._images", None)
    again = list_parquet([source], tmp_path / "unpacked", False, Wanted())
    assert again == first
    tars = list((tmp_path / "unpacked").iterdir())
    assert [path.stat().st_mtime_ns for path in tars] == [source.stat().st_mtime_ns]


def test_the_tar_of_one_column_is_not_taken_for_that_of_another(tmp_path: Path) -> None:
    two = {"a": structs([jpeg(1)]), "b": structs([jpeg(2)])}
    source = table(tmp_path / "x.parquet", two)
    for column, data in (("a", jpeg(1)), ("b", jpeg(2))):
        rows = list_parquet([source], tmp_path / "unpacked", False, Wanted(images=column))
        (image,) = rows.found.images
        assert Path(image.file).read_bytes()[image.offset :][: image.size] == data


def test_other_formats_are_converted_as_from_anywhere(tmp_path: Path) -> None:
    png = encode(picture(3), "PNG")
    source = table(tmp_path / "x.parquet", {"image": structs([png], ["a.png"])})
    (data,) = made(source, tmp_path / "out")
    assert data[:2] == b"\xff\xd8"
    assert "PNG" in str(report(tmp_path / "out"))


def test_columns_that_hold_no_encoded_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, path = [jpeg(1), jpeg(2)], tmp_path / "x.parquet"
    table(path, {"image": structs(images), "pages": [[i] for i in images], "label": [0, 1]})
    for column, kind in (("label", "int64"), ("pages", "list<element: binary>")):
        error = refused(capsys, path, tmp_path / "out", "--image-column", column)
        assert f"{path}: its column `{column}` is of the type {kind}, not of encoded" in error
    error = refused(capsys, path, tmp_path / "out", "--label-column", "image")
    assert "row 0 has the label {'bytes': b'" in error
    assert len(error) < 500  # not the whole image
    table(path, {"image": [{"bytes": "a.jpg"}], "label": [0]})
    assert "of the type struct<bytes: string>, not" in refused(capsys, path, tmp_path / "out")

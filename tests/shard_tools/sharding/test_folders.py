"""Folders as people have them: system folders, links, empty classes, images outside of classes."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_samples import SMALL, image_tree, images_of, jpeg, labels_of, make, refused, report

from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree", {"b": 3, "a": 2})


def test_system_folders_and_files_are_no_classes_and_no_images(tree: Path, tmp_path: Path) -> None:
    wanted = images_of(make(tree, tmp_path / "before"))
    folders = ("@eaDir", ".ipynb_checkpoints", "__MACOSX", "lost+found", ".cache", "$RECYCLE.BIN")
    for name in folders:
        for above in (tree, tree / "a"):
            (above / name / "inner").mkdir(parents=True)
            (above / name / "inner" / "x.jpg").write_bytes(b"no image")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._a_000.JPEG"):
        (tree / name).write_bytes(b"x")
        (tree / "a" / name).write_bytes(b"x")
    dest = make(tree, tmp_path / "d")
    assert images_of(dest) == wanted
    assert read_manifest(dest).classes == ("a", "b")
    said = {name: reason for name, (what, reason) in report(dest).items() if what == "ignored"}
    for above in ("", "a/"):
        assert all(said[above + name] == "a hidden or system folder" for name in folders)
        assert said[above + "._a_000.JPEG"] == "not an image by its name"


def test_names_that_are_no_utf8(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of Latin-1 beside the images, and a path with it on a terminal of UTF-8."""
    tree = tree.rename(tmp_path / "\udcfftree")
    (tree / "a" / "lisez-moi \udce9.txt").write_text("x")
    (tree / "a" / "\udce9.jpg").symlink_to("nothing")
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    dest = make(tree, tmp_path / "d", "--on-error", "skip")
    said = {name: what for name, (what, _) in report(dest).items()}
    assert said == {"a/lisez-moi \udce9.txt": "ignored", "a/\udce9.jpg": "skipped"}
    assert len(images_of(dest)) == 5
    stdout.flush()
    assert rb"\udcfftree: 5 images of 2 classes" in stdout.buffer.getvalue()  # type: ignore[attr-defined]


def test_an_empty_class_folder(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "aa").mkdir()
    (tree / "aa" / "readme.txt").write_text("x")
    assert "the class folder aa holds no images" in refused(capsys, tree, tmp_path / "d")
    classes = tmp_path / "classes.txt"
    classes.write_text("b\naa\na\n")
    dest = make(tree, tmp_path / "e", "--classes-from", str(classes))
    assert read_manifest(dest).classes == ("b", "aa", "a")
    assert set(labels_of(dest).values()) == {"a", "b"}


def test_images_outside_the_class_folders(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "loose.png").write_bytes(jpeg(50))
    error = refused(capsys, tree, tmp_path / "d")
    assert "loose.png is outside the class folders" in error
    assert "--unlabelled" in error
    dest = make(tree, tmp_path / "u", "--unlabelled")
    manifest = read_manifest(dest)
    assert (manifest.samples, manifest.classes) == (6, ())
    assert set(manifest.index["label"].tolist()) == {-1}
    assert set(manifest.names) >= {"loose.png", "a/a_000.JPEG"}


def test_a_flat_folder_says_that_it_has_no_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_tree(tmp_path / "t", {"x": 3}) / "x"
    make(folder, tmp_path / "d")
    assert "no class folders, so without labels" in capsys.readouterr().out


def test_label_options_that_would_do_nothing(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synsets = tmp_path / "s.txt"
    synsets.write_text("n1\nn2\nn2\n")
    table = tmp_path / "t.csv"
    table.write_text("path\ntree/a/a_000.JPEG\n")
    for source in (tree, table):
        error = refused(capsys, source, tmp_path / "d", "--synsets", synsets)
        assert "--synsets and --devkit do nothing" in error
    for option, value in (("--synsets", synsets), ("--classes-from", synsets)):
        if option == "--classes-from":
            synsets.write_text("a\nb\n")
        assert "--unlabelled takes no" in refused(
            capsys, tree, tmp_path / "d", "--unlabelled", option, value
        )
    assert "--root is for a CSV" in refused(capsys, tree, tmp_path / "d", "--root", tmp_path)
    synsets.write_text("n1\nn2\nn2\n")
    dest = make(tree / "b", tmp_path / "flat", "--synsets", str(synsets))  # here they do something
    assert list(labels_of(dest).values()).count("n2") == 2


def dangling(folder: Path) -> None:
    (folder / "x.jpg").symlink_to("nowhere.jpg")


def self_link(folder: Path) -> None:
    (folder / "x.jpg").symlink_to("x.jpg")


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "x.jpg")


def loop(folder: Path) -> None:
    (folder / "x.jpg").symlink_to("..")


def huge(folder: Path) -> None:
    (folder / "x.jpg").touch()
    os.truncate(folder / "x.jpg", (1 << 30) + 1)  # sparse


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (huge, r"tree/a/x.jpg: is 1073741825 bytes long, the limit is 1073741824"),
        (dangling, r"tree/a/x.jpg: is a link to nothing"),
        (self_link, r"tree/a/x.jpg: is (a link to nothing|unreadable)"),
        (fifo, r"tree/a/x.jpg: is a FIFO, device or socket"),
        (loop, r"tree/a/x.jpg: a loop, this folder is a link to one that holds it"),
    ],
)
def test_what_cannot_be_read_is_named_or_skipped(
    spoil: Callable[[Path], None],
    sentence: str,
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = images_of(make(tree, tmp_path / "before"))
    spoil(tree / "a")
    assert re.search(sentence, refused(capsys, tree, tmp_path / "d"))
    dest = make(tree, tmp_path / "s", "--on-error", "skip")
    assert images_of(dest) == wanted
    ((what, reason),) = report(dest).values()
    assert what == "skipped"
    assert re.search(sentence, reason)
    assert "1 skipped" in capsys.readouterr().out


def test_links_to_files_and_folders_are_followed(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.move(tree / "b", other)
    (tree / "b").symlink_to(other)
    (tree / "a" / "more.jpg").symlink_to(other / "b_000.JPEG")
    dest = make(tree, tmp_path / "d")
    assert labels_of(dest)["more.jpg"] == "a"
    assert read_manifest(dest).samples == 6


def test_a_class_whose_only_image_is_missing_keeps_its_number(tree: Path, tmp_path: Path) -> None:
    (tree / "aa").mkdir()
    dangling(tree / "aa")
    dest = make(tree, tmp_path / "d", "--on-error", "skip")
    assert read_manifest(dest).classes == ("a", "aa", "b")
    assert sorted(set(read_manifest(dest).index["label"].tolist())) == [0, 2]


def test_special_sources(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a regular file nor a folder" in refused(
        capsys, tmp_path / "pipe", tmp_path / "d"
    )
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "shard-000000.tar").write_bytes(bytes(1024))
    assert "shard_tools/index_shards.py" in refused(capsys, tars, tmp_path / "d")
    (tree / "n01440764.tar").write_bytes(bytes(10240))
    assert "holds class tars and beside them" in refused(capsys, tree, tmp_path / "d")


def test_the_option_that_a_refusal_advises_can_be_given_at_once(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "a" / "bad.jpg").write_bytes(b"no image")
    assert main([str(tree), str(tmp_path / "d"), *SMALL, "--quality", "80"]) == 2
    assert "--on-error skip leaves it out" in capsys.readouterr().err
    dest = make(tree, tmp_path / "d", "--on-error", "skip")  # and another quality
    assert read_manifest(dest).samples == 5
    assert list(report(dest)) == ["a/bad.jpg"]


def test_no_image_is_left_out_for_its_suffix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Browsers save JPEGs as .jfif; what is called .heic may be a JPEG, and is refused if not."""
    tree = image_tree(tmp_path / "t", {"a": 4})
    images = sorted((tree / "a").iterdir())
    for path, suffix in zip(images, (".jfif", ".JPE", ".heic", ".avif"), strict=True):
        path.rename(path.with_suffix(suffix))
    assert read_manifest(make(tree, tmp_path / "d")).samples == 4
    (tree / "a" / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    assert main([str(tree), str(tmp_path / "e"), *SMALL]) == 2
    assert "b.heic: a HEIC image; convert it to JPEG or PNG first" in capsys.readouterr().err

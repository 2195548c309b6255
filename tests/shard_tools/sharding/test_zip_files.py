"""Zips as a source: the same shards as from the folder, and nothing left out without a word."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_samples import SMALL, image_tree, jpeg, make, refused, report, tars_of

from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest
from shard_tools.sharding import found

METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflate": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


def zip_of(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def zipped(folder: Path, path: Path, below: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    """A zip of the files of a folder, their names below another."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {below + file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    return zip_of(path, names, method)


def shards(folder: Path) -> dict[str, bytes]:
    """All files but those that name the source."""
    return {k: v for k, v in tars_of(folder).items() if k not in ("manifest.json", "report.jsonl")}


@pytest.mark.parametrize("method", METHODS)
def test_a_zip_gives_the_shards_of_its_folder(method: str, tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", {"n1": 4, "n2": 3, "ä b": 2})
    archive = zipped(tree, tmp_path / "train.zip", method=METHODS[method])
    assert shards(make(archive, tmp_path / "z")) == shards(make(tree, tmp_path / "f"))
    assert report(tmp_path / "z") == {}
    assert not (tmp_path / "z" / ".parts").exists()


def test_one_wrapping_folder_is_no_class_and_other_files_are_reported(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", {"n1": 4, "n2": 3})
    (tree / "readme.txt").write_text("x" * 1000)
    archive = zipped(tree, tmp_path / "train.zip", below="images/")
    with zipfile.ZipFile(archive, "a") as more:  # the folders too, as `zip -r` writes them
        for folder in ("images/", "images/n1/", "images/n2/"):
            more.writestr(folder, b"")
    assert read_manifest(make(archive, tmp_path / "z")).classes == ("n1", "n2")
    assert report(tmp_path / "z") == {"images/readme.txt": ("ignored", "not an image by its name")}


def test_names_as_windows_writes_them(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "w.zip", {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    data = archive.read_bytes()
    archive.write_bytes(data.replace(b"a/1.jpg", rb"a\1.jpg").replace(b"b/2.jpg", rb"b\2.jpg"))
    assert read_manifest(make(archive, tmp_path / "z")).classes == ("a", "b")


def other_encoding(path: Path, names: list[str], encoding: str, told: str = "") -> Path:
    """A zip as programs of Windows write it, perhaps with the names in UTF-8 beside ("extra"), or
    those of other names ("stale")."""

    class Info(zipfile.ZipInfo):
        def _encodeFilenameFlags(self) -> tuple[bytes, int]:
            return self.filename.encode(encoding), 0

    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            info, raw = Info(name), name.encode(encoding)
            if told:
                crc = zlib.crc32(raw if told == "extra" else b"before")
                field = struct.pack("<BL", 1, crc) + name.encode()
                info.extra = struct.pack("<HHHHH", 0xCAFE, 2, 0, 0x7075, len(field)) + field
            archive.writestr(info, jpeg(number))
    return path


def test_names_of_other_encodings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def classes(encoding: str, names: list[str], told: str = "") -> tuple[str, ...]:
        dest = tmp_path / f"{encoding}{told}{len(names)}"
        archive = other_encoding(tmp_path / f"{dest.name}.zip", names, encoding, told)
        return read_manifest(make(archive, dest)).classes

    animals = ["猫/1.jpg", "狗/2.jpg"]
    assert classes("gbk", animals, "extra") == ("狗", "猫")
    assert classes("utf-8", animals) == ("狗", "猫")
    assert "the encoding of" not in capsys.readouterr().out
    raw = tuple(sorted(name[0].encode("gbk").decode("cp437") for name in animals))
    for told in ("", "stale"):
        assert classes("gbk", animals, told) == raw
        assert "the encoding of 2 names, such as ├¿/1.jpg, and" in capsys.readouterr().out
    assert classes("shift_jis", ["ソ/1.jpg", "犬/2.jpg", "犬/3.jpg"]) == ("â\\", "îó")


def test_links_are_followed_and_those_to_nothing_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def linked(path: Path, target: str) -> Path:
        zip_of(path, {"a/1.jpg": jpeg(1)})
        link = zipfile.ZipInfo("b/2.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(link, target)
        return path

    dest = make(linked(tmp_path / "l.zip", "../a/1.jpg"), tmp_path / "z")
    assert read_manifest(dest).samples == 2
    error = refused(capsys, linked(tmp_path / "m.zip", "../a/3.jpg"), tmp_path / "d")
    assert "b/2.jpg" in error
    assert "a/3.jpg" in error


def test_a_damaged_image_is_named_and_can_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {f"{'ab'[i % 2]}/{i}.jpg": jpeg(i) for i in range(4)}
    archive = zip_of(tmp_path / "t.zip", images)
    data = bytearray(archive.read_bytes())
    data[data.index(images["a/2.jpg"]) + 100] ^= 1
    archive.write_bytes(data)
    error = refused(capsys, archive, tmp_path / "d")
    assert "t.zip: member 'a/2.jpg' is damaged (Bad CRC-32" in error
    dest = make(archive, tmp_path / "s", "--on-error", "skip")
    assert "t.zip: member 'a/2.jpg' is damaged (Bad CRC-32" in capsys.readouterr().out
    assert read_manifest(dest).samples == 3
    assert report(dest) == {"a/2.jpg": ("skipped", "the file is empty")}


def cut(data: bytes) -> bytes:
    return data[:-30]


def encrypted(data: bytes) -> bytes:
    at = data.index(b"PK\x01\x02") + 8
    return data[:at] + struct.pack("<H", 1) + data[at + 2 :]


def deflate64(data: bytes) -> bytes:
    at = data.index(b"PK\x01\x02") + 10
    return data[:at] + struct.pack("<H", 9) + data[at + 2 :]


def longer(data: bytes) -> bytes:
    """A member that says that it is longer than its bytes."""
    at = data.index(b"PK\x01\x02") + 24
    (size,) = struct.unpack_from("<I", data, at)
    return data[:at] + struct.pack("<I", size + 1000) + data[at + 4 :]


def other_checksum(data: bytes) -> bytes:
    at = data.index(b"PK\x01\x02") + 16
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, "t.zip: damaged or cut zip (File is not a zip file)"),
        (encrypted, "t.zip: a/0.jpg is encrypted; unpack it with its password"),
        (deflate64, "a/0.jpg is packed in a way that Python does not read"),
        (longer, "member 'a/0.jpg' is damaged ("),
        (other_checksum, "member 'a/0.jpg' is damaged (Bad CRC-32"),
    ],
)
def test_what_is_not_read_is_said(
    damage: Callable[[bytes], bytes],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = zip_of(tmp_path / "t.zip", {f"a/{i}.jpg": jpeg(i, (96, 72)) for i in range(3)}, 8)
    archive.write_bytes(damage(archive.read_bytes()))
    assert sentence in refused(capsys, archive, tmp_path / "d")
    assert not list((tmp_path / "d").rglob("*.tar"))


def test_an_image_that_says_it_is_huge_is_not_inflated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_tools.sharding.zip_files.LONGEST_IMAGE", 1 << 20)
    archive = zip_of(tmp_path / "t.zip", {"a/0.jpg": bytes(2 << 20)}, zipfile.ZIP_DEFLATED)
    assert f"'a/0.jpg': is {2 << 20} bytes long, the limit" in refused(
        capsys, archive, tmp_path / "d"
    )
    assert found.LONGEST_IMAGE == 1 << 30


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"n1.tar": "x"}, "t.zip: holds the tar n1.tar; unpack the zip and give the folder"),
        ({"n1.tar.gz": "x"}, "n1.tar.gz is compressed inside the archive; unpack it"),
        ({"a/1.jpg": "", "b.zip": "x"}, "b.zip: is an archive inside an archive; unpack it"),
        ({"train/1.jpg": "", "val/2.jpg": ""}, "the training set has no class folders or labels"),
        ({"1.jpg": "", "metadata.csv": "x"}, "holds metadata.csv, which is not read in an archive"),
        ({"readme.txt": "x"}, "t.zip: holds no images"),
    ],
)
def test_zips_that_hold_something_else(
    members: dict[str, str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {name: data.encode() or jpeg(i) for i, (name, data) in enumerate(members.items())}
    archive = zip_of(tmp_path / "t.zip", content)
    assert sentence in refused(capsys, archive, tmp_path / "d")


def test_a_zip_of_each_class(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", {"n00000001": 3, "n00000002": 3})
    for folder in tree.iterdir():
        zipped(folder, tmp_path / "zips" / f"{folder.name}.zip")
    assert shards(make(tmp_path / "zips", tmp_path / "z")) == shards(make(tree, tmp_path / "f"))


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Train", "validation")])
def test_training_and_validation_set_in_a_zip_each(
    train: str, val: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees = {
        "train": image_tree(tmp_path / "tree" / "train", {"a": 4, "b": 4}),
        "val": image_tree(tmp_path / "tree" / "val", {"a": 1, "b": 2}),
    }
    zipped(trees["train"], tmp_path / "zips" / f"{train}.zip")
    zipped(trees["val"], tmp_path / "zips" / f"{val}.zip")
    for source, dest in (("tree", "f"), ("zips", "z")):
        assert main([str(tmp_path / source), str(tmp_path / dest), *SMALL]) == 0
    for split in ("train", "val"):
        assert shards(tmp_path / "z" / split) == shards(tmp_path / "f" / split)
    zipped(trees["train"], tmp_path / "zips" / "training.zip")
    error = refused(capsys, tmp_path / "zips", tmp_path / "d")
    assert f"holds {train}.zip and training.zip; give a folder with one of them" in error


def test_tasks_of_an_array_need_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zip_of(tmp_path / "t.zip", {"a/1.jpg": jpeg(1)})
    error = refused(capsys, archive, tmp_path / "d", "--num-tasks", "2", "--task-id", "0")
    assert "t.zip: is a zip and must be unpacked first" in error


def test_names_in_utf8_that_no_flag_announces(tmp_path: Path) -> None:
    """As `zip -r` on Linux and the Finder of macOS write them."""
    archive = zip_of(tmp_path / "m.zip", {"Kaese/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    archive.write_bytes(archive.read_bytes().replace(b"Kaese", "Käse".encode()))
    assert read_manifest(make(archive, tmp_path / "u")).classes == ("Käse", "b")
    archive.write_bytes(archive.read_bytes().replace("Käse".encode(), "Käsch".encode("cp437")))
    assert read_manifest(make(archive, tmp_path / "d")).classes == ("Käsch", "b")
    zip_of(archive, {"├ñ/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})  # with the flag; in cp437 it is "ä"
    assert read_manifest(make(archive, tmp_path / "f")).classes == ("b", "├ñ")


def test_a_zip_behind_a_program_is_read_and_what_is_none_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zip_of(tmp_path / "t.zip", {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    archive.write_bytes(b"#!/bin/sh\n" + archive.read_bytes())
    assert read_manifest(make(archive, tmp_path / "p")).samples == 2
    zip_of(archive, {})
    assert "t.zip: holds no images" in refused(capsys, archive, tmp_path / "d")
    for content in (b"", b"<!DOCTYPE html><title>Sign in</title>"):
        archive.write_bytes(content)
        error = refused(capsys, archive, tmp_path / "e")
        assert "t.zip: damaged or cut zip (File is not a zip file)" in error

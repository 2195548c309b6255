"""Tars as a source: what is damaged, linked, doubled or packed inside them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from shard_samples import SMALL, flipped, images_of, jpeg, make, refused, report, tar_of, tars_of

from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest
from shard_tools.sharding.archives import list_archive, plain_tar
from shard_tools.verify_shards import main as verify

CLASSES = ("n00000001", "n00000002", "n00000003")


def nested(path: Path) -> tuple[Path, dict[str, bytes]]:
    """ILSVRC2012_img_train.tar of 3 classes and 4 images each, and its images."""
    inner, images = {}, {}
    for number, name in enumerate(CLASSES):
        files = {f"{name}_{i}.JPEG": jpeg(10 * number + i) for i in range(4)}
        inner[f"{name}.tar"] = tar_of(path.with_suffix(".part"), files).read_bytes()
        images |= files
    path.with_suffix(".part").unlink()
    return tar_of(path, inner), images


def test_a_damaged_outer_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, _images = nested(tmp_path / "train.tar")
    data = archive.read_bytes()
    second = data.index(b"n00000002.tar")
    archive.write_bytes(flipped(data, 8 * (second + 3)))
    error = refused(capsys, archive, tmp_path / "d")
    assert f"train.tar: damaged at byte {second}" in error
    dest = make(archive, tmp_path / "s", "--on-error", "skip")
    assert read_manifest(dest).samples == 4
    assert report(dest)["train.tar"][0] == "skipped"
    assert f"damaged at byte {second}" in report(dest)["train.tar"][1]
    assert verify([str(dest), "--workers", "1"]) == 0


def test_a_bad_image_is_named_with_its_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tar_of(tmp_path / "train.tar", {"cat/1.jpg": jpeg(1), "dog/1.jpg": b"no image"})
    assert main([str(archive), str(tmp_path / "d"), *SMALL]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {archive}, dog/1.jpg: not an image")


def test_a_damaged_inner_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, images = nested(tmp_path / "train.tar")
    data = archive.read_bytes()
    third = data.index(b"n00000002_2.JPEG")
    archive.write_bytes(flipped(data, 8 * third))
    error = refused(capsys, archive, tmp_path / "d")
    assert f"train.tar: damaged at byte {third}" in error
    assert "in n00000002.tar" in error
    dest = make(archive, tmp_path / "s", "--on-error", "skip")
    assert images_of(dest) == {
        name: image
        for name, image in images.items()
        if name not in ("n00000002_2.JPEG", "n00000002_3.JPEG")
    }
    assert list(report(dest)) == ["n00000002/n00000002.tar"]
    assert read_manifest(dest).classes == CLASSES


def test_a_class_tar_of_which_nothing_is_left_keeps_its_class(tmp_path: Path) -> None:
    archive, _ = nested(tmp_path / "train.tar")
    data = archive.read_bytes()
    archive.write_bytes(flipped(data, 8 * data.index(b"n00000001_0.JPEG")))
    dest = make(archive, tmp_path / "d", "--on-error", "skip")
    assert read_manifest(dest).classes == CLASSES
    assert sorted(set(read_manifest(dest).index["label"].tolist())) == [1, 2]


@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_no_damage_to_the_archive_loses_an_image_without_a_word(kind: str, tmp_path: Path) -> None:
    archive, images = nested(tmp_path / "train.tar")
    data = archive.read_bytes()
    # Headers and the places around them; what damage does to pixels is tested with the images.
    places = sorted({o + s for o in range(0, len(data), 512) for s in (0, 100, 124, 150, 156, 511)})
    quiet = 0
    for place in places[::3]:
        content = data[:place] if kind == "cut" else flipped(data, 8 * place + place % 8)
        archive.write_bytes(content)
        found = list_archive(archive, tmp_path / "u", skip=True)
        names = {image.name.rpartition("/")[2] for image in found.images}
        sizes = {len(images[name]) for name in names & images.keys()}
        assert {image.size for image in found.images} == sizes
        if not found.missing:
            assert names == images.keys()
            quiet += 1
    assert quiet > 0


def test_links_in_a_tar_are_the_images_they_point_to(tmp_path: Path) -> None:
    top = tmp_path / "t"
    for name in CLASSES[:2]:
        (top / name).mkdir(parents=True)
    (top / CLASSES[0] / "a.jpg").write_bytes(jpeg(1))
    (top / CLASSES[1] / "hard.jpg").hardlink_to(top / CLASSES[0] / "a.jpg")
    (top / CLASSES[1] / "soft.jpg").symlink_to(f"../{CLASSES[0]}/a.jpg")
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", top, "."], check=True)
    wanted = {name: jpeg(1) for name in ("a.jpg", "hard.jpg", "soft.jpg")}
    dest = make(tmp_path / "a.tar", tmp_path / "d")
    assert images_of(dest) == wanted
    assert (
        tars_of(dest)["shard-000000.tar"] == tars_of(make(top, tmp_path / "e"))["shard-000000.tar"]
    )


def test_members_that_hold_no_bytes_are_named_or_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, images = tmp_path / "a.tar", {f"c/{i}.jpg": jpeg(i) for i in range(2)}
    tar_of(archive, images | {"d/x.jpg": jpeg(5)})
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("d/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../gone.jpg"
        tar.addfile(link)
    error = refused(capsys, archive, tmp_path / "d")
    assert "member 'd/link.jpg' is a link to 'gone.jpg', which is not in the archive" in error
    dest = make(archive, tmp_path / "s", "--on-error", "skip")
    assert report(dest)["d/link.jpg"][0] == "skipped"
    assert read_manifest(dest).samples == 3


def test_a_huge_image_is_named_or_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tar_of(tmp_path / "a.tar", {"c/0.jpg": jpeg(0)})
    size = (1 << 30) + 1
    with open(archive, "r+b") as file:
        file.seek(512 + -(-len(jpeg(0)) // 512) * 512)
        huge = tarfile.TarInfo("c/huge.jpg")
        huge.size = size
        file.write(huge.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(file.tell() + size + 511 + 1024)  # sparse
    error = refused(capsys, archive, tmp_path / "d")
    assert f"member 'c/huge.jpg': is {size} bytes long, the limit is {1 << 30}" in error
    dest = make(archive, tmp_path / "s", "--on-error", "skip")
    assert report(dest)["c/huge.jpg"][0] == "skipped"
    assert read_manifest(dest).samples == 1


def test_of_two_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar", {"c/0.jpg": jpeg(1), "d/0.jpg": jpeg(2)})
    with tarfile.open(archive, "a") as tar:
        info = tarfile.TarInfo("./c/0.jpg")
        info.size = len(jpeg(3))
        tar.addfile(info, io.BytesIO(jpeg(3)))
    found = list_archive(archive, tmp_path, skip=False)
    assert [(image.name, image.size) for image in found.images] == [
        ("c/0.jpg", len(jpeg(3))),
        ("d/0.jpg", len(jpeg(2))),
    ]
    assert found.ignored == [("c/0.jpg", "a later member of the archive has the same name")]


def test_junk_in_class_tars_is_ignored_and_listed(tmp_path: Path) -> None:
    files = {"a.JPEG": jpeg(1), "._a.JPEG": b"x", "notes.txt": b"x", "@eaDir/b.jpg": b"x"}
    inner = tar_of(tmp_path / "i.tar", files).read_bytes()
    archive = tar_of(tmp_path / "o.tar", {f"{CLASSES[0]}.tar": inner, "readme": b"x"})
    dest = make(archive, tmp_path / "d")
    assert list(images_of(dest)) == ["a.JPEG"]
    assert set(report(dest)) == {"readme", *(f"{CLASSES[0]}/{name}" for name in list(files)[1:])}


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"n1.tar": "tar", "x.jpg": "image"}, "holds class tars and also loose images"),
        ({"n1.tar.gz": "tar"}, "n1.tar.gz is compressed inside the archive; unpack it"),
        ({"a/x.jpg": "image", "more.zip": "image"}, "more.zip: is an archive inside an archive"),
        ({"a/x.jpg": "image", "x.jpg": "image"}, "x.jpg is outside the class folders"),
        ({"x/n1.tar": "tar", "y/n1.tar": "tar"}, "2 images named n1/"),
        ({"0.cls": "label", "0.jpg": "image"}, "index_shards.py, or take the images only with"),
        ({"a/0.CLS": "label", "a/0.jpg": "image", "b/1.jpg": "image"}, "not read here (a/0.CLS)"),
    ],
)
def test_archives_that_say_two_things(
    members: dict[str, str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tar_of(tmp_path / "i", {"a.jpg": jpeg(1)}).read_bytes()
    content = {name: inner if kind == "tar" else jpeg(2) for name, kind in members.items()}
    archive = tar_of(tmp_path / "o.tar", content)
    assert sentence in refused(capsys, archive, tmp_path / "d")


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", PACK)
def test_compressed_archives(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, _images = nested(tmp_path / "train.tar")
    wanted = tars_of(make(archive, tmp_path / "w"))["shard-000000.tar"]
    packed = tmp_path / f"train.tar.{kind}"
    data = PACK[kind](archive.read_bytes())
    packed.write_bytes(data)
    dest = make(packed, tmp_path / "d")
    assert tars_of(dest)["shard-000000.tar"] == wanted
    assert not (dest / ".parts").exists()
    for number, bad in enumerate((data[: len(data) // 2], flipped(data, 4 * len(data)), data[:7])):
        packed.write_bytes(bad)
        assert f"train.tar.{kind}: damaged" in refused(capsys, packed, tmp_path / f"b{number}")
        assert not list(tmp_path.glob(f"b{number}/**/*.tmp"))


def test_a_damaged_archive_is_unpacked_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, _ = nested(tmp_path / "train.tar")
    (tmp_path / "train.tar.gz").write_bytes(gzip.compress(archive.read_bytes())[:-100])
    assert main([str(tmp_path / "train.tar.gz"), str(tmp_path / "d"), *SMALL]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("unpacking it into") == 1
    assert "train.tar.gz: damaged or cut gzip stream" in captured.err


def test_an_interrupted_job_unpacks_once(tmp_path: Path) -> None:
    archive, _ = nested(tmp_path / "train.tar")
    packed = tmp_path / "train.tar.gz"
    packed.write_bytes(gzip.compress(archive.read_bytes()))
    unpacked = tmp_path / "d" / ".parts" / "unpacked"
    first = list_archive(packed, unpacked, skip=False)
    (plain,) = unpacked.iterdir()
    before = plain.stat().st_mtime_ns
    assert list_archive(packed, unpacked, skip=False) == first
    assert plain.stat().st_mtime_ns == before


def test_an_unpacked_archive_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut zeros under that name would pass for an archive without images."""
    archive, _ = nested(tmp_path / "train.tar")
    packed = tmp_path / "train.tar.gz"
    packed.write_bytes(gzip.compress(archive.read_bytes()))
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (synced.append(-1), rename(a, b)))
    list_archive(packed, tmp_path / "unpacked", skip=False)
    assert synced == [archive.stat().st_size, -1]


@pytest.mark.parametrize("cause", ["disk", "program", "tasks"])
def test_an_archive_that_cannot_be_unpacked_is_not_skipped(
    cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--on-error skip leaves out what is damaged, not what a full disk, say, has no room for."""
    source, dest = tmp_path / "in", tmp_path / "d"
    source.mkdir()
    tar_of(source / f"{CLASSES[0]}.tar", {"a.jpg": jpeg(1)})
    other = tar_of(tmp_path / "other.tar", {"b.jpg": jpeg(2)}).read_bytes()
    if cause == "program":
        (source / f"{CLASSES[1]}.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + other)
        monkeypatch.setattr("shutil.which", lambda _: None)
        monkeypatch.setitem(sys.modules, "compression", None)
    else:
        (source / f"{CLASSES[1]}.tar.gz").write_bytes(gzip.compress(other))
    if cause == "disk":
        (dest / ".parts").mkdir(parents=True)
        (dest / ".parts" / "unpacked").write_bytes(b"no folder")
    options = ["--num-tasks", "2"] if cause == "tasks" else []
    error = refused(capsys, source, dest, "--on-error", "skip", *options)
    expected = {
        "disk": "cannot be written (File",
        "program": "install zstd",
        "tasks": "must be unpacked first",
    }
    assert expected[cause] in error
    assert not list(dest.glob("*.tar"))


def test_tasks_do_not_each_unpack_an_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, _ = nested(tmp_path / "train.tar")
    (tmp_path / "train.tar.gz").write_bytes(gzip.compress(archive.read_bytes()))
    error = refused(capsys, tmp_path / "train.tar.gz", tmp_path / "d", "--num-tasks", "2")
    assert "is compressed and must be unpacked first; shard_tools/make_shards.py, without" in error


def test_what_killed_calls_had_unpacked_is_removed_and_that_of_others_is_not(
    tmp_path: Path,
) -> None:
    archive = tar_of(tmp_path / "t.tar", {"a/1.jpg": jpeg(1)})
    archive.write_bytes(gzip.compress(archive.read_bytes()))
    target = plain_tar(archive, tmp_path / "u")
    target.unlink()
    killed, alive = (target.with_name(f".{target.name}.node.{i}.tmp") for i in (1, 2))
    killed.write_bytes(b"x")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{hold}; print(1, flush=True); sys.stdin.read()", str(alive)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        assert plain_tar(archive, tmp_path / "u") == target
        other.communicate()
    assert sorted((tmp_path / "u").iterdir()) == sorted([alive, target])


def test_class_tars_under_short_suffixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = [tar_of(tmp_path / "i.tar", {f"{i}.jpg": jpeg(i)}).read_bytes() for i in range(2)]
    packed = lzma.compress(inner[1])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"{CLASSES[0]}.tar").write_bytes(inner[0])
    (tmp_path / "in" / f"{CLASSES[1]}.txz").write_bytes(packed)
    assert read_manifest(make(tmp_path / "in", tmp_path / "o")).classes == CLASSES[:2]
    members = {f"{CLASSES[0]}.tar": inner[0], f"{CLASSES[1]}.txz": packed}
    error = refused(capsys, tar_of(tmp_path / "t.tar", members), tmp_path / "d")
    assert f"{CLASSES[1]}.txz is compressed inside the archive; unpack it" in error


def test_a_compressed_archive_in_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"b\xff")
    folder.mkdir()
    archive = tar_of(folder / "t.tar", {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    archive.write_bytes(gzip.compress(archive.read_bytes()))
    assert read_manifest(make(archive, tmp_path / "o")).samples == 2

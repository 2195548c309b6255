from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_samples import flipped, image_tree, jpeg

from shard_tools.make_shards import main as make_shards
from shard_tools.manifest import Manifest, Shard, read_manifest, write_manifest
from shard_tools.verify_shards import main, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    tree = image_tree(folder / "tree", {"a": 6, "b": 6})
    arguments = [str(tree), str(folder / "shards"), "--shard-size", "24KiB", "--workers", "1"]
    assert make_shards(arguments) == 0
    return folder / "shards"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def faults(folder: Path, *, decode: bool = False) -> list[str]:
    return verify(str(folder), decode=decode, workers=1)[0]


def rewrite(folder: Path, **changes: object) -> None:
    """The manifest again, in order, over tars that were changed on purpose: checksums fit."""
    manifest = read_manifest(folder, check_shards=False)
    shards = []
    for shard in changes.pop("shards", manifest.shards):
        data = (folder / shard.name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        shards.append(replace(shard, bytes=len(data), sha256=digest))
    values = {"index": manifest.index, "classes": manifest.classes, "names": manifest.names}
    write_manifest(folder, shards=shards, made=manifest.made, **(values | changes))


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive]


def write_tar(path: Path, content: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o444
            archive.addfile(info, io.BytesIO(data))


def test_sound_shards_have_no_faults(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(str(whole), decode=True, workers=1) == ([], [])
    assert main([str(whole), "--decode", "--workers", "2"]) == 0
    assert capsys.readouterr().out.strip().endswith("sound")


def test_every_flipped_bit_of_a_tar_is_found(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    draw = np.random.default_rng(0)
    for bit in draw.integers(0, 8 * len(data), 60).tolist():
        path.write_bytes(flipped(data, bit))
        assert any("shard-000001.tar: its sha256" in fault for fault in faults(folder)), bit


def test_a_tar_cut_at_any_byte_is_found(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    for size in [0, 1, 511, 512, 513, *range(600, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:size])
        assert any(f"{size} bytes long" in fault for fault in faults(folder)), size


def test_a_cut_tar_is_found_by_its_structure_alone(folder: Path) -> None:
    """Also where somebody wrote size and checksum of the cut file into the manifest."""
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    manifest = read_manifest(folder)
    last = manifest.index[int(manifest.starts[2]) - 1]
    end = int(last["offset"] + last["length"])  # or the manifest itself refuses the size
    with tarfile.open(path) as archive:
        final = archive.getmembers()[-1]
    closed = final.offset_data + 512 + 1024  # members and both end blocks
    for size in range(end, closed, 173):
        path.write_bytes(data[:size])
        rewrite(folder)
        assert any("shard-000001.tar: " in fault for fault in faults(folder)), size
        path.write_bytes(data)


def change_tar(folder: Path, change: object) -> None:
    path = folder / "shard-000001.tar"
    content = members(path)
    write_tar(path, change(content))
    rewrite(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: [*m[:6], *m[:3]], "its key is used twice in this tar"),
        (lambda m: [*m, *m[:3]], "its key is used twice in this tar"),
        (lambda m: [*m, *m[1::-1]], "its key is used twice in this tar"),
        (lambda m: [m[0], *m[3:], *m[1:3]], "its fields are not adjacent in the tar"),
        (lambda m: [*m, ("more.jpg", b"")], "holds 4 samples, the index lists 3"),
        (lambda m: [*m, ("README", b"")], "member 'README': belongs to no sample by its name"),
        (lambda m: m[:-3], "holds 2 samples, the index lists 3"),
        (lambda m: [(m[0][0], b"7"), *m[1:]], "cls is 7, the index says"),
        (lambda m: [(m[0][0], b"?"), *m[1:]], "cls is '.', not a class index"),
        (lambda m: [*m[:2], (m[2][0], b'{"name": "else"}'), *m[3:]], "its json says 'else'"),
        (lambda m: [m[0], (m[1][0], jpeg(99, (30, 30))), *m[2:]], "image "),
        (lambda m: [m[0], (m[1][0], bytes(len(m[1][1]))), *m[2:]], "cannot be decoded"),
        (lambda m: [m[0], m[1], m[1], *m[2:]], "has field 'jpg' twice"),
        (lambda m: [("x" + m[0][0], m[0][1]), *m[1:]], "has no cls"),
    ],
)
def test_a_tar_that_says_something_else_is_found(
    folder: Path, change: object, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tar(folder, change)
    found = faults(folder)
    assert any(re.search(sentence, fault) for fault in found), found
    assert all(fault.startswith("shard-000001.tar: ") for fault in found)
    assert main([str(folder), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("fault: ")] == [f"fault: {f}" for f in found]
    assert lines[-1].endswith(": 1 fault" if len(found) == 1 else f": {len(found)} faults")


def test_a_key_is_unique_within_its_shard_only(folder: Path) -> None:
    (first, *_), path = members(folder / "shard-000000.tar"), folder / "shard-000001.tar"
    key = first[0].split(".")[0]
    old = members(path)[0][0].split(".")[0]
    write_tar(path, [(name.replace(old, key), data) for name, data in members(path)])
    rewrite(folder)
    assert faults(folder) == []


def test_missing_and_extra_shards_are_all_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "shard-000000.tar", folder / "copy.tar")
    (folder / "shard-000001.tar").unlink()
    (folder / "shard-000002.tar").unlink()
    assert main([str(folder), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    for fault in (
        "copy.tar: this tar is not in the manifest",
        "shard-000001.tar: the shard is missing",
        "shard-000002.tar: the shard is missing",
    ):
        assert f"fault: {fault}\n" in out


def test_damaged_index_and_names_are_faults_beside_others(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()
    for name in ("names.bin", "index.bin"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        found = faults(folder)
        assert any(name in fault for fault in found)
        assert any("shard-000001.tar: the shard is missing" in fault for fault in found)


def test_the_index_is_held_against_the_tar(folder: Path) -> None:
    manifest = read_manifest(folder)
    for field, sentence in (
        ("offset", "no image begins at byte"),
        ("length", "the index says"),
        ("width", "image is jpeg of "),
        ("orientation", "image is jpeg"),
        ("format", "image is jpeg"),
    ):
        index = manifest.index.copy()
        index[field][4] += 1
        rewrite(folder, index=index)
        found = faults(folder)
        assert len(found) == 1
        assert sentence in found[0]


def test_decode_finds_what_the_checksums_cannot(folder: Path) -> None:
    """An image that was broken before it was sharded."""

    def corrupt(content: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        name, data = content[1]
        table = data.index(b"\xff\xc4") + 5  # the lengths of a Huffman table's codes
        data = data[:table] + b"\xff" * 16 + data[table + 16 :]
        return [content[0], (name, data), *content[2:]]

    change_tar(folder, corrupt)
    assert faults(folder) == []
    assert any("cannot be decoded" in fault for fault in faults(folder, decode=True))


def test_traces_of_a_killed_job_are_named(folder: Path) -> None:
    (folder / ".parts").mkdir()
    (folder / ".shard-000000.tar.host.1.tmp").write_bytes(b"x")
    assert len(faults(folder)) == 2


def test_what_cannot_be_verified_is_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    manifest: Manifest = read_manifest(folder)
    write_manifest(
        tmp_path / "remote",
        shards=[Shard(s.name, s.samples, s.bytes, s.sha256) for s in manifest.shards],
        index=manifest.index,
        classes=manifest.classes,
        shard_folder="s3://bucket/shards",
    )
    assert main([str(tmp_path / "remote")]) == 2
    assert "only local shards can be verified" in capsys.readouterr().err

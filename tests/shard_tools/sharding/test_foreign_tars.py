"""webdataset and we read the same samples out of what every writer of tars makes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_samples import encode, jpeg, picture, tar_of

from pipeline.errors import UserError
from shard_tools.index_shards import main
from shard_tools.manifest import read_manifest
from shard_tools.sharding.adopt import IndexJob, Settings, adopt, same_labels
from shard_tools.tar import read_samples
from shard_tools.verify_shards import verify

Members = dict[str, bytes]


def tree_of(members: Members, folder: Path) -> Path:
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def by_gnu_tar(*options: str) -> Callable[[Path, Members], None]:
    def write(path: Path, members: Members) -> None:
        tree = tree_of(members, path.with_suffix(".tree"))
        subprocess.run(["tar", *options, "--sort=name", "-C", tree, "-cf", path, "."], check=True)

    return write


def by_bsdtar(kind: str) -> Callable[[Path, Members], None]:
    def write(path: Path, members: Members) -> None:
        tree = tree_of(members, path.with_suffix(".tree"))
        subprocess.run(
            ["bsdtar", f"--format={kind}", "-C", tree, "-cf", path, *sorted(members)], check=True
        )

    return write


def by_tarfile(kind: int) -> Callable[[Path, Members], None]:
    def write(path: Path, members: Members) -> None:
        with tarfile.open(path, "w", format=kind) as archive:
            for name, data in sorted(members.items()):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 1.5
                archive.addfile(info, io.BytesIO(data))

    return write


def samples_of(members: Members) -> dict[str, Members]:
    """Key → field → bytes of names without anything unusual."""
    found: dict[str, Members] = {}
    for name in sorted(members):
        folder, base = os.path.split(name)
        key, field = base.split(".", 1)
        found.setdefault(os.path.join(folder, key), {})[field] = members[name]
    return found


def by_tar_writer(**options: object) -> Callable[[Path, Members], None]:
    def write(path: Path, members: Members) -> None:
        with webdataset.TarWriter(str(path), encoder=False, **options) as sink:
            for key, fields in samples_of(members).items():
                sink.write({"__key__": key, **fields})

    return write


def by_shard_writer(path: Path, members: Members) -> None:
    with webdataset.ShardWriter(f"{path}-%d", encoder=False, verbose=0) as sink:
        for key, fields in samples_of(members).items():
            sink.write({"__key__": key, **fields})
    Path(f"{path}-0").rename(path)


needs_bsdtar = pytest.mark.skipif(shutil.which("bsdtar") is None, reason="bsdtar is not there")
WRITERS = {
    **{
        f"gnu-tar-{kind}": by_gnu_tar(f"--format={kind}")
        for kind in ("gnu", "oldgnu", "pax", "ustar", "v7")
    },
    "gnu-tar-blocks": by_gnu_tar("--blocking-factor=1"),
    "gnu-tar-large-owner": by_gnu_tar("--format=gnu", "--owner=x:99999999", "--mtime=@-5"),
    "gnu-tar-pax-owner": by_gnu_tar("--format=pax", "--owner=x:99999999", "--mtime=@5.25"),
    "gnu-tar-label": by_gnu_tar("--format=gnu", "--label=volume"),
    "gnu-tar-pax-label": by_gnu_tar("--format=pax", "--label=volume"),
    "tarfile-ustar": by_tarfile(tarfile.USTAR_FORMAT),
    "tarfile-gnu": by_tarfile(tarfile.GNU_FORMAT),
    "tarfile-pax": by_tarfile(tarfile.PAX_FORMAT),
    "tar-writer": by_tar_writer(),
    "tar-writer-pax": by_tar_writer(format="PAX_FORMAT"),
    "tar-writer-gnu": by_tar_writer(format="GNU_FORMAT"),
    "tar-writer-mtime": by_tar_writer(mtime=1.5, user="x", group="y", mode=0o600),
    "shard-writer": by_shard_writer,
    **{
        f"bsdtar-{kind}": pytest.param(by_bsdtar(kind), marks=needs_bsdtar)
        for kind in ("ustar", "pax", "gnutar", "v7")
    },
}
SHORT_NAMES_ONLY = ("ustar", "v7")


def members_of(writer: str) -> Members:
    """Plain samples, folders with dots, fields in capitals and with dots, no bytes, whole blocks,
    a long name and one in Greek where the format has room."""
    members = {
        "a.cls": b"3", "a.jpg": jpeg(1), "a.json": b"{}",
        "b.JPG": jpeg(2), "b.cls": b"4\n", "b.seg.png": encode(picture(3), "PNG"),
        "dir.x/c.cls": b"0", "dir.x/c.jpg": jpeg(3), "dir.x/c.txt": b"",
        "dir.x/d.cls": b"1", "dir.x/d.jpeg": jpeg(4).ljust(4096, b"\0"), "dir.x/d.txt": b"x" * 512,
        "e/f/g.cls": b"2", "e/f/g.png": encode(picture(5), "PNG"),
    }  # fmt: skip
    if not writer.endswith(SHORT_NAMES_ONLY):
        for name in ("long/" + "k" * 180, "Ψηφίο"):
            members |= {f"{name}.cls": b"2", f"{name}.jpg": jpeg(6)}
    return members


def theirs_of(path: Path) -> list[tuple[str, Members]]:
    """Key and fields of every sample, as webdataset reads them."""
    return [
        (s["__key__"], {n: d for n, d in s.items() if not n.startswith("__")})
        for s in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]


def ours_of(path: Path) -> list[tuple[str, Members]]:
    data = path.read_bytes()
    found = []
    for sample in read_samples(path).samples:
        assert sample.problem == ""
        fields = {n: data[at : at + size] for n, (at, size) in sample.fields.items()}
        found.append((sample.key, fields))
    return found


@pytest.mark.parametrize(
    ("name", "write"),
    [
        pytest.param(name, *getattr(w, "values", (w,)), marks=getattr(w, "marks", ()), id=name)
        for name, w in WRITERS.items()
    ],
)
def test_the_same_samples_as_webdataset(
    name: str, write: Callable[[Path, Members], None], tmp_path: Path
) -> None:
    members = members_of(name)
    path = tmp_path / "x.tar"
    write(path, members)
    theirs = theirs_of(path)
    assert ours_of(path) == theirs
    expected = {
        key: {field.lower(): data for field, data in fields.items()}
        for key, fields in samples_of(members).items()
    }
    assert {os.path.normpath(key): fields for key, fields in theirs} == expected
    options = ["--output", str(tmp_path / "index"), "--workers", "0"]
    assert main([str(path), *options]) == 0
    check_index(tmp_path / "index", theirs)
    assert verify(str(tmp_path / "index"), decode=True, workers=0) == ([], [])


def check_index(folder: Path, theirs: list[tuple[str, Members]]) -> None:
    """Every row leads to the image and label of its sample, in webdataset's order."""
    manifest = read_manifest(folder)
    assert manifest.names == tuple(key for key, _ in theirs)
    for number, (_, fields) in enumerate(theirs):
        shard, row = manifest.locate(np.array(number))
        with open(manifest.path(int(shard)), "rb") as file:
            file.seek(int(row["offset"]))
            data = file.read(int(row["length"]))
        assert data == next(fields[n] for n in ("jpg", "jpeg", "png") if n in fields)
        assert row["label"] == int(fields["cls"])


def test_metadata_and_hidden_files_are_no_samples(tmp_path: Path) -> None:
    members = {"__meta__": b"x", "__x__/a.jpg": b"x", ".a.jpg": b"x", "b": b"x", "c.jpg": jpeg(1)}
    path = tar_of(tmp_path / "x.tar", members)
    assert ours_of(path) == theirs_of(path) == [("c", {"jpg": jpeg(1)})]


def test_a_tar_that_was_appended_to_and_one_with_folders(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {"a.jpg": jpeg(1), "a.cls": b"1"})
    tree = tree_of({"d/b.cls": b"2", "d/b.jpg": jpeg(2)}, tmp_path / "tree")
    subprocess.run(["tar", "-C", tree, "--sort=name", "-rf", path, "d"], check=True)
    assert ours_of(path) == theirs_of(path)
    assert [key for key, _ in ours_of(path)] == ["a", "d/b"]


NAMES = (
    "a.jpg", "a.JPG", "a.cls", "a.x.y", "b.jpg", "b.cls", "x/a.jpg", "x.y/a.jpg", "x/a.cls", "b",
    "README", ".a.jpg", "__m__", "__m__/a.jpg", "__a.jpg", "a", "c..jpg", "c .jpg",
)  # fmt: skip


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sampled_from(NAMES), max_size=10))
def test_any_order_of_members_is_read_alike_or_said(tmp_path: Path, names: list[str]) -> None:
    """What webdataset refuses, or makes two samples of, has a problem here."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"%d" % (number % 10)))
    ours = read_samples(path).samples
    if any(sample.problem for sample in ours):
        with contextlib.suppress(ValueError):  # a field twice
            keys = [key for key, _ in theirs_of(path)]
            assert len(set(keys)) < len(keys)
    else:
        assert ours_of(path) == theirs_of(path)


# Damage: what is adopted is all of it, with the right bytes

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def labelled(kind: str) -> tuple[Members, list[bytes]]:
    """Three samples, of which one has a long name where the format has room."""
    tail = "" if kind == "ustar" else "k" * 120
    images = [jpeg(number, (8, 8)) for number in range(3)]
    members = {}
    for number, image in enumerate(images):
        members |= {f"{number}{tail}.cls": b"%d" % number, f"{number}{tail}.jpg": image}
    return members, images


def check_damaged(path: Path, images: list[bytes]) -> bool:
    """True where the damaged tar is adopted: then nothing is missing or wrong."""
    try:
        adopted = adopt(IndexJob(0, path.parent, path.name, Settings()))
        same_labels([adopted], Settings())
    except UserError as error:
        if path.name not in str(error):
            raise
        return False
    data, rows = path.read_bytes(), adopted.part.rows
    found = [data[row["offset"] : row["offset"] + row["length"]] for row in rows]
    assert found == images
    assert rows["label"].tolist() == [0, 1, 2]
    return True


@pytest.mark.parametrize("kind", FORMATS)
def test_no_flipped_bit_of_a_header_is_adopted_in_silence(kind: str, tmp_path: Path) -> None:
    members, images = labelled(kind)
    path = tmp_path / "x.tar"
    by_tarfile(FORMATS[kind])(path, members)
    assert main([str(tmp_path), "--workers", "0"]) == 0
    data = path.read_bytes()
    inside: set[int] = set()  # bytes of the fields themselves
    for sample in read_samples(path).samples:
        for at, size in sample.fields.values():
            inside |= set(range(at, at + size))
    headers = [position for position in range(len(data)) if position not in inside]
    draw = np.random.default_rng(0)
    for number, position in enumerate(draw.choice(headers, 300, replace=False).tolist()):
        changed = bytearray(data)
        changed[position] ^= 1 << number % 8
        path.write_bytes(changed)
        check_damaged(path, images)
        if number % 10 == 0:
            assert verify(str(tmp_path), decode=False, workers=0)[0], position


@pytest.mark.parametrize("kind", FORMATS)
def test_no_cut_is_adopted_in_silence(kind: str, tmp_path: Path) -> None:
    members, images = labelled(kind)
    path = tmp_path / "x.tar"
    by_tarfile(FORMATS[kind])(path, members)
    data = path.read_bytes()
    last = data.rfind(images[-1]) + len(images[-1])
    ended = last + -last % 512 + 1024
    for size in sorted({*range(0, len(data), 97), *range(0, len(data), 512), ended, ended - 1}):
        path.write_bytes(data[:size])
        assert check_damaged(path, images) == (size >= ended), size

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools import tar as tarfmt
from shard_tools.atomic import file_sha256


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=100).filter(lambda b: 0 not in b), st.integers(0, 8**11 - 1))
def test_a_header_is_the_one_of_tarfile(name: bytes, size: int) -> None:
    info = tarfile.TarInfo(name.decode("latin1"))
    info.size, info.mode, info.mtime = size, 0o444, 0
    expected = info.tobuf(tarfile.USTAR_FORMAT, encoding="latin1")
    if name.endswith(b"/"):
        return
    assert tarfmt.header(name, size) == expected


def test_a_short_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take less than it was given."""
    fields = {"jpg": os.urandom(9000), "cls": b"3", "json": b"{}"}
    written = []
    for step in (1 << 30, 700):

        def writev(handle: int, parts: list[bytes], step: int = step) -> int:
            return os.write(handle, b"".join(parts)[:step])

        monkeypatch.setattr(tarfmt.os, "writev", writev)
        path = tmp_path / f"{step}.tar"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT)
        writer = tarfmt.ShardWriter(handle)
        offsets = writer.write("000", fields)
        digest = writer.close()
        os.close(handle)
        assert digest == file_sha256(path)
        for name, place in offsets.items():
            assert path.read_bytes()[place : place + len(fields[name])] == fields[name]
        written.append(path.read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("dir.x/a.seg.png", ("dir.x/a", "seg.png")),
        ("./a.jpg", ("./a", "jpg")),
        ("a", ("", "")),
        (".hidden", ("", "")),
        ("dir/.hidden.jpg", ("", "")),
    ],
)
def test_names_split_at_the_first_dot_of_the_file_name(name: str, expected: tuple) -> None:
    assert tarfmt.split_name(name) == expected


def test_what_ustar_cannot_hold_is_refused() -> None:
    for name, size in ((b"n" * 101, 1), (b"n", 8**11)):
        with pytest.raises(tarfmt.TarError, match="exceeds ustar"):
            tarfmt.header(name, size)


def test_a_negative_size_does_not_walk_backwards(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "x.tar").write_bytes(bytes(block) + bytes(10240 - 512))
    with pytest.raises(tarfmt.TarError, match=r"negative size|invalid offset"):
        tarfmt.read_samples(tmp_path / "x.tar")


def test_a_sweep_hashes_all_bytes_once_and_gives_any_range(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    path = tmp_path / "x"
    path.write_bytes(data)
    ranges = [(512, 100), (612, 0), (700, 2_000_000), (600, 50), (2_900_000, 100_000)]
    for count in range(len(ranges) + 1):
        handle = os.open(path, os.O_RDONLY)
        sweep = tarfmt.Sweep(handle)
        for at, size in ranges[:count]:
            assert sweep.read((at, size)) == data[at : at + size]
        assert sweep.finish() == hashlib.sha256(data).hexdigest()
        os.close(handle)
    handle = os.open(path, os.O_RDONLY)
    with pytest.raises(tarfmt.TarError, match="the file ends at byte 3000000"):
        tarfmt.Sweep(handle).read((2_999_990, 20))
    os.close(handle)

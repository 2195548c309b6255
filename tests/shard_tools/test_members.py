"""The strict walk over a tar: all members with their bytes, or an error that names the byte."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from shard_tools.members import Member, TarError, read_members, resolve_links

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(kind: str, long_names: bool = False) -> tuple[bytes, dict[str, bytes]]:
    """A tar of four members and what it holds."""
    tail = "y" * 200 if long_names else ""
    files = {f"d/{number}{tail}.jpg": bytes([number + 1]) * (300 * number) for number in range(4)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue(), files


def contents(path: Path, members: list[Member]) -> dict[str, bytes]:
    data = path.read_bytes()
    return {m.name: data[m.offset : m.offset + m.size] for m in members}


@pytest.mark.parametrize("kind", FORMATS)
def test_all_members_of_each_format_also_inside_another_file(kind: str, tmp_path: Path) -> None:
    data, files = archive(kind, long_names=kind != "ustar")
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert contents(path, list(read_members(path))) == files
    path.write_bytes(b"x" * 700 + data + b"x" * 512)
    assert contents(path, list(read_members(path, 700, len(data)))) == files
    with pytest.raises(TarError, match="data after the end"):
        list(read_members(path, 700))
    with pytest.raises(TarError, match="cut"):
        list(read_members(path, 700, len(data) + 600))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_cut_is_an_error_until_the_archive_has_ended(kind: str, tmp_path: Path) -> None:
    data, files = archive(kind)
    last = max(data.rfind(bytes([4]) * 900) + 900, 0)
    ended = last + -last % 512 + 1024
    path = tmp_path / "a.tar"
    for size in range(0, len(data), 101):
        path.write_bytes(data[:size])
        if size >= ended:
            assert contents(path, list(read_members(path))) == files
        else:
            with pytest.raises(TarError, match=r"a\.tar"):
                list(read_members(path))


@pytest.mark.parametrize("kind", FORMATS)
def test_no_flipped_bit_loses_a_member_without_a_word(kind: str, tmp_path: Path) -> None:
    data, files = archive(kind, long_names=kind != "ustar")
    path = tmp_path / "a.tar"
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = list(read_members(path))
        except TarError:
            continue
        # A name in an extended header has no checksum; sizes and bytes are all there.
        sizes = [member.size for member in found]
        assert sizes == [len(content) for content in files.values()]


def test_without_end_blocks_only_where_asked(tmp_path: Path) -> None:
    data, files = archive("gnu")
    end = data.rfind(bytes([4])) + 1
    path = tmp_path / "a.tar"
    for blocks in (0, 1):
        path.write_bytes(data[: end + -end % 512 + 512 * blocks])
        with pytest.raises(TarError, match="the end of the archive is missing"):
            list(read_members(path))
        assert contents(path, list(read_members(path, lenient=True))) == files
    path.write_bytes(data[: end + -end % 512] + b"junk")
    with pytest.raises(TarError, match="cut at byte"):
        list(read_members(path, lenient=True))


def test_sizes_that_no_archive_has(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for size in ("4611686018427387904", "-5"):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("a.jpg")
            info.pax_headers = {"size": size}
            tar.addfile(info)
        with pytest.raises(TarError, match=r"a\.tar"):
            list(read_members(path))
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 8**11 - 1  # an extended header of 8 GiB
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(TarError, match="extended header of"):
        list(read_members(path))
    chain = tarfile.TarInfo("g")
    chain.type, chain.size = tarfile.XGLTYPE, 0
    path.write_bytes(chain.tobuf(tarfile.USTAR_FORMAT) * 3000 + bytes(1024))
    with pytest.raises(TarError, match=r"a\.tar"):
        list(read_members(path))


def test_links_become_the_bytes_they_point_to(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "in").mkdir(parents=True)
    (top / "a.jpg").write_bytes(b"a" * 600)
    (top / "in" / "hard.jpg").hardlink_to(top / "a.jpg")
    (top / "in" / "soft.jpg").symlink_to("../a.jpg")
    (top / "in" / "twice.jpg").symlink_to("soft.jpg")
    (top / "in" / "out.jpg").symlink_to("/etc/hostname")
    (top / "in" / "loop.jpg").symlink_to("loop.jpg")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "-cf", path, "-C", top, "."], check=True)
    with tarfile.open(path, "a") as tar:
        fifo = tarfile.TarInfo("in/fifo.jpg")
        fifo.type = tarfile.FIFOTYPE
        tar.addfile(fifo)
    found, lost = resolve_links(read_members(path))
    names = {"./a.jpg", "./in/hard.jpg", "./in/soft.jpg", "./in/twice.jpg"}
    assert contents(path, found) == dict.fromkeys(names, b"a" * 600)
    problems = {member.name: member.problem for member in lost}
    assert problems == {
        "./in/out.jpg": "is a link to 'etc/hostname', which is not in the archive",
        "./in/loop.jpg": "is a link that leads back to itself",
        "in/fifo.jpg": "is a FIFO",
    }


def test_a_sparse_member_is_reported(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    for kind in ("gnu", "posix"):
        path = tmp_path / f"{kind}.tar"
        subprocess.run(
            ["tar", "-S", f"--format={kind}", "-cf", path, "-C", tmp_path, "a.jpg"], check=True
        )
        ((lost,),) = (resolve_links(read_members(path))[1],)
        assert (lost.name, lost.problem) == ("a.jpg", "is stored sparse")

"""The members of a tar, read to a proper end.

Python's tarfile stops without a word at a damaged header that is not the first one, and at a file
that is cut there. This walk does not: what it yields is all that the archive holds, or it raises.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import UserError, naming

BLOCK = 512
_MOST_LINKS = 40  # that are followed, as Linux does
_LONGEST_HEADER = 16 << 20  # bytes of an extended header; tarfile reads it at once
_FOLDERS = (tarfile.DIRTYPE, b"D", b"V")  # a folder, GNU's folder listing, a volume's name
_SPECIAL = {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a FIFO"}
# What tarfile raises for bytes that are no tar; the recursion is a chain of extended headers.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError, EOFError)


class TarError(UserError):
    """A tar that is damaged or cannot be used."""


class MissingEnd(TarError):
    """A tar that ends without the two zero blocks."""


class Member(NamedTuple):
    """One member: where its bytes are in the file, or the name of the member that a link points
    to, or why it cannot be read as a range of bytes."""

    name: str
    offset: int
    size: int
    target: str = ""
    problem: str = ""


class _Window:
    """The bytes [start, end) of a file as a file object for tarfile, with bounded reads."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self.file, self.start, self.end = file, start, end
        file.seek(start)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.end - self.file.tell())
        if size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        return self.file.read(left if size < 0 else min(size, left))

    def seek(self, offset: int) -> int:
        return self.file.seek(self.start + offset) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start


def read_members(
    path: str | Path, start: int = 0, size: int | None = None, *, lenient: bool = False
) -> Iterator[Member]:
    """The members (no folders) of the tar in bytes [start, start + size) of a file, in order.

    size: None = up to the end of the file. Raises TarError that names the file and the byte where
    a header is damaged, a member is cut, the two zero blocks of the end are missing (unless
    `lenient`, which takes the end of the file for the end of the archive, as webdataset does), or
    data follow them.
    """
    with naming(path, "cannot be read"), open(path, "rb") as file:
        last = file.seek(0, os.SEEK_END)
        end = last if size is None else start + size
        if end > last:
            raise TarError(f"{path}: cut at byte {last}")
        window = _Window(file, start, end)
        offset = 0
        try:
            with tarfile.open(fileobj=window, mode="r:") as archive:  # type: ignore[call-overload]
                for info in archive:
                    archive.members = []  # or tarfile would keep every header in memory
                    member = _member(path, info, start, end)
                    offset = archive.offset
                    if member is not None:
                        yield member
                offset = archive.offset
        except _DAMAGE as error:
            raise TarError(
                f"{path}: not a readable, uncompressed tar at byte {start + offset} ({error})"
            ) from error
        _check_end(path, file, start + offset, end, lenient)


def _member(path: str | Path, info: tarfile.TarInfo, start: int, end: int) -> Member | None:
    """What one header says; None for a folder. TarError where its data are not all there."""
    name, offset = info.name, start + info.offset_data
    if info.size < 0:  # tarfile would walk backwards
        raise TarError(f"{path}: member {name!r} at byte {offset} has a negative size")
    if info.issparse():
        return Member(name, offset, info.size, problem="is stored sparse")
    holds_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    if holds_data and offset + info.size > end:
        raise TarError(f"{path}: cut inside member {name!r}, which begins at byte {offset}")
    if info.type in _FOLDERS:
        return None
    if info.isreg():
        return Member(name, offset, info.size)
    if info.islnk():
        return Member(name, offset, 0, target=plain_name(info.linkname))
    if info.issym():
        target = posixpath.join(posixpath.dirname(name), info.linkname)
        return Member(name, offset, 0, target=plain_name(target))
    kind = _SPECIAL.get(info.type, f"of the unknown type {info.type!r}")
    return Member(name, offset, 0, problem=f"is {kind}")


def plain_name(name: str) -> str:
    """A member name without "./", doubled slashes and inner ".."."""
    return posixpath.normpath(name).lstrip("/")


def follow_links(members: Iterable[Member]) -> list[Member]:
    """The members in order: a link becomes the bytes of what it points to in the same archive, in
    either direction; what cannot be read has a `problem`."""
    members = list(members)
    by_name = {plain_name(member.name): member for member in members}
    return [_follow(member, by_name) for member in members]


def _follow(member: Member, by_name: dict[str, Member]) -> Member:
    last, steps = member, 0
    while last.target and not last.problem and steps < _MOST_LINKS:
        following = by_name.get(last.target)
        if following is None:
            problem = f"is a link to {last.target!r}, which is not in the archive"
            return member._replace(problem=problem)
        last, steps = following, steps + 1
    if last.problem:
        return member._replace(problem=last.problem)
    if last.target:
        return member._replace(problem="is a link that leads back to itself")
    return Member(member.name, last.offset, last.size)


def resolve_links(members: Iterable[Member]) -> tuple[list[Member], list[Member]]:
    """(members with bytes, members without), each in order, after `follow_links`."""
    followed = follow_links(members)
    return [m for m in followed if not m.problem], [m for m in followed if m.problem]


def _check_end(path: str | Path, file: BinaryIO, offset: int, end: int, lenient: bool) -> None:
    """After the last member come two zero blocks or more, and nothing else."""
    file.seek(offset)
    tail = file.read(min(2 * BLOCK, max(0, end - offset)))
    if lenient and not any(tail) and len(tail) < 2 * BLOCK:
        return
    if len(tail) >= BLOCK and any(tail[:BLOCK]):
        raise TarError(f"{path}: damaged at byte {offset}, no member begins there")
    if len(tail) < 2 * BLOCK or any(tail):
        raise MissingEnd(f"{path}: cut at byte {offset}, the end of the archive is missing")
    left = end - offset - len(tail)
    while chunk := file.read(min(1 << 20, left)):
        if any(chunk):
            raise TarError(f"{path}: data after the end of the archive at byte {offset}")
        left -= len(chunk)

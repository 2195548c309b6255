"""Plain WebDataset tars: a fast writer and a careful reader.

Samples are members `key.field` that follow each other. The writer fills a prepared ustar header
(POSIX.1-1988, mtime 0), so a member costs a few string operations instead of a TarInfo; any tar
reader can read the result. The reader groups the members that `read_members` finds as webdataset
does: it only reports where the bytes are and never extracts anything.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shard_tools.members import BLOCK, Member, TarError, follow_links, read_members

RECORD = 10240  # tar files are padded to a multiple of this
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset leaves out

_SIZE_LIMIT = 8**11  # what the octal size field of a ustar header can hold
_ZEROS = bytes(RECORD)
_PIECE = 1 << 20  # bytes


def _template() -> tuple[bytes, bytes, int]:
    """Bytes of a header between name and size, after the checksum, and the sum of both."""
    info = tarfile.TarInfo("")
    info.mode, info.mtime = 0o444, 0
    block = info.tobuf(tarfile.USTAR_FORMAT)
    middle, tail = block[100:124], block[136:148] + block[156:]
    return middle, tail, sum(middle) + sum(tail) + 8 * ord(" ")


_MIDDLE, _TAIL, _FIXED_SUM = _template()
_MTIME, _REST = _TAIL[:12], _TAIL[12:]


def header(name: bytes, size: int) -> bytes:
    """The 512-byte ustar header of a regular file, mode 0444, mtime 0, owner 0.

    Raises TarError for names over 100 bytes and sizes of 8 GiB and more: ustar has no room.
    """
    if len(name) > 100 or size >= _SIZE_LIMIT:
        raise TarError(f"member {name.decode(errors='replace')!r} ({size} bytes) exceeds ustar")
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(name) + sum(digits))
    return name.ljust(100, b"\0") + _MIDDLE + digits + _MTIME + checksum + _REST


def padding(size: int) -> bytes:
    """Zero bytes that fill the last block of a member of `size` bytes."""
    return _ZEROS[: -size % BLOCK]


def padded(size: int) -> int:
    """Bytes that a member of `size` bytes occupies, without its header."""
    return size + -size % BLOCK


class ShardWriter:
    """Write samples into an open file descriptor and hash what is written.

    The file's sha256 is taken on the way (`checksum=False` leaves it out); `close` writes the end
    of the archive. Field order inside a sample: sorted by name, as webdataset does.
    """

    def __init__(self, handle: int, *, checksum: bool = True) -> None:
        self.handle, self.bytes, self.samples = handle, 0, 0
        self._hash = hashlib.sha256() if checksum else None

    def write(self, key: str, fields: Mapping[str, bytes]) -> dict[str, int]:
        """Append one sample; offset of the data of each field in the file."""
        offsets, parts, pending, end = {}, [], b"", self.bytes
        for name in sorted(fields):
            data = fields[name]
            pending += header(f"{key}.{name}".encode(), len(data))
            end += BLOCK
            offsets[name] = end
            end += padded(len(data))
            if len(data) <= 8 * BLOCK:  # small ones are joined, large ones never copied
                pending += data + padding(len(data))
            else:
                parts += [pending, data]
                pending = padding(len(data))
        self._put([*parts, pending] if pending else parts)
        self.samples += 1
        return offsets

    def close(self) -> str:
        """End the archive and return its sha256 (empty without `checksum`)."""
        end = self.bytes + 2 * BLOCK
        self._put([_ZEROS[: 2 * BLOCK], _ZEROS[: -end % RECORD]])
        return self._hash.hexdigest() if self._hash else ""

    def _put(self, parts: list[bytes]) -> None:
        total = sum(map(len, parts))
        written = os.writev(self.handle, parts)
        if written < total:  # rare: a signal or a nearly full disk cut the call short
            rest = memoryview(b"".join(parts))[written:]
            while rest:
                rest = rest[os.write(self.handle, rest) :]
        if self._hash:
            for part in parts:
                self._hash.update(part)
        self.bytes += total


@dataclass
class Sample:
    """One sample of a tar: its key, per field where the data are (offset, bytes), and why it cannot
    be used, if so."""

    key: str
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Contents:
    """The samples of a tar in order, each key once, and (name, reason) of its other members."""

    samples: list[Sample]
    others: list[tuple[str, str]]


def split_name(name: str) -> tuple[str, str]:
    """Key and field of a member name, split at the first dot of the last path part; the field in
    lower case, as webdataset has it. ("", "") for a name that belongs to no sample: no dot, a
    hidden file, or webdataset's own `__name__`."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match and not _META.match(name) else ("", "")


def read_samples(path: str | Path, *, lenient: bool = False) -> Contents:
    """What a tar holds, by its headers only; links are followed.

    Raises TarError where the tar is damaged, cut, compressed or without its end (see
    `read_members`, also for `lenient`). A sample has a `problem` where webdataset would fail or
    make two samples of it (a field twice, fields that are not adjacent, a key that is used twice),
    or where a field cannot be read as a range of bytes (sparse, a link to nothing, a device).
    """
    samples: list[Sample] = []
    by_key: dict[str, Sample] = {}
    others = []
    last = ""
    for member in follow_links(read_members(path, lenient=lenient)):
        key, name = split_name(member.name)
        if not key:
            others.append((member.name, member.problem or "belongs to no sample by its name"))
            continue
        if key not in by_key:
            by_key[key] = Sample(key)
            samples.append(by_key[key])
        elif key != last:
            _split(by_key[key], name)
        _add(by_key[key], name, member)
        last = key
    return Contents(samples, others)


def _split(sample: Sample, name: str) -> None:
    """Another run of members with the key of `sample` begins with the field `name`."""
    twice = name in sample.fields
    sample.problem = sample.problem or (
        "its key is used twice in this tar" if twice else "its fields are not adjacent in the tar"
    )


def _add(sample: Sample, name: str, member: Member) -> None:
    if name in sample.fields:
        sample.problem = sample.problem or f"has field {name!r} twice"
    elif member.problem:
        sample.problem = sample.problem or f"its field {name!r} {member.problem}"
    sample.fields.setdefault(name, (member.offset, member.size))


def read_up_to(handle: int, offset: int, length: int) -> bytes:
    """`length` bytes of an open file, less only where it ends before: one read may give less, as of
    some network and FUSE file systems."""
    data = os.pread(handle, length, offset)
    while len(data) < length and (more := os.pread(handle, length - len(data), offset + len(data))):
        data += more
    return data


def read_range(handle: int, extent: tuple[int, int]) -> bytes:
    """The bytes at (offset, length) of an open file; TarError where the file ends before."""
    offset, length = extent
    data = read_up_to(handle, offset, length)
    if len(data) != length:
        raise TarError(f"the file ends at byte {offset + len(data)}")
    return data


class Sweep:
    """Reads an open file from front to back, once, for its sha256 and for ranges on the way.

    A range that begins before the last one ended is read a second time; what is between two ranges
    is read in pieces, so that memory stays bounded by the longest range.
    """

    def __init__(self, handle: int) -> None:
        self.handle, self._at, self._hash = handle, 0, hashlib.sha256()

    def read(self, extent: tuple[int, int]) -> bytes:
        """As `read_range`."""
        offset, length = extent
        if offset < self._at:
            return read_range(self.handle, extent)
        self._advance(offset)
        data = read_range(self.handle, extent)
        self._hash.update(data)
        self._at += length
        return data

    def finish(self) -> str:
        """Read the rest; the sha256 of the file, in hex."""
        self._advance(None)
        return self._hash.hexdigest()

    def _advance(self, end: int | None) -> None:
        while end is None or self._at < end:
            size = _PIECE if end is None else min(_PIECE, end - self._at)
            data = os.pread(self.handle, size, self._at)
            if not data:
                return
            self._hash.update(data)
            self._at += len(data)

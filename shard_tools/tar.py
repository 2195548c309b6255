"""Plain WebDataset tars: a fast writer and a careful reader.

Samples are members `key.field` that follow each other. The writer fills a prepared ustar header
(POSIX.1-1988, mtime 0), so a member costs a few string operations instead of a TarInfo; any tar
reader can read the result. The reader is Python's tarfile over the raw file: it only reports where
the bytes lie and never extracts anything.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError

BLOCK = 512
# Fields that may hold the image of a sample, in the order of preference.
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "JPEG", "JPG", "PNG", "WEBP")
RECORD = 10240  # tar files are padded to a multiple of this
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)

_SIZE_LIMIT = 8**11  # what the octal size field of a ustar header can hold
_ZEROS = bytes(RECORD)


class TarError(UserError):
    """A tar that is damaged or is no WebDataset tar, in one sentence."""


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
        offsets, parts, pending, place = {}, [], b"", self.bytes
        for name in sorted(fields):
            data = fields[name]
            pending += header(f"{key}.{name}".encode(), len(data))
            place += BLOCK
            offsets[name] = place
            place += padded(len(data))
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
    """One sample of a tar: its key and, per field, where the data lie (offset, bytes)."""

    key: str
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str]:
    """Key and field of a member name, split at the first dot of the last path part, as webdataset
    does; ("", "") for a name that belongs to no sample (no dot, or a hidden file)."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2]) if match else ("", "")


def read_samples(path: str | Path) -> Iterator[Sample]:
    """The samples of a tar in order, by its headers only.

    Raises TarError where a member is damaged, cut, compressed, sparse, or a field comes twice
    in one sample, and where the end-of-archive blocks are missing.
    """
    size = os.path.getsize(path)
    sample, end = Sample(""), 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + padded(member.size)
                if member.size < 0:  # tarfile would walk backwards
                    raise TarError(f"{path}: member {member.name!r} has a negative size")
                if end > size:
                    raise TarError(f"{path}: cut inside member {member.name!r}")
                key, name = split_name(member.name) if member.isreg() else ("", "")
                if member.issparse():
                    raise TarError(f"{path}: member {member.name!r} is stored sparse")
                if not key:
                    continue
                if key != sample.key:
                    if sample.key:
                        yield sample
                    sample = Sample(key)
                if name in sample.fields:
                    raise TarError(f"{path}: sample {key!r} has field {name!r} twice")
                sample.fields[name] = (member.offset_data, member.size)
    except TarError:
        raise
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise TarError(f"{path}: not a readable, uncompressed tar ({error})") from error
    if sample.key:
        yield sample
    _check_end(path, end, size)


def _check_end(path: str | Path, end: int, size: int) -> None:
    """After the last member come two zero blocks or more, and nothing else."""
    with open(path, "rb") as file:
        file.seek(end)
        tail = file.read(2 * BLOCK)
        if len(tail) < 2 * BLOCK or any(tail):
            raise TarError(
                f"{path}: cut or damaged at byte {end}, the end of the archive is missing"
            )
        while chunk := file.read(1 << 20):
            if any(chunk):
                raise TarError(f"{path}: data after the end of the archive at byte {end}")


def read_range(handle: int, place: tuple[int, int]) -> bytes:
    """The bytes at (offset, length) of an open file; TarError where the file ends before."""
    offset, length = place
    data = os.pread(handle, length, offset)
    while len(data) < length and (more := os.pread(handle, length - len(data), offset + len(data))):
        data += more
    if len(data) != length:
        raise TarError(f"the file ends at byte {offset + len(data)}")
    return data


def file_sha256(path: str | Path) -> str:
    """sha256 of a whole file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_field(sample: Sample) -> str:
    """Name of the field that holds the image: the first of IMAGE_FIELDS; "" where there is none."""
    return next((name for name in IMAGE_FIELDS if name in sample.fields), "")

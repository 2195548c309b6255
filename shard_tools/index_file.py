"""index.bin: one SAMPLE row per sample, memory-mapped; each block is checked at its first use.

    header   64 bytes: magic, version 2, bytes per row, rows, checksum, rows per block, zeros
    rows     SAMPLE [rows], in shard order
    blocks   the sha256 of each block of rows, 32 bytes each

The checksum is the sha256 of (rows, rows per block, blocks), so that opening an index reads a
three-thousandth of it. Version 1 has no blocks, its checksum is the sha256 of all rows, and its
first use reads all of it. The processes of a node share the file's pages.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.errors import UserError, naming, reason, said_by_backend

# One row per sample; `offset` and `length` are bytes inside the tar. 24 bytes, little-endian.
SAMPLE = np.dtype(
    [
        ("offset", "<u8"),  # of the first image byte
        ("length", "<u4"),  # of the image, in bytes
        ("label", "<i4"),  # class index, -1 = none
        ("width", "<u2"),  # of the stored image in pixels, 0 = unknown
        ("height", "<u2"),
        ("orientation", "u1"),  # EXIF orientation as recorded, 1 = upright; never applied
        ("format", "u1"),  # position in manifest.FORMATS
        ("interval", "<u2"),  # MCUs between the restart markers of a JPEG, 0 = none or unknown
    ]
)
BLOCK = 4096  # rows; 96 KiB, checked in a tenth of a millisecond

_MAGIC, _VERSIONS = b"RMIMINDX", (1, 2)
_HEADER = struct.Struct("<8sIIQ32sI4s")
_PIECE = 1 << 20  # bytes that are read at once
_DIGEST = hashlib.sha256().digest_size


class ManifestError(UserError):
    """A shard folder that cannot be used; the message names the file."""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """What the system or a backend of fsspec raises inside becomes a ManifestError that names what
    cannot be read."""
    try:
        yield
    except Exception as error:
        if not said_by_backend(error):
            raise
        raise ManifestError(f"{where}: cannot be read ({reason(error, where)})") from error


@dataclass(frozen=True)
class IndexHeader:
    """What the first 64 bytes of index.bin announce."""

    version: int
    rows: int
    checksum: bytes
    block: int  # rows per block; in version 1 all of them

    SIZE = _HEADER.size

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)

    @property
    def file_bytes(self) -> int:
        digests = self.blocks * _DIGEST if self.version > 1 else 0
        return self.SIZE + self.rows * SAMPLE.itemsize + digests


def parse_header(where: str, head: bytes, size: int) -> IndexHeader:
    """The header of an index of `size` bytes; ManifestError where it does not hold."""
    if len(head) < _HEADER.size:
        raise ManifestError(f"{where}: too short for an index ({size} bytes)")
    magic, version, width, rows, checksum, block, rest = _HEADER.unpack(head[: _HEADER.size])
    if magic != _MAGIC:
        raise ManifestError(f"{where}: not an index of relaxmim shards")
    if version not in _VERSIONS or width != SAMPLE.itemsize:
        raise ManifestError(
            f"{where}: version {version} is not known, this code reads {_VERSIONS[0]} and "
            f"{_VERSIONS[1]}"
        )
    if version == 1:
        header = IndexHeader(version, rows, checksum, max(rows, 1))
    elif not block or any(rest):
        raise ManifestError(f"{where}: damaged, its header does not hold")
    else:
        header = IndexHeader(version, rows, checksum, block)
    if size != header.file_bytes:
        raise ManifestError(
            f"{where}: holds {size} bytes where {rows} samples need {header.file_bytes}"
        )
    return header


def header_bytes(rows: int, digests: bytes) -> bytes:
    """The header of an index of `rows` rows, given the digests of its blocks of BLOCK rows."""
    checksum = blocks_checksum(rows, BLOCK, digests)
    return _HEADER.pack(_MAGIC, _VERSIONS[-1], SAMPLE.itemsize, rows, checksum, BLOCK, bytes(4))


def blocks_checksum(rows: int, block: int, digests: bytes) -> bytes:
    """What identifies an index: sha256 over its numbers and the digests of its blocks."""
    return hashlib.sha256(struct.pack("<QI", rows, block) + digests).digest()


def encode_index(rows: np.ndarray) -> bytes:
    """The bytes of index.bin."""
    rows = np.ascontiguousarray(rows, SAMPLE)
    starts = range(0, len(rows), BLOCK)
    digests = b"".join(hashlib.sha256(_bytes(rows[i : i + BLOCK])).digest() for i in starts)
    return b"".join([header_bytes(len(rows), digests), _bytes(rows), digests])


def index_checksum(data: bytes) -> str:
    """The checksum, in hex, that an encoded index announces."""
    return parse_header("index", data[: _HEADER.size], len(data)).checksum.hex()


class Index:
    """The rows of an index file. What is used is checked first: against its checksum, and that
    rows are in their shards and have labels that the classes know.

    where: what messages call it; path: the local file; checksum: hex, the manifest's; starts:
    int64 [shards + 1], first sample of each shard, then the total; sizes: int64 [shards], bytes;
    classes: 0 where any label is right.
    """

    def __init__(
        self, where: str, path: str, checksum: str, starts: np.ndarray, sizes: np.ndarray,
        classes: int,
    ) -> None:  # fmt: skip
        self.where, self.path, self.checksum = where, path, checksum
        self.starts, self.sizes, self.classes = starts, sizes, classes
        self._done = np.zeros(0, np.uint8)  # 1 where a block has been checked

    @cached_property
    def _mapped(self) -> mmap.mmap:
        with reading(self.where), open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _file(self) -> tuple[np.ndarray, bytes | memoryview, int]:
        """(rows, digests of the blocks, rows per block)."""
        mapped = self._mapped
        header = parse_header(self.where, mapped[: _HEADER.size], len(mapped))
        end = _HEADER.size + header.rows * SAMPLE.itemsize
        digests: bytes | memoryview = header.checksum
        if header.version > 1:
            digests = memoryview(mapped)[end:]
            found = blocks_checksum(header.rows, header.block, bytes(digests))
            if found != header.checksum:
                raise ManifestError(f"{self.where}: damaged, its checksums do not match")
        if header.checksum.hex() != self.checksum or header.rows != self.starts[-1]:
            raise ManifestError(f"{self.where}: belongs to another manifest than the one beside it")
        if len(self._done) != header.blocks:
            self._done = np.zeros(header.blocks, np.uint8)  # no memory before it is written
        # Not frombuffer's count: it refuses 0.
        rows = np.frombuffer(memoryview(mapped)[_HEADER.size : end], SAMPLE)
        return rows, digests, header.block

    def open(self) -> None:
        """Map the file; ManifestError where its header does not hold. Of version 1 all is read."""
        rows, _, block = self._file
        if 0 < len(rows) <= block:
            self.row(0)

    def check_file(self) -> None:
        """ManifestError where the file is no longer the one that was mapped, of which a look at
        pages that are gone, or that the disk cannot read, ends a process by SIGBUS."""
        with naming(self.where, "cannot be read"), open(self.path, "rb") as file:
            head = file.read(_HEADER.size)
            while file.read(_PIECE):
                pass
            header = parse_header(self.where, head, file.tell())
        if header.checksum.hex() != self.checksum:
            raise ManifestError(f"{self.where}: was replaced by that of another manifest")

    def _check_length(self) -> None:
        """ManifestError where the file was cut since: a look at what is gone ends the process."""
        size = self._mapped.size()
        if size < len(self._mapped):
            raise ManifestError(f"{self.where}: was cut to {size} bytes while in use")

    def row(self, sample: int) -> np.void:
        """The row of one sample."""
        rows, _, block = self._file
        self._check_length()
        if not self._done[sample // block]:
            self._check(sample // block)
        return rows[sample]

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """SAMPLE rows of sample numbers; same shape."""
        rows, _, block = self._file
        self._check_length()
        for number in set((samples // block).ravel().tolist()):
            if not self._done[number]:
                self._check(number)
        return rows[samples]

    def whole(self) -> np.ndarray:
        """All rows, memory-mapped and read-only, after a pass over all of them."""
        rows = self._file[0]
        for number, done in enumerate(self._done):
            if not done:
                self._check(number)
        return rows

    def _check(self, number: int) -> None:
        rows, digests, block = self._file
        first = number * block
        part = rows[first : first + block]
        wanted = digests[number * _DIGEST : (number + 1) * _DIGEST]
        if hashlib.sha256(_bytes(part)).digest() != wanted:
            raise ManifestError(f"{self.where}: damaged, its checksum does not match its content")
        check_rows(self.where, part, first, self.starts, self.sizes, self.classes)
        self._done[number] = 1


class ListedIndex(Index):
    """The same for rows in memory, which were just listed."""

    def __init__(self, rows: np.ndarray) -> None:
        self.listed = rows

    def open(self) -> None:
        """Nothing to open."""

    def check_file(self) -> None:
        """Nothing that could change."""

    def row(self, sample: int) -> np.void:
        """The row of one sample."""
        return self.listed[sample]

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """SAMPLE rows of sample numbers; same shape."""
        return self.listed[samples]

    def whole(self) -> np.ndarray:
        """All rows."""
        return self.listed


def check_rows(
    where: str, rows: np.ndarray, first: int, starts: np.ndarray, sizes: np.ndarray, classes: int
) -> None:
    """ManifestError unless every row, the first of which is sample `first`, is in its shard and
    has a label that the classes know. For the other arguments see Index."""
    known = classes or np.iinfo(np.int32).max
    for begin in range(0, len(rows), BLOCK):
        part, number = rows[begin : begin + BLOCK], first + begin
        shards = np.searchsorted(starts, np.arange(number, number + len(part)), side="right") - 1
        ends = part["offset"] + part["length"]
        outside = (ends > sizes[shards].astype(np.uint64)) | (ends < part["offset"])
        if outside.any():
            raise ManifestError(f"{where}: sample {number + outside.argmax()} is outside its shard")
        wrong = (part["label"] < -1) | (part["label"] >= known)
        if wrong.any():
            label = part["label"][wrong.argmax()]
            raise ManifestError(
                f"{where}: sample {number + wrong.argmax()} has label {label} of {known} classes"
            )


def _bytes(rows: np.ndarray) -> memoryview:
    return rows.view(np.uint8).data

"""The shards of a manifest in one buffer: 100 bytes each, where Python objects would take 500.

A manifest of many shards has the buffer in a file of its own, shards.bin:

    header   16 bytes: magic, shards
    buffer   see ShardTable
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from shard_tools.index_file import ManifestError

_HEADER = struct.Struct("<8sQ")
_MAGIC = b"RMIMSHRD"


@dataclass(frozen=True)
class Shard:
    """One tar: `name` relative to `Manifest.folder`, `samples` that the manifest lists in it,
    and `bytes` and `sha256` of the file."""

    name: str
    samples: int
    bytes: int
    sha256: str


class ShardTable(Sequence[Shard]):
    """A read-only sequence of shards whose numbers are arrays too.

    buffer: uint8, int64 [4, count] (samples, bytes, where name and sha256 end), then the texts.
    shared: the handle of the shared memory that the buffer is in (see pipeline/data/shared.py).
    """

    shared: Any = None

    def __init__(self, buffer: np.ndarray, count: int) -> None:
        self.buffer = buffer
        numbers = buffer[: 32 * count].view(np.int64).reshape(4, count)
        self.samples, self.bytes, self._names, self._digests = numbers
        self._texts = buffer[32 * count :]

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> ShardTable:
        """A table of any shards; itself where it is one."""
        if isinstance(shards, cls):
            return shards
        shards = tuple(shards)
        texts = [
            text.encode("utf-8", "surrogatepass") for s in shards for text in (s.name, s.sha256)
        ]
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        sizes = [[s.samples for s in shards], [s.bytes for s in shards]]
        numbers = np.array([*sizes, ends[::2], ends[1::2]], np.int64)
        return cls(np.frombuffer(numbers.tobytes() + b"".join(texts), np.uint8), len(shards))

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first sample of each shard, then the total: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum(self.samples)]).astype(np.int64)

    def encode(self) -> bytes:
        """The bytes of shards.bin."""
        return _HEADER.pack(_MAGIC, len(self)) + self.buffer.tobytes()

    @classmethod
    def decode(cls, where: str, data: bytes) -> ShardTable:
        """The table in the bytes of the file `where`; ManifestError where they are none."""
        magic, count = _HEADER.unpack(data[: _HEADER.size].ljust(_HEADER.size, b"\0"))
        buffer = np.frombuffer(memoryview(data)[_HEADER.size :], np.uint8)
        if magic != _MAGIC or 32 * count > len(buffer):
            raise ManifestError(f"{where}: not a table of relaxmim shards")
        table = cls(buffer, count)
        ends = np.stack([table._names, table._digests], 1).ravel()
        if (np.diff(ends, prepend=0) < 0).any() or [0, *ends][-1] != len(table._texts):
            raise ManifestError(f"{where}: damaged, its texts do not fit together")
        try:
            table._texts.tobytes().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise ManifestError(f"{where}: damaged, its names are no UTF-8 ({error})") from error
        if (table._texts[ends[ends < len(table._texts)]] & 0xC0 == 0x80).any():
            raise ManifestError(f"{where}: damaged, a name ends inside a character")
        return table

    def names(self) -> list[str]:
        """The names of all shards."""
        texts, starts = self._texts.tobytes(), [0, *self._digests.tolist()]
        ends = self._names.tolist()
        return [texts[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends)]  # noqa: B905

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, number: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(number, slice):
            return tuple(self[i] for i in range(*number.indices(len(self))))
        number = range(len(self))[number]  # IndexError outside, and from the end
        start = self._digests[number - 1] if number else 0
        texts = self._texts[start : self._digests[number]].tobytes()
        middle = self._names[number] - start
        name, sha256 = (
            t.decode("utf-8", "surrogatepass") for t in (texts[:middle], texts[middle:])
        )
        return Shard(name, int(self.samples[number]), int(self.bytes[number]), sha256)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        return len(self) == len(other) and np.array_equal(self.buffer, other.buffer)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardTable, (self.buffer, len(self))

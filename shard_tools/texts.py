"""Many texts in two buffers: 9 bytes each beside their UTF-8, where Python strings take 60."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

_PIECE = 1 << 20  # bytes


class Texts(Sequence[str]):
    """A sequence of texts that can only grow.

    data: the texts in UTF-8 (lone surrogates too), each followed by one byte; ends: int64, where
    each one ends in it.
    """

    data: Any  # bytes, bytearray or an array of uint8
    ends: array[int] | np.ndarray

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.data, self.ends = bytearray(), array("q")
        self.extend(texts)

    @classmethod
    def at(cls, data: bytes | np.ndarray, ends: np.ndarray) -> Texts:
        """Texts in buffers that are there (and may be memory-mapped)."""
        texts = cls()
        texts.data, texts.ends = data, ends
        return texts

    @classmethod
    def lines(cls, data: bytes) -> Texts:
        """The lines of a UTF-8 text: one more than it has line feeds, none where it is empty.
        UnicodeDecodeError where it is not UTF-8."""
        ends = np.zeros(data.count(b"\n") + 1 if data else 0, np.int64)
        decoder, found = codecs.getincrementaldecoder("utf-8")(), 0
        for first in range(0, len(data), _PIECE):
            piece = data[first : first + _PIECE]
            decoder.decode(piece)
            feeds = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + first
            ends[found : found + len(feeds)] = feeds
            found += len(feeds)
        decoder.decode(b"", final=True)
        ends[found:] = len(data)
        return cls.at(data, ends)

    def append(self, text: str) -> None:
        assert isinstance(self.data, bytearray)
        assert isinstance(self.ends, array)
        self.data += text.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.data))
        self.data += b"\n"

    def extend(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.append(text)

    def joined(self) -> bytes:
        """All texts in UTF-8 with a line feed between them; a text may have one of its own."""
        return bytes(self.data[: self.ends[-1]]) if len(self) else b""

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # IndexError outside, and from the end
        start = self.ends[number - 1] + 1 if number else 0
        return bytes(self.data[start : self.ends[number]]).decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        data, start = memoryview(self.data), 0
        for end in self.ends if isinstance(self.ends, array) else _numbers(self.ends):
            yield str(data[start:end], "utf-8", "surrogatepass")
            start = end + 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _numbers(values: np.ndarray) -> Iterator[int]:
    """The values as Python's numbers, a few at a time."""
    for first in range(0, len(values), 1 << 12):
        yield from values[first : first + (1 << 12)].tolist()

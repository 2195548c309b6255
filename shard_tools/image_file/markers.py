"""Restart markers inside the rows of a JPEG, set by _jpegmarkers.c without a change to its pixels.

A reader that wants a rectangle need not look at the pieces between markers that lie beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

try:  # built at set-up where a compiler and libjpeg's headers are
    import shard_tools.image_file._jpegmarkers as _jpegmarkers
except ImportError:
    _jpegmarkers = None  # type: ignore[assignment]

GROWTH = 33  # a file grows by at most one byte in so many
CAN_CUT = _jpegmarkers is not None


@dataclass(frozen=True)
class Cut:
    """A JPEG in pieces of `interval` MCUs (0: in one), or why it stays as it is (reason)."""

    data: bytes
    interval: int
    reason: str = ""


def cut(data: bytes) -> Cut:
    """Put restart markers into a baseline JPEG of one scan: about every 64 pixels of a row, fewer
    where they would be more than 2 % of the file. Its Huffman tables become the optimal ones; the
    coefficients are compared afterwards. Needs CAN_CUT."""
    made, interval, reason = _jpegmarkers.cut(data, len(data) + len(data) // GROWTH)
    return Cut(data if made is None else made, interval, reason)

"""The entropy-coded data of JPEGs, checked without a decode by _jpegcheck.c."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

try:  # built at set-up where a compiler is
    import shard_tools.image_file._jpegcheck as _jpegcheck
except ImportError:
    _jpegcheck = None  # type: ignore[assignment]

try:  # what a training without it cannot say, sharding has said
    import simplejpeg
except ImportError:
    simplejpeg = None  # type: ignore[assignment,unused-ignore]

T = TypeVar("T")

_TOGETHER, _BYTES = 16, 8 << 20  # files, and their bytes, that are in memory at a time


# Inside a scan 0xff is data if 0 follows, and a restart marker if 0xd0 to 0xd7 do.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def search_marker(data: bytes, start: int) -> int:
    """Index of the next marker that is neither escaped data nor a restart marker, or -1."""
    match = _MARKER.search(data, start)
    return match.start() if match else -1


# The extension's takes a twentieth of the time.
next_marker = getattr(_jpegcheck, "next_marker", search_marker)


def sound_until(files: Sequence[bytes]) -> list[int]:
    """Of each file the index of the end marker, if it is a baseline JPEG of one scan which, where
    `read_header` accepts it, libjpeg decodes without an error or a warning; -1 if it is not one,
    or only libjpeg can say. Several files take less time together than one after the other."""
    return _jpegcheck.sound_until(files) if _jpegcheck is not None else [-1] * len(files)


def warning_of(data: bytes, channels: int) -> str:
    """What libjpeg warns of as it decodes a JPEG, or ""."""
    if simplejpeg is None:
        return ""
    try:  # entropy decoding is complete at 1/8 size too, and warnings are errors here
        colours = "CMYK" if channels == 4 else "GRAY"
        simplejpeg.decode_jpeg(data, colours, min_height=1, min_width=1, min_factor=8)
        return ""
    except ValueError as warning:
        return str(warning)


def walk_ahead(
    files: Iterable[tuple[bytes, T]], walk: bool = True
) -> Iterator[tuple[bytes, int, T]]:
    """(file, `sound_until` of it, what came with it) of each (file, what comes with it), in their
    order; some are read ahead and walked together. Without walk: -1, and nothing is read ahead."""
    if not walk:
        yield from ((data, -1, tag) for data, tag in files)
        return
    waiting: list[tuple[bytes, T]] = []
    size = 0
    for data, tag in files:
        waiting.append((data, tag))
        size += len(data)
        if len(waiting) == _TOGETHER or size >= _BYTES:
            yield from _walk(waiting)
            waiting, size = [], 0
    yield from _walk(waiting)


def _walk(files: list[tuple[bytes, T]]) -> Iterator[tuple[bytes, int, T]]:
    ends = sound_until([data for data, _ in files])
    for (data, tag), end in zip(files, ends, strict=True):
        yield data, end, tag

"""A rectangle of a JPEG that restart markers cut into pieces, as a smaller JPEG, without a decode.

Pieces begin without knowledge of what is before them (ITU-T T.81, E.1.4). Where each row of MCUs is
a whole number of pieces, or each piece a whole number of rows, those that a rectangle needs make a
JPEG by themselves: the header with other dimensions, the markers numbered from the first again.
Every decoder gives the pixels that it gives to the whole file, since around the rectangle there is
an MCU more where its filter for chroma looks at neighbours.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from shard_tools.image_file.header import Header

_DRI, _SOS, _EOI, _SOF, _RST0 = 0xDD, 0xDA, 0xD9, (0xC0, 0xC1), 0xD0


@dataclass(frozen=True, eq=False)
class Pieces:
    """Where the pieces of a JPEG are.

    frame: index of its frame header's content; across, down: pixels of an MCU; row, rows: MCUs of a
    row, and rows; interval: MCUs of a piece; begins, ends: of each piece's codes, int64 [pieces].
    """

    header: Header
    frame: int
    across: int
    down: int
    row: int
    rows: int
    interval: int
    begins: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Region:
    """A JPEG that shows `width` x `height` pixels of a picture, from (left, top) on."""

    data: bytes
    left: int
    top: int
    width: int
    height: int


def whole(data: bytes, header: Header) -> Region:
    """All of a picture."""
    return Region(data, 0, 0, header.width, header.height)


def find_pieces(data: bytes, header: Header) -> Pieces | None:
    """The pieces of a JPEG; None where it is not baseline, has several scans, has no restart
    markers, or has others than its header announces. header: what `read_header` says of it."""
    if not header.plain:
        return None
    frame = interval = 0
    for begin, _ in header.parts[1:-1]:
        if data[begin + 1] in _SOF:
            frame = begin + 4
        elif data[begin + 1] == _DRI:
            (interval,) = struct.unpack_from(">H", data, begin + 4)
    scan, end = header.parts[-1]
    if not frame or not interval or data[scan + 1] != _SOS or data[scan + 4] != header.channels:
        return None
    grey, sampling = header.channels == 1, data[frame + 7]
    across, down = (8 if grey else 8 * n for n in (sampling >> 4, sampling & 15))
    row, rows = -(-header.width // across), -(-header.height // down)
    start = _after(data, scan)
    codes = np.frombuffer(data, np.uint8, end - start, start)
    marks = np.flatnonzero(codes[:-1] == 0xFF)  # inside a scan 0xff is data if 0 follows
    marks = marks[codes[marks + 1] & 0xF8 == _RST0]
    count = -(-row * rows // interval) - 1
    if len(marks) != count or (codes[marks + 1] != _RST0 + np.arange(count) % 8).any():
        return None
    begins = np.concatenate([[start], marks + (start + 2)])
    ends = np.concatenate([marks + start, [end - 2]])
    return Pieces(header, frame, across, down, row, rows, interval, begins, ends)


def cut_out(
    data: bytes, pieces: Pieces, left: float, top: float, right: float, bottom: float
) -> Region:
    """The smallest JPEG of whole pieces that shows the rectangle as the whole file does; `data`
    itself where it needs all of them, or where rows and pieces do not begin together. ValueError
    for a rectangle without pixels, or with some that are not the picture's."""
    p = pieces
    if not (0 <= left < right <= p.header.width and 0 <= top < bottom <= p.header.height):
        raise ValueError(f"rectangle outside the {p.header.width}x{p.header.height} picture")
    if p.row % p.interval == 0:
        wide, high = p.interval, 1  # MCUs of a piece
    elif p.interval % p.row == 0:
        wide, high = p.row, p.interval // p.row
    else:
        return whole(data, p.header)
    first, last = _span(left, right, p.across, p.row, wide)
    upper, lower = _span(top, bottom, p.down, p.rows, high)
    per_row = p.row // wide
    if last - first == per_row and upper == 0 and lower * high >= p.rows:
        return whole(data, p.header)
    runs = np.arange(upper, lower) * per_row + first
    corner = first * wide * p.across, upper * high * p.down
    width = min(last * wide * p.across, p.header.width) - corner[0]
    height = min(lower * high * p.down, p.header.height) - corner[1]
    header = _header(data, p, width, height)
    return Region(_joined(header, data, p, runs, last - first), *corner, width, height)


def _span(low: float, high: float, unit: int, units: int, each: int) -> tuple[int, int]:
    """The pieces [first, last) of `each` of `units` MCUs that hold the pixels [low, high), and a
    neighbour more if the MCU of `unit` pixels has chroma of half the size."""
    margin = int(unit > 8)
    first = max(0, int(low) // unit - margin)
    last = min(units - 1, (math.ceil(high) - 1) // unit + margin)
    return first // each, last // each + 1


def _header(data: bytes, pieces: Pieces, width: int, height: int) -> bytes:
    """What the picture depends on, up to its codes, with other dimensions."""
    parts = [data[begin:end] for begin, end in pieces.header.parts[:-1]]
    for number, (begin, end) in enumerate(pieces.header.parts[:-1]):
        if begin == pieces.frame - 4:
            size = struct.pack(">HH", height, width)
            parts[number] = data[begin : begin + 5] + size + data[begin + 9 : end]
    scan, _ = pieces.header.parts[-1]
    return b"".join(parts) + data[scan : _after(data, scan)]


def _joined(header: bytes, data: bytes, pieces: Pieces, first: np.ndarray, count: int) -> bytes:
    """The header, runs of `count` pieces from each of `first` on, their markers numbered from the
    first again, and the end of the picture."""
    begins, ends = pieces.begins[first], pieces.ends[first + (count - 1)]
    runs = zip(begins.tolist(), (ends + 2).tolist(), strict=True)  # each with its last marker
    out = bytearray().join([header, *(data[begin:end] for begin, end in runs)])
    shift = np.cumsum(ends + 2 - begins) - (ends + 2) + len(header)  # from index to new index
    marks = (pieces.ends[first[:, None] + np.arange(count)] + shift[:, None] + 1).ravel()
    np.frombuffer(out, np.uint8)[marks] = _RST0 + np.arange(len(marks)) % 8
    out[-1] = _EOI
    return bytes(out)


def _after(data: bytes, begin: int) -> int:
    """Index behind the segment that begins here."""
    return begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")

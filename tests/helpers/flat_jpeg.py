"""A JPEG writer for kinds that no library writes: any sampling factors, scans and coding names.

Only the DC coefficient of each block is coded, so each block is flat.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

STANDARD = ((1, 1), (1, 1), (1, 1))


def segment(marker: int, payload: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(payload) + 2) + payload


class _Bits:
    """Bits into bytes, with 0xff stuffed."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def put(self, value: int, count: int) -> None:
        if count:
            self.parts.append(format(value, f"0{count}b"))

    def bytes(self) -> bytes:
        text = "".join(self.parts)
        text += "1" * (-len(text) % 8)
        raw = np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0")).tobytes()
        return raw.replace(b"\xff", b"\xff\0")


def flat_jpeg(
    width: int,
    height: int,
    sampling: Sequence[tuple[int, int]] = STANDARD,
    *,
    seed: int = 0,
    interleaved: bool = True,
    sof: int = 0xC0,
    extra: bytes = b"",
) -> bytes:
    """A JPEG of random flat blocks. sampling: (h, v) by component; extra: segments put before the
    frame; sof: the frame marker (0xc0 and 0xc1 alone describe what is written)."""
    rng = np.random.default_rng(seed)
    wide, high = max(h for h, _ in sampling), max(v for _, v in sampling)
    across, down = -(-width // (8 * wide)), -(-height // (8 * high))
    # Levels per block: DC = level, quantised by 8, so that a level is a grey value minus 128.
    planes = [rng.integers(-100, 100, (down * v, across * h)) for h, v in sampling]
    frame = struct.pack(">BHHB", 8, height, width, len(sampling))
    for number, (h, v) in enumerate(sampling, 1):
        frame += bytes([number, h << 4 | v, 0])
    # Huffman: DC categories 0 to 11 in 4 bits each; AC: end of block in 1 bit.
    tables = bytes([0, 0, 0, 0, 12, *[0] * 12, *range(12)]) + bytes([0x10, 1, *[0] * 15, 0])
    out = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x08" * 64) + extra
    out += segment(sof, frame) + segment(0xC4, tables)
    everything = list(range(len(sampling)))
    for components in [everything] if interleaved else [[c] for c in everything]:
        named = b"".join(bytes([c + 1, 0]) for c in components)
        out += segment(0xDA, bytes([len(components)]) + named + b"\0\x3f\0")
        out += _scan(planes, components, sampling, (width, height), (across, down))
    return out + b"\xff\xd9"


def _scan(planes, components, sampling, size, units) -> bytes:
    bits, last = _Bits(), dict.fromkeys(components, 0)

    def block(component: int, y: int, x: int) -> None:
        level = int(planes[component][y, x])
        step, last[component] = level - last[component], level
        _put(bits, step)
        bits.put(0, 1)

    if len(components) == 1:  # of one component, every block that the picture needs, in rows
        (c,) = components
        wide, high = (max(s[axis] for s in sampling) for axis in (0, 1))
        across = -(-size[0] * sampling[c][0] // (8 * wide))
        down = -(-size[1] * sampling[c][1] // (8 * high))
        for y in range(down):
            for x in range(across):
                block(c, y, x)
        return bits.bytes()
    for row in range(units[1]):
        for column in range(units[0]):
            for c in components:
                h, v = sampling[c]
                for y in range(v):
                    for x in range(h):
                        block(c, row * v + y, column * h + x)
    return bits.bytes()


def lossless_jpeg(values: np.ndarray) -> bytes:
    """A lossless grey JPEG (SOF3), each value predicted by its left neighbour.

    values: uint8 [H, W]. simplejpeg writes past its buffer when asked for an eighth of it.
    """
    height, width = values.shape
    signed = values.astype(int)
    predicted = np.hstack([signed[:, :1] * 0 + 128, signed[:, :-1]])
    predicted[1:, 0] = signed[:-1, 0]
    bits = _Bits()
    for step in (signed - predicted).ravel():
        _put(bits, int(step))
    frame = struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0])
    table = bytes([0, 0, 0, 0, 12, *[0] * 12, *range(12)])
    scan = segment(0xDA, b"\x01\x01\0\x01\0\0") + bits.bytes()
    return b"\xff\xd8" + segment(0xC3, frame) + segment(0xC4, table) + scan + b"\xff\xd9"


def _put(bits: _Bits, step: int) -> None:
    """A difference: its length in 4 bits, then its value in that many."""
    length = abs(step).bit_length()
    bits.put(length, 4)
    bits.put(step if step >= 0 else step + (1 << length) - 1, length)

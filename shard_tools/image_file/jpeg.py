"""Walk over the markers of a JPEG (ITU-T T.81, annex B) without decoding it."""

from __future__ import annotations

import struct

from shard_tools.image_file.header import Header, ImageFault, check_size
from shard_tools.image_file.sound import next_marker

SOI = b"\xff\xd8"
MAX_SCANS = 500  # more are an attack on the decoder's time; the C extension has this limit too
_EOI, _SOS, _DHT, _DQT, _DRI = 0xD9, 0xDA, 0xC4, 0xDB, 0xDD
_SOF = {0xC0, 0xC1, 0xC2}  # baseline, extended sequential, progressive: Huffman-coded DCT
_PROGRESSIVE = 0xC2
_FOREIGN_SOF = {
    0xC3: "lossless JPEG (SOF3)",
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE), "hierarchical JPEG"),
    **dict.fromkeys((0xC9, 0xCA), "JPEG with arithmetic coding"),
    0xCB: "lossless JPEG with arithmetic coding",
    0xF7: "JPEG-LS file",
}
# Segments that may stand anywhere: tables, DAC, DNL, APPn, comments.
_SEGMENTS = {_DHT, _DQT, _DRI, 0xCC, 0xDC, *range(0xE0, 0xF0), 0xFE}
_TABLES = {_DHT, _DQT, _DRI}
_BARE = {0x01, *range(0xD0, 0xDA)}  # markers without a segment
# Sampling factors (h << 4 | v) by component on which the decoders were compared; others are rare.
_LUMA = (0x11, 0x21, 0x22, 0x12, 0x41)
_PLAIN = {*((y,) for y in _LUMA), *((y, 0x11, 0x11) for y in _LUMA), (0x11, 0x11, 0x11, 0x11)}
_INCOMPLETE = "scans are missing that would complete the picture"
_CUT = "the file is truncated (no end-of-image marker)"


def read_jpeg(data: bytes, sound: int = -1) -> Header:
    """The header of a JPEG that ends properly. Raises ImageFault for kinds that decoders do not
    share, for limits exceeded and for a file that is cut or whose markers make no sense.

    Bytes after the end-of-image marker (padding, a second picture, a film) do not matter.
    sound: `sound_until` of it, if it is known; the end is then not looked for.
    """
    frame, tables, at, orderly = b"", [], 2, True
    kind = _EOI
    while kind != _SOS:
        kind, begin, start, end = _segment(data, at)
        orderly &= begin == at
        if kind in _SOF:
            if frame:
                raise ImageFault("declares two frames")
            progressive, frame = kind == _PROGRESSIVE, data[start:end]
        elif kind in _FOREIGN_SOF:
            raise ImageFault(
                f"a {_FOREIGN_SOF[kind]}, which most programs cannot read; save it as an ordinary "
                "JPEG or as PNG"
            )
        elif kind not in _SEGMENTS and kind != _SOS:
            raise ImageFault(f"unexpected marker ff{kind:02x} in the header")
        if _decides(kind, data[start : min(end, start + 14)]):
            tables.append((begin, end))
        at = end
    if not frame:
        raise ImageFault("a scan begins before the frame header")
    width, height, sampling = _read_frame(frame)
    scan = data[start:end]
    together = scan[:1] == frame[5:6]  # the first scan holds all channels
    if together and len(sampling) > 1 and sum((s >> 4) * (s & 15) for s in sampling) > 10:
        raise ImageFault(f"sampling factors {_text(sampling)} are too large for one scan")
    length, scans, between = _scans(data, end if sound < 0 else sound)
    # Decoders that stop with the last row of a file of one scan would not see what follows it.
    single = together and not progressive
    damage = "" if single or _complete(frame, [scan, *scans]) else _INCOMPLETE
    plain = orderly and not damage and not (single and (scans or between)) and sampling in _PLAIN
    parts = ((0, 2), *tables, (begin, length))
    channels = len(sampling)
    return Header("JPEG", width, height, channels, plain=plain, parts=parts, damage=damage)


def _segment(data: bytes, at: int) -> tuple[int, int, int, int]:
    """(marker, its first byte, payload start, payload end) of the next segment from `at`."""
    while True:
        begin = data.find(b"\xff", at)
        code = begin + 1
        while data[code : code + 1] == b"\xff":  # fill bytes
            code += 1
        if begin < 0 or code >= len(data):
            raise ImageFault(_CUT)
        if data[code]:
            break
        at = code + 1
    kind = data[code]
    if kind in _BARE:
        raise ImageFault(
            "the file ends before its picture" if kind == _EOI
            else f"unexpected marker ff{kind:02x} in the header"
        )  # fmt: skip
    length = int.from_bytes(data[code + 1 : code + 3], "big")
    end = code + 1 + length
    if length < 2 or end > len(data):
        raise ImageFault(_CUT if length != 0 and length != 1 else "a segment of impossible length")
    return kind, begin, code + 3, end


def _scans(data: bytes, at: int) -> tuple[int, list[bytes], bool]:
    """(end of the file, headers of the scans after the first, whether other segments follow)."""
    scans: list[bytes] = []
    between = False
    while (at := next_marker(data, at)) >= 0:
        kind, at = data[at + 1], at + 2
        if kind == _EOI:
            return at, scans, between
        end = at + int.from_bytes(data[at : at + 2], "big")
        if kind == _SOS:
            scans.append(data[at + 2 : end])
            if len(scans) >= MAX_SCANS:
                raise ImageFault(f"more than {MAX_SCANS} scans")
        elif kind in _SEGMENTS:
            between = True
        else:
            raise ImageFault(f"damaged: unexpected marker ff{kind:02x} in the picture")
        at = end
    raise ImageFault(_CUT)


def _complete(frame: bytes, scans: list[bytes]) -> bool:
    """Whether the scans give every coefficient of every channel to its last bit."""
    known = dict.fromkeys(frame[6::3], 0)  # by channel: bit k = coefficient k
    for scan in scans:
        count = scan[0] if scan else 0
        if len(scan) != 4 + 2 * count:
            return False
        first, last, shift = scan[-3:]
        if shift & 15 == 0:
            for channel in scan[1 : 1 + 2 * count : 2]:
                known[channel] = known.get(channel, 0) | ((2 << last) - (1 << first))
    return all(mask & (1 << 64) - 1 == (1 << 64) - 1 for mask in known.values())


def _decides(kind: int, payload: bytes) -> bool:
    """Whether the picture depends on a segment, of which 14 bytes are given: tables, the frame, and
    JFIF and Adobe segments as long as libjpeg wants them, which say what the colours are."""
    if kind == 0xE0:
        return payload[:5] == b"JFIF\0" and len(payload) == 14
    if kind == 0xEE:
        return payload[:5] == b"Adobe" and len(payload) >= 12
    return kind in _TABLES or kind in _SOF


def _read_frame(frame: bytes) -> tuple[int, int, tuple[int, ...]]:
    """(width, height, sampling factors) of a frame header that all decoders can work on."""
    if len(frame) < 6:
        raise ImageFault("its frame header is damaged")
    bits, height, width, count = struct.unpack(">BHHB", frame[:6])
    if bits != 8:
        raise ImageFault(f"a JPEG of {bits} bits per value; convert it to 8 bits first")
    if count not in (1, 3, 4) or len(frame) != 6 + 3 * count:
        raise ImageFault(f"a JPEG of {count} channels, neither grey nor RGB nor CMYK")
    if height == 0:
        raise ImageFault("its frame header declares no height (DNL); save it again")
    check_size(width, height)
    sampling = tuple(frame[7::3])
    wide, high = max(s >> 4 for s in sampling), max(s & 15 for s in sampling)
    for factors in sampling:
        h, v = factors >> 4, factors & 15
        if not (1 <= h <= 4 and 1 <= v <= 4):
            raise ImageFault(f"sampling factors {_text(sampling)} are outside 1 to 4")
        if wide % h or high % v:
            raise ImageFault(
                f"sampling factors {_text(sampling)} have a fractional ratio, which no decoder "
                "reads; save it again"
            )
    return width, height, sampling


def _text(sampling: tuple[int, ...]) -> str:
    return ", ".join(f"{s >> 4}x{s & 15}" for s in sampling)

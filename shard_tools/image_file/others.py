"""What PNG, GIF and the formats that Pillow alone knows declare, without decoding them."""

from __future__ import annotations

import io
import math
import re
import struct
import zlib

import numpy as np
from PIL import Image, TiffImagePlugin, features

from shard_tools.image_file.header import Header, ImageFault, check_size
from shard_tools.image_file.pillow import calling_pillow

PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # chunks that decide the pixels
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type; 4 and 6 have alpha
_PNG_PALETTE = 3  # the colour type of palette indices
_PNG_INTERLACE = 28  # index in the file of the byte that says whether it is interlaced
# Passes of an interlaced PNG: first column and row, columns and rows from one pixel to the next.
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
)  # fmt: skip

# TIFF tags; channels by photometric interpretation, without the extra ones; kinds of numbers.
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _NUMBER = 258, 262, 277, 338, 339
_SUBFILE, _COLOURS, _SUB_IFDS = 254, 320, 330
_REDUCED = (1, 3, 5, 7)  # types of a subfile: a smaller form of another picture of the file
_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}
_PIECE = 1 << 20  # bytes inflated at once
_RLE8, _RLE4 = 1, 2  # of a BMP's compressions
_END_OF_ROW, _END, _DELTA = 0, 1, 2  # of RLE8, after a 0
# Where the next picture of a PNM begins.
_NEXT_PNM, _COMMENT = re.compile(rb"\s*P[1-7]\s"), re.compile(rb"#[^\n]*")
# What Pillow reads of other formats through a library that a build of it may lack.
_LIBRARIES = {"WEBP": "webp", "TIFF": "libtiff"}
# Pillow's own reader of uncompressed TIFFs fills strips that are not there with other bytes of the
# file or with black, and misreads YCbCr and separate planes of other than 8 bits.
TiffImagePlugin.READ_LIBTIFF = True
_NUMBERS = {1: "unsigned", 2: "signed", 3: "float"}


def read_png(data: bytes) -> Header:
    """The header of a PNG, after every chunk's CRC and the end chunk were checked."""
    at, parts, about, frames, alpha, exif = len(PNG), [(0, len(PNG))], b"", 1, False, b""
    view, kind = memoryview(data), b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise ImageFault("the file is truncated (no IEND chunk)")
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise ImageFault(f"the file is truncated (in its {_name(kind)} chunk)")
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImageFault(f"damaged: the checksum of its {_name(kind)} chunk does not match")
        content = data[at + 8 : end - 4] if kind != b"IDAT" else b""
        if not about and (kind != b"IHDR" or length != 13):
            raise ImageFault(f"the PNG begins with a {_name(kind)} chunk, not with IHDR")
        if kind == b"IHDR":
            about = content
        elif kind == b"tRNS":
            alpha = True
        elif kind == b"acTL":
            frames = int.from_bytes(content[:4], "big")
        elif kind == b"fdAT":  # a picture beside that of IDAT
            frames = max(frames, 2)
        elif kind == b"eXIf":
            exif = content
        if kind in _PNG_PICTURE:
            parts.append((at, end))
        at = end
    width, height, bits, colour = struct.unpack(">IIBB", about[:10])
    check_size(width, height)
    _check_frames("PNG", frames)
    if colour == _PNG_PALETTE and not any(data[a + 4 : a + 8] == b"PLTE" for a, _ in parts):
        raise ImageFault("damaged: a PNG of palette colours without its palette")
    channels, alpha = _PNG_CHANNELS.get(colour, 3), alpha or colour in (4, 6)
    return Header("PNG", width, height, channels, bits, alpha=alpha, parts=tuple(parts), exif=exif)


def _name(kind: bytes) -> str:
    return kind.decode("ascii", "backslashreplace")


def read_gif(data: bytes) -> Header:
    """The header of a GIF with one picture, after its blocks were followed to the trailer."""
    frames, alpha, covered = 0, False, (0, 0)
    try:
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        at = 13 + _table(flags)
        while (kind := data[at]) != 0x3B:
            if kind == 0x2C:
                frames += 1
                covered = struct.unpack_from("<HH", data, at + 5)
                at += 10 + _table(data[at + 9]) + 1
            elif kind == 0x21:
                alpha |= data[at + 1] == 0xF9 and bool(data[at + 3] & 1)
                at += 2
            else:
                raise ImageFault(f"damaged: block 0x{kind:02x} at byte {at} of the GIF is unknown")
            while data[at]:
                at += data[at] + 1
            at += 1
    except (IndexError, struct.error):
        raise ImageFault("the file is truncated (no trailer of the GIF)") from None
    check_size(width, height)
    _check_frames("GIF", frames)
    _check_covered("GIF", covered, (width, height))
    return Header("GIF", width, height, channels=1, alpha=alpha)


def _table(flags: int) -> int:
    """Bytes of the colour table that the flags of a GIF announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def read_other(data: bytes, kind: str) -> Header:
    """The header of a WebP, TIFF, BMP or PPM file, as Pillow reads it."""
    if kind in _LIBRARIES and not features.check(_LIBRARIES[kind]):
        name = "WebP" if kind == "WEBP" else kind
        raise ImageFault(f"a {name} image, which this build of Pillow cannot read")
    if kind == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ImageFault("the file is truncated (shorter than its RIFF header says)")
    with calling_pillow(kind):
        image = Image.open(io.BytesIO(data), formats=(kind,))
        size, mode, frames = image.size, image.mode, getattr(image, "n_frames", 1)
        tile = image.tile[0] if kind == "PPM" else None
    check_size(*size)
    _check_frames(kind, frames)
    if kind == "WEBP":
        _check_covered("WebP", _webp_frame(data) or size, size)
    if kind == "TIFF":
        return _tiff(image, *size)
    if kind == "BMP" and image.info.get("compression") == _RLE4:  # Pillow loses pixels of it
        raise ImageFault("a BMP compressed by RLE4; save it as PNG or as an uncompressed BMP")
    if kind == "BMP" and image.info.get("compression") == _RLE8:
        _check_rle8(data, *size)
    if kind == "BMP" and mode == "1" and _bits_of_bmp(data) != 1:  # Pillow reads one bit a pixel
        raise ImageFault(
            f"a BMP of {_bits_of_bmp(data)} bits with black and white alone in its palette, which "
            "Pillow misreads; save it as PNG"
        )
    alpha = mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    bits, number = {"I": (16, "unsigned"), "F": (32, "float")}.get(mode, (8, "unsigned"))
    if tile is None:
        return Header(kind, *size, Image.getmodebands(mode), bits, number, alpha)
    if mode == "RGB" and isinstance(tile.args, tuple) and tile.args[1] > 255:  # Pillow scales it
        bits = 16
    header = Header(kind, *size, Image.getmodebands(mode), bits, number, alpha)
    if _another_follows(data, tile.offset, header, bilevel=mode == "1"):
        raise ImageFault(
            "a PNM of several pictures; write the one that is meant, or each, to a file of its own"
        )
    return header


def _another_follows(data: bytes, begin: int, header: Header, bilevel: bool) -> bool:
    """Whether another picture comes after that of a PNM, whose values begin at a byte."""
    if data[1:2] in b"123":  # as text
        return bool(_NEXT_PNM.search(_COMMENT.sub(b"", data[begin:])))
    row = header.width * header.channels * (1 if bilevel else header.bits)
    return bool(_NEXT_PNM.match(data, begin + header.height * -(-row // 8)))


def _check_rle8(data: bytes, width: int, height: int) -> None:
    """Raise ImageFault unless the codes give every row all of its pixels: what they leave out is
    made up, and Pillow misreads where they move on."""
    at = int.from_bytes(data[10:14], "little")
    column = row = 0
    while row < height:
        count, code = (data[at : at + 2] + b"\0\1")[:2]  # an end where the file is cut
        at += 2
        if count or code > _DELTA:
            column += count or code
            at += 0 if count else code + code % 2
        elif code == _END_OF_ROW and column == width:
            column, row = 0, row + 1
        elif code == _END and column == width and row == height - 1:
            return
        else:
            raise ImageFault(
                f"a BMP whose RLE8 codes do not fill row {row} of its {height}; save it as PNG"
            )


def _bits_of_bmp(data: bytes) -> int:
    """Bits per pixel; the oldest header, of 12 bytes, has them four bytes earlier."""
    at = 24 if data[14:18] == b"\x0c\0\0\0" else 28
    return int.from_bytes(data[at : at + 2], "little")


def _webp_frame(data: bytes) -> tuple[int, int] | None:
    """Width and height of the first frame of an animated WebP; None for any other."""
    at = 12
    while at + 24 <= len(data):
        if data[at : at + 4] == b"ANMF":
            sides = data[at + 14 : at + 17], data[at + 17 : at + 20]
            return int.from_bytes(sides[0], "little") + 1, int.from_bytes(sides[1], "little") + 1
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    return None


def _tiff(image: Image.Image, width: int, height: int) -> Header:
    """Pillow has matched the tags with the layouts that it knows; some of these lose values."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    compression = image.info.get("compression", "raw")
    if tags.get(_SUBFILE) in _REDUCED and _SUB_IFDS in tags:
        raise ImageFault(
            "a TIFF whose picture is a preview of another in the file, as in a camera's raw file; "
            "convert it to JPEG or PNG first"
        )
    if image.mode == "P" and 0 < max(tags[_COLOURS]) < 256:  # Pillow would make all of them black
        raise ImageFault("a TIFF whose palette has values of 8 bits, not 16; save it as PNG")
    if compression == "tiff_jpeg":
        raise ImageFault(
            "a TIFF of old-style JPEG, in which damage cannot be seen; save it as JPEG or PNG"
        )
    photometric = tags.get(_PHOTOMETRIC, 0)
    if photometric not in _CHANNELS:
        raise ImageFault(f"a TIFF in {image.mode} colours; convert it to RGB first")
    known = _CHANNELS[photometric]
    channels, extra = tags.get(_SAMPLES, known), tags.get(_EXTRA, ())
    alpha = extra in ((1,), (2,))  # associated and unassociated alpha
    if channels > known + alpha:
        raise ImageFault(
            f"a TIFF of {channels} channels, of which {known} would be used; write those that are "
            "meant to a file of their own"
        )
    bits, number = tags.get(_BITS, (1,))[0], _NUMBERS.get(tags.get(_NUMBER, (1,))[0], "unsigned")
    if number == "signed" and bits == 8:
        raise ImageFault("a TIFF of signed 8-bit values; convert it to unsigned ones first")
    if photometric == 0 and (bits > 8 or number != "unsigned"):
        raise ImageFault("a TIFF of more than 8 bits whose 0 is white; invert it first")
    return Header("TIFF", width, height, channels, bits, number, alpha)


def inflate(data: bytes, enough: float = math.inf) -> tuple[int, bool]:
    """How many bytes deflated data hold, of which more than `enough` are not counted, and whether
    they come to their end."""
    inflate, out, total = zlib.decompressobj(), b"x", 0
    try:
        while not inflate.eof and (data or out) and total < enough:
            out = inflate.decompress(data, _PIECE)
            data, total = inflate.unconsumed_tail, total + len(out)
    except zlib.error:
        raise ImageFault("damaged: the checksum of its deflated data does not match") from None
    return total, inflate.eof


def check_rows(image: Image.Image, data: bytes, header: Header) -> None:
    """Raise ImageFault where the data of a PNG, which Pillow decoded, end before its last row: what
    follows is 0 then, so that only a last row of zeros, and an interlaced one, need a look."""
    interlaced = data[_PNG_INTERLACE]
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not interlaced and np.asarray(last).any():
        return
    needed = 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        width, height = -((left - image.width) // across), -((top - image.height) // down)
        if width:
            needed += height * (1 - (-width * header.bits * header.channels // 8))
    codes = (data[a + 8 : b - 4] for a, b in header.parts if data[a + 4 : a + 8] == b"IDAT")
    if inflate(b"".join(codes), needed)[0] < needed:
        raise ImageFault("the file is truncated (its data end before the last row)")


def check_palette(image: Image.Image) -> None:
    """Raise ImageFault where pixels have colours that the palette does not have, which decoders
    make up."""
    if image.mode == "P" and image.palette is not None:
        colours = len(image.palette.palette) // len(image.palette.mode)
        if np.asarray(image).max() >= colours:
            raise ImageFault(f"damaged: it has pixels beyond the {colours} colours of its palette")


def _check_frames(kind: str, frames: int) -> None:
    if frames != 1:
        what = "pages" if kind == "TIFF" else "frames"
        raise ImageFault(
            f"a {kind} of {frames} {what}; write the one that is meant, or each, to a file of its "
            "own" if frames else f"a {kind} without a picture"
        )  # fmt: skip


def _check_covered(kind: str, picture: tuple[int, int], canvas: tuple[int, int]) -> None:
    """Raise ImageFault where the one picture is smaller than its canvas, for whose
    rest a decoder has no pixels."""
    if picture[0] < canvas[0] or picture[1] < canvas[1]:
        raise ImageFault(
            f"a {kind} whose picture is {picture[0]}x{picture[1]} pixels on a canvas of "
            f"{canvas[0]}x{canvas[1]}; save the picture to a file of its own"
        )

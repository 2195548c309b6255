"""Which image files are accepted, and what pixels they stand for: one rule for all.

Sharding, adopting, verifying and training ask `read_header`, which decides from the file's bytes
and decodes nothing; its name never counts. `decode` gives the pixels, 8-bit grey or RGB, or says
why not. What cannot be turned into these without a guess (16 bits, transparency) is refused unless
a `Conversion` says how.
"""

from __future__ import annotations

from shard_tools.image_file.header import Header, ImageFault
from shard_tools.image_file.jpeg import SOI, read_jpeg
from shard_tools.image_file.markers import CAN_CUT, GROWTH, cut
from shard_tools.image_file.others import PNG, read_gif, read_other, read_png
from shard_tools.image_file.pieces import cut_out, find_pieces, whole
from shard_tools.image_file.pixels import REFUSE, Conversion, decode, orientation, refuse_guesses
from shard_tools.image_file.sound import sound_until, walk_ahead, warning_of

__all__ = [
    "CAN_CUT", "GROWTH", "Conversion", "Header", "ImageFault", "cut", "cut_out", "decode",
    "find_pieces", "orientation", "read_header", "sound_until", "walk_ahead", "warning_of", "whole",
]  # fmt: skip

_MAGIC = {
    b"BM": "BMP",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
    **{b"P%c" % kind: "PPM" for kind in b"123456f"},
}  # fmt: skip
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_FOREIGN = {
    **{(4, b"ftyp" + brand): "a HEIC image" for brand in _HEIC},
    **{(4, b"ftyp" + brand): "an AVIF image" for brand in (b"avif", b"avis")},
    (0, b"\0\0\0\x0cjP  "): "a JPEG 2000 image",
    (0, b"\xff\x4f\xff\x51"): "a JPEG 2000 image", (0, b"\xff\x0a"): "a JPEG XL image",
    (0, b"\0\0\0\x0cJXL "): "a JPEG XL image", (0, b"8BPS"): "a Photoshop file",
    (0, b"%PDF"): "a PDF file", (0, b"<svg"): "an SVG drawing", (0, b"\0\0\1\0"): "an icon (ICO)",
}  # fmt: skip
_POINTER = b"version https://git-lfs"


def read_header(data: bytes, conversion: Conversion = REFUSE, sound: int = -1) -> Header:
    """What the file declares. Raises ImageFault with the reason if it is not accepted.

    Nothing is decoded. For a PNG every checksum holds; a JPEG or GIF reaches its end marker.
    Values of more than 8 bits are refused unless `conversion` scales them; whether a transparent
    colour is used only `decode` can say. sound: `sound_until` of the file, if it is known.
    """
    if data[:2] == SOI:
        return read_jpeg(data, sound)
    header = _read(data)
    refuse_guesses(header, conversion)
    return header


def _read(data: bytes) -> Header:
    if data.startswith(PNG):
        return read_png(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return read_gif(data)
    kind = "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
    kind = kind or _MAGIC.get(data[:4]) or _MAGIC.get(data[:2])
    if kind:
        return read_other(data, kind)
    for (at, magic), name in _FOREIGN.items():
        if data[at : at + len(magic)] == magic:
            raise ImageFault(f"{name}; convert it to JPEG or PNG first")
    if data.startswith(_POINTER):
        raise ImageFault("a pointer of Git LFS in place of the image; git lfs pull fetches it")
    raise ImageFault("not an image in a known format" if data else "the file is empty")

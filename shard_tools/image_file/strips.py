"""What the strips and tiles of a TIFF hold, where libtiff would make something up in its place."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

from PIL import Image, _imaging

from shard_tools.image_file.header import ImageFault
from shard_tools.image_file.jpeg import read_jpeg
from shard_tools.image_file.others import inflate
from shard_tools.image_file.pillow import calling_pillow
from shard_tools.image_file.sound import sound_until, warning_of

# TIFF tags. The first of a pair is that of strips, the second that of tiles.
_OFFSETS, _LENGTHS = (273, 324), (279, 325)
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_ROWS, _TABLES = 278, 322, 323, 347
_HEADER = 8  # bytes of the file before which no strip begins
_DEFLATE = ("tiff_adobe_deflate", "tiff_deflate")
_FAX = ("tiff_ccitt", "group3", "group4", "tiff_raw_16")
_LOCK = threading.Lock()
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


def check_strips(image: Image.Image, data: bytes) -> None:
    """Raise ImageFault where a strip or tile is damaged and libtiff does not say so: deflated data,
    whose checksum it does not look at, JPEGs that are cut, damaged or smaller than their place, the
    codes of a fax, and a place in the file's header."""
    if image.format != "TIFF":
        return
    compression = image.info.get("compression")
    tags = image.tag_v2  # type: ignore[attr-defined]
    with calling_pillow("TIFF"):
        offsets, lengths = (tags.get(a) or tags.get(b, ()) for a, b in (_OFFSETS, _LENGTHS))
        extents = [(int(a), int(b)) for a, b in zip(offsets, lengths, strict=True)]
    if any(length and offset < _HEADER for offset, length in extents):
        raise ImageFault("damaged: a strip or tile of it begins in the header of the file")
    pieces = [data[offset : offset + length] for offset, length in extents]
    if compression in _DEFLATE:
        for piece in pieces:
            if not inflate(piece)[1]:  # to its checksum
                raise ImageFault("the file is truncated (in its deflated data)")
    elif compression == "jpeg":
        _check_jpegs(pieces, list(_sides(image, len(pieces))), tags.get(_TABLES, b""))
    elif compression in _FAX and (fault := _fax_fault(data)):
        raise ImageFault(f"damaged: codes are wrong or missing (says libtiff's {fault})")


def _sides(image: Image.Image, count: int) -> Iterator[tuple[int, int]]:
    """Width of each of the strips or tiles, and how many of its rows are the picture's."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    width, height = image.size
    across = tags.get(_TILE_WIDTH, width)
    rows = tags.get(_TILE_ROWS) or min(tags.get(_ROWS_PER_STRIP, height), height)
    in_row = -(-width // across)
    in_plane = in_row * -(-height // rows)
    for number in range(count):
        yield across, min(rows, height - number % in_plane // in_row * rows)


def _check_jpegs(pieces: list[bytes], sides: list[tuple[int, int]], tables: bytes) -> None:
    """tables: a JPEG of the tables that the pieces share, or nothing."""
    for piece, (width, rows) in zip(pieces, sides, strict=True):
        whole = tables[:-2] + piece[2:] if tables else piece
        header = read_jpeg(whole)
        if header.width < width or header.height < rows:
            raise ImageFault(
                f"damaged: a strip or tile of {width}x{rows} pixels holds a JPEG of "
                f"{header.width}x{header.height}"
            )
        (sound,) = sound_until([whole])
        if sound < 0 and (warning := header.damage or warning_of(whole, header.channels)):
            raise ImageFault(f"damaged: {warning}")


def _fax_fault(data: bytes) -> str:
    """The function of libtiff that found a fault in the codes of a fax, or ""; libtiff reads on
    after most of them. It is called here beside Pillow, which does not listen to its warnings."""
    lib = ctypes.CDLL(_imaging.__file__)  # the libtiff that Pillow is linked to
    heard: list[str] = []
    hear = _HANDLER(lambda module, _, __: heard.append((module or b"").decode()))
    try:
        lib.TIFFFdOpen.restype = lib.TIFFSetErrorHandler.restype = ctypes.c_void_p
        lib.TIFFSetWarningHandler.restype = ctypes.c_void_p
    except AttributeError:
        raise ImageFault(
            "a TIFF compressed as a fax, whose faults this build of Pillow hides; save it as PNG"
        ) from None
    with _LOCK, _in_memory() as file:
        file.write(data)
        file.seek(0)  # which writes it too
        before = lib.TIFFSetErrorHandler(hear), lib.TIFFSetWarningHandler(hear)
        try:
            _read_all(lib, file.fileno())
        finally:
            lib.TIFFSetErrorHandler(ctypes.c_void_p(before[0]))
            lib.TIFFSetWarningHandler(ctypes.c_void_p(before[1]))
    return next((module for module in heard if module.startswith("Fax")), "")


def _in_memory() -> IO[bytes]:
    """A file of no disk, which may be full, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fax"), "w+b")
    return tempfile.TemporaryFile()


def _read_all(lib: ctypes.CDLL, number: int) -> None:
    """Decode all strips or tiles of the open file of this number."""
    tiff = ctypes.c_void_p(lib.TIFFFdOpen(os.dup(number), b"fax", b"r"))
    if not tiff:
        return  # Pillow says why
    kind = "Tile" if lib.TIFFIsTiled(tiff) else "Strip"
    size, read = lib[f"TIFF{kind}Size"], lib[f"TIFFReadEncoded{kind}"]
    size.restype = ctypes.c_ssize_t
    buffer = ctypes.create_string_buffer(max(1, size(tiff)))
    for piece in range(lib[f"TIFFNumberOf{kind}s"](tiff)):
        read(tiff, piece, buffer, ctypes.c_ssize_t(-1))
    lib.TIFFClose(tiff)

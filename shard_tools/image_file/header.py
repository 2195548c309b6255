"""What an image file declares, and the limits that every reader of images keeps to."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
MAX_SIDE = 65_500  # of libjpeg, which also writes what is converted


class ImageFault(UserError):
    """An image that cannot be used; the text is the reason, without the file name."""


@dataclass(frozen=True)
class Header:
    """What a file declares.

    format: Pillow's name (JPEG also for MPO). width, height: in pixels. channels: values per pixel
    (1 with a palette), of `bits` bits and of the kind `number` (unsigned, signed, float). alpha:
    there is an alpha channel or a transparent colour. plain: a JPEG as cameras and libraries write
    it, on which every libjpeg agrees. parts: the slices of the file that the picture depends on
    (empty: all of it). damage: what is known to be lacking, though it can be decoded. exif: the
    content of a PNG's eXIf chunk.
    """

    format: str
    width: int
    height: int
    channels: int = 3
    bits: int = 8
    number: str = "unsigned"
    alpha: bool = False
    parts: tuple[tuple[int, int], ...] = ()
    plain: bool = False
    damage: str = ""
    exif: bytes = b""

    @property
    def deep(self) -> bool:
        """True where 8 bits cannot hold its values."""
        return self.bits > 8 or self.number != "unsigned"


def check_size(width: int, height: int) -> None:
    """Raise ImageFault for a picture without pixels or with too many."""
    if width < 1 or height < 1:
        raise ImageFault(f"declares {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise ImageFault(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")
    if max(width, height) > MAX_SIDE:
        raise ImageFault(f"{width}x{height} pixels: a side is longer than the limit of {MAX_SIDE}")

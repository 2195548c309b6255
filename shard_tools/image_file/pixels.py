"""Strict decoding, and the one conversion to 8-bit grey or RGB."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from shard_tools.image_file.header import Header, ImageFault
from shard_tools.image_file.others import check_palette, check_rows
from shard_tools.image_file.pillow import calling_pillow
from shard_tools.image_file.strips import check_strips

_ORIENTATION = 0x0112  # EXIF tag
_ORIENTATION_IN_JPEG = (b"Exif", b"tiff:Orientation")  # what Pillow looks for, in EXIF and XMP
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_FULL_BITS = 16  # unsigned values of up to this many bits have a full range


@dataclass(frozen=True)
class Conversion:
    """What the user asked for where 8-bit RGB does not follow from the file. None: refuse it.

    gray16: values of more than 8 bits become 8 bits, by their full range (0 … 2^bits - 1) or by the
    smallest and largest value of each image (fit). alpha: transparent pixels keep the colour that
    is under them (drop), or are laid over white or black.
    """

    gray16: Literal["full", "fit"] | None = None
    alpha: Literal["drop", "white", "black"] | None = None


REFUSE = Conversion()


def refuse_guesses(header: Header, conversion: Conversion) -> None:
    """Raise ImageFault for a header whose values have no 8-bit form that `conversion` names."""
    if not header.deep:
        return
    kind = f"{header.bits} bits per value ({header.number})"
    if conversion.gray16 is None:
        raise ImageFault(
            f"{kind}; make_shards.py --gray16 full (by the full range) or fit (by the range of "
            "each image) makes 8 bits of them"
        )
    if header.channels > 1 and (conversion.gray16 == "fit" or header.bits != 16):
        raise ImageFault(f"{kind} in {header.channels} channels; convert it to 8 bits first")
    if conversion.gray16 == "full" and (header.bits > _FULL_BITS or header.number != "unsigned"):
        raise ImageFault(f"{kind} have no full range; --gray16 fit, or convert it to 8 bits first")
    if header.channels in (1, 3) and header.alpha and conversion.alpha != "drop":
        raise ImageFault(f"{kind} with transparency; --alpha drop, or convert it to 8 bits first")


def decode(data: bytes, header: Header, conversion: Conversion = REFUSE) -> Image.Image:
    """The whole picture, decoded once and strictly, as mode L or RGB. ImageFault where it cannot.

    Alpha that is opaque everywhere is dropped; CMYK becomes RGB by Pillow's formula. EXIF
    orientation is not applied, but a TIFF's is, by Pillow.
    """
    refuse_guesses(header, conversion)
    file = data
    if header.parts:  # what else the file holds can neither help nor disturb
        data = b"".join(file[start:end] for start, end in header.parts)
    with calling_pillow(header.format):
        image: Image.Image = Image.open(io.BytesIO(data), formats=(header.format,))
    check_strips(image, data)
    with calling_pillow(header.format):
        image.load()
    if header.format == "PNG":
        check_rows(image, file, header)
    check_palette(image)
    if image.size != (header.width, header.height):
        raise ImageFault(f"declares {header.width}x{header.height} pixels and holds {image.size}")
    if header.deep and header.channels == 1:
        return _scaled(image, header, conversion)
    grey = image.mode in ("1", "L", "LA", "La")
    if header.format == "PNG" and image.mode == "L" and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2**header.bits - 1)  # Pillow scales the values only
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = _flat(image, header, conversion)
    with calling_pillow(header.format):
        return image.convert("L" if grey else "RGB")


def _scaled(image: Image.Image, header: Header, conversion: Conversion) -> Image.Image:
    """Deep grey values as 8 bits."""
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise ImageFault("holds values that are not finite")
    if header.number == "unsigned" and values.min() < 0:
        raise ImageFault("holds values of 2^31 and more, which Pillow cannot read")
    low, high = 0.0, float(2**header.bits - 1)
    if conversion.gray16 == "fit":
        low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255 / (high - low)) if high > low else values * 0
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))


def _flat(image: Image.Image, header: Header, conversion: Conversion) -> Image.Image:
    """The image as RGB, without its alpha channel or transparent colour."""
    with calling_pillow(header.format):
        full = image.convert("RGBA")
    opaque = np.asarray(full)[..., 3].min() == 255
    if not opaque and conversion.alpha is None:
        raise ImageFault(
            "has transparent pixels; lay it over a background first, or make_shards.py --alpha "
            "white, black or drop does"
        )
    if not opaque and conversion.alpha != "drop":
        full = Image.alpha_composite(Image.new("RGBA", full.size, conversion.alpha), full)
    return full.convert("RGB")


def orientation(data: bytes, header: Header) -> int:
    """The EXIF orientation that the file declares, 1 to 8 (1 = upright); nothing is decoded.

    1 for a TIFF, since Pillow applies its orientation as it decodes, and where the EXIF data are
    damaged.
    """
    if header.format == "TIFF":
        return 1
    if header.format == "JPEG":
        scan, _ = header.parts[-1]
        if not any(data.find(words, 0, scan) >= 0 for words in _ORIENTATION_IN_JPEG):
            return 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=(header.format,))
            if header.exif:
                image.info["exif"] = header.exif
            # The method of the base class: that of a PNG would decode it, and hide its faults.
            value = Image.Image.getexif(image).get(_ORIENTATION, 1)
        except Exception:  # damaged EXIF says nothing; every parser error is possible here
            return 1
    return value if value in range(1, 9) else 1

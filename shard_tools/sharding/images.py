"""Look at the content of an image file: what it is, whether it is complete, what must change.

What is accepted is decided in shard_tools/image_file. JPEGs in RGB or grey pass unchanged; PNG, GIF
and other formats and CMYK JPEGs become JPEGs. EXIF orientation is recorded and not applied, as
torchvision's ImageFolder does; an image that is re-encoded keeps it in its EXIF data.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace

from PIL import Image

from shard_tools.image_file import (
    Conversion,
    Header,
    cut,
    decode,
    orientation,
    read_header,
    sound_until,
    warning_of,
)

QUALITY = 95  # of a JPEG that has to be re-encoded and for which no quality is asked
_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class ImageSettings:
    """What is done to every image. None = off.

    resize_shorter, max_side: upper limits of the shorter and longer side in pixels; smaller images
        are never enlarged. quality: re-encode every image as JPEG of this quality.
    check: "decode" runs every entropy-coded byte through the decoder, "headers" reads the headers
        of JPEGs and looks for their end only.
    conversion: what becomes of values of more than 8 bits and of transparent pixels.
    restart_markers: put restart markers into the rows of each JPEG that can be cut by them.
    """

    resize_shorter: int | None = None
    max_side: int | None = None
    quality: int | None = None
    check: str = "decode"
    conversion: Conversion = field(default_factory=Conversion)
    restart_markers: bool = False

    @property
    def changes_size(self) -> bool:
        """True where files may get much smaller than their source."""
        return any((self.resize_shorter, self.max_side, self.quality))


@dataclass(frozen=True)
class CheckedImage:
    """A JPEG ready to be stored, its size in pixels, the EXIF orientation its source declared
    (1 = upright), and what was converted or found (empty = pixels unchanged and sound).

    interval: MCUs between its restart markers, 0 = none or not looked for; markers: "" where they
    were not asked for, "added", or why it stays as it is."""

    data: bytes
    width: int
    height: int
    orientation: int = 1
    converted: str = ""
    damage: str = ""
    interval: int = 0
    markers: str = ""


def check_image(data: bytes, settings: ImageSettings, sound: int | None = None) -> CheckedImage:
    """Check one file and convert it where needed. Raises ImageFault with the reason.

    sound: `sound_until` of the file, where it is known.
    """
    if settings.check != "decode":
        sound = -1
    elif sound is None:
        (sound,) = sound_until([data])
    image = _checked(data, settings, sound)
    if not settings.restart_markers:
        return image
    made = cut(image.data)
    return replace(image, data=made.data, interval=made.interval, markers=made.reason or "added")


def _checked(data: bytes, settings: ImageSettings, sound: int) -> CheckedImage:
    header = read_header(data, settings.conversion, sound)
    is_jpeg = header.format == "JPEG"
    scale = _scale((header.width, header.height), settings)
    reasons = []
    if not is_jpeg:
        reasons.append(f"{header.format} to JPEG")
    elif header.channels == 4:
        reasons.append("CMYK to RGB")
    if scale < 1:
        reasons.append("resized")
    if settings.quality and not reasons:
        reasons.append("re-encoded")
    check = is_jpeg and settings.check == "decode"
    damage = _jpeg_warning(data, header, sound) if check else ""
    if is_jpeg and not reasons:
        if check and (damage or not header.plain):
            decode(data, header)  # as in training, Pillow has the last word
        turned = orientation(data, header)
        return CheckedImage(data, header.width, header.height, turned, "", damage)
    picture = decode(data, header, settings.conversion)
    turned = orientation(data, header)
    encoded, size = _encode(picture, scale, settings.quality or QUALITY, turned)
    reasons += _remarks(header, settings.conversion)
    return CheckedImage(encoded, *size, turned, ", ".join(reasons), damage)


def _remarks(header: Header, conversion: Conversion) -> list[str]:
    """What was converted as the user asked."""
    deep = [f"{header.bits} to 8 bits ({conversion.gray16})"] if header.deep else []
    return deep + ([f"alpha ({conversion.alpha})"] if header.alpha and conversion.alpha else [])


def probe(data: bytes) -> tuple[str, int, int, int]:
    """(format as in manifest.FORMATS, width, height, EXIF orientation) from the headers alone.

    Raises ImageFault for what `check_image` refuses by default, as far as headers tell; an image
    with alpha is decoded, since only its pixels say whether any is transparent.
    """
    header = read_header(data)
    if header.alpha:
        decode(data, header)
    kind = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}.get(header.format, "other")
    return kind, header.width, header.height, orientation(data, header)


def decode_fully(data: bytes, sound: int) -> str:
    """Run every byte of an image through its decoder; returns libjpeg's warning or "".

    sound: `sound_until` of it. Raises ImageFault where training could not load it.
    """
    header = read_header(data, sound=sound)
    warning = _jpeg_warning(data, header, sound)
    if warning or not (header.format == "JPEG" and header.plain):
        decode(data, header)
    return warning


def _jpeg_warning(data: bytes, header: Header, sound: int) -> str:
    """What its scans lack or libjpeg warns of (of a plain JPEG), or "". sound: see sound_until."""
    if not header.plain:
        return header.damage
    return "" if sound >= 0 else warning_of(data, header.channels)


def _scale(size: tuple[int, int], settings: ImageSettings) -> float:
    """Factor to both limits, at most 1."""
    shorter = (settings.resize_shorter or min(size)) / min(size)
    return min(1.0, shorter, (settings.max_side or max(size)) / max(size))


def _encode(
    image: Image.Image, scale: float, quality: int, turned: int
) -> tuple[bytes, tuple[int, int]]:
    """JPEG bytes and size of `image` scaled by `scale` (antialiased bicubic), with its EXIF
    orientation, so that whoever applies it sees what the source showed."""
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if turned != 1:
        exif[_ORIENTATION] = turned
    buffer = io.BytesIO()
    subsampling = 0 if quality >= QUALITY else 2
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
    return buffer.getvalue(), image.size

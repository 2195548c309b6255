"""Look at the content of an image file: what it is, whether it is whole, what must change.

A file is judged by its bytes, never by its name. JPEGs in RGB or grey pass unchanged; PNG, GIF
and other formats and CMYK JPEGs become JPEGs. EXIF orientation is recorded and not applied, as
torchvision's ImageFolder does.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import simplejpeg
from PIL import Image, UnidentifiedImageError, features

from pipeline.errors import UserError

# Only these decoders of Pillow are ever tried on a file (its JPEG one also opens MPO).
READABLE = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF")
QUALITY = 95  # of a JPEG that has to be re-encoded and for which no quality is asked
_GREY = ("1", "L", "LA", "La")
_EXIF_ORIENTATION = 0x0112


class ImageFault(UserError):
    """An image that cannot be used; the text is the reason, without the file name."""


@dataclass(frozen=True)
class ImageSettings:
    """What is done to every image. None = off.

    resize_shorter, max_side: upper limits of the shorter and longer side in pixels; smaller images
        are never enlarged. quality: re-encode every image as JPEG of this quality.
    check: "decode" runs every entropy-coded byte through the decoder, "headers" reads headers and
        looks for the end-of-image marker only.
    """

    resize_shorter: int | None = None
    max_side: int | None = None
    quality: int | None = None
    check: str = "decode"

    @property
    def changes_size(self) -> bool:
        """True where files may get much smaller than their source."""
        return any((self.resize_shorter, self.max_side, self.quality))


@dataclass(frozen=True)
class CheckedImage:
    """A JPEG ready to be stored, its size in pixels, the EXIF orientation its source declared
    (1 = upright), and what was converted or found (empty = bytes unchanged and sound)."""

    data: bytes
    width: int
    height: int
    orientation: int = 1
    converted: str = ""
    damage: str = ""


def check_image(data: bytes, settings: ImageSettings) -> CheckedImage:
    """Check one file and convert it where needed. Raises ImageFault with the reason."""
    if not data:
        raise ImageFault("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on EXIF; its errors are still raised
        try:
            image = Image.open(io.BytesIO(data), formats=READABLE)
            return _check(data, image, settings)
        except UnidentifiedImageError:
            raise ImageFault(_unidentified(data)) from None
        except ImageFault:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ImageFault(_first_line(error)) from error


def probe(data: bytes) -> tuple[str, int, int, int]:
    """(format as in manifest.FORMATS, width, height, EXIF orientation) from the headers alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=READABLE)
        except UnidentifiedImageError:
            raise ImageFault(_unidentified(data)) from None
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ImageFault(_first_line(error)) from error
        kind = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
        return kind.get(image.format or "", "other"), *image.size, _orientation(image)


def decode_fully(data: bytes) -> str:
    """Run every byte of an image through its decoder; returns libjpeg's warning or "".

    Raises what Pillow raises (of any kind) where it, and so torchvision, could not load it.
    """
    if data[:2] != b"\xff\xd8":
        Image.open(io.BytesIO(data), formats=READABLE).load()
        return ""
    try:  # entropy decoding is complete at 1/8 size too, and only warnings are fatal here
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8)
        return ""
    except ValueError as warning:
        Image.open(io.BytesIO(data), formats=READABLE).load()
        return str(warning)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _unidentified(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and not features.check("webp"):
        return "a WebP image, which this build of Pillow cannot read"
    return "not an image in a known format"


def _check(data: bytes, image: Image.Image, settings: ImageSettings) -> CheckedImage:
    orientation = _orientation(image)
    is_jpeg = image.format in ("JPEG", "MPO")
    scale = _scale(image.size, settings)
    reasons = []
    if not is_jpeg:
        reasons.append(f"{image.format} to JPEG")
    elif image.mode not in ("L", "RGB"):
        reasons.append(f"{image.mode} to RGB")
    if scale < 1:
        reasons.append("resized")
    if settings.quality and not reasons:
        reasons.append("re-encoded")
    damage = ""
    if is_jpeg:
        damage = _check_jpeg(data, settings.check)
    if not reasons:
        return CheckedImage(data, *image.size, orientation, "", damage)
    encoded, size = _encode(image, scale, settings.quality or QUALITY)
    return CheckedImage(encoded, *size, orientation, ", ".join(reasons), damage)


def _check_jpeg(data: bytes, check: str) -> str:
    """Libjpeg's warning or ""; raises ImageFault for a cut file, OSError for a broken one."""
    # Some encoders pad with zeros after the end-of-image marker.
    if data[-2:] != b"\xff\xd9" and b"\xff\xd9" not in data[-4096:]:
        raise ImageFault("the file is truncated (no end-of-image marker)")
    return decode_fully(data) if check == "decode" else ""


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format not in ("TIFF", "WEBP", "PNG"):
        return 1
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing; every parser error is possible here
        return 1
    return value if value in range(1, 9) else 1


def _scale(size: tuple[int, int], settings: ImageSettings) -> float:
    """Factor to both limits, at most 1."""
    shorter = (settings.resize_shorter or min(size)) / min(size)
    return min(1.0, shorter, (settings.max_side or max(size)) / max(size))


def _encode(image: Image.Image, scale: float, quality: int) -> tuple[bytes, tuple[int, int]]:
    """JPEG bytes and size of `image` scaled by `scale` (antialiased bicubic)."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 bit per value
        image = image.convert("F").point(lambda value: value / 257).convert("L")
    elif image.mode in _GREY:
        image = image.convert("L")
    else:
        image = image.convert("RGB")  # drops alpha, as torchvision's loader does
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= QUALITY else 2)
    return buffer.getvalue(), image.size

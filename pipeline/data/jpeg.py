"""Image bytes → one uint8 crop: decode, crop, antialiased resize and flip.

Three decoders give the same picture (bicubic as Pillow's, which is the reference):

    jpegcrop    a small C extension over libjpeg-turbo that decodes only the crop (built at set-up)
    simplejpeg  libjpeg-turbo from a wheel, then torch's uint8 antialiased resize
    pillow      Pillow alone

Pillow has the last word: whatever a faster path refuses (PNG bytes, CMYK, a damaged file) goes
through Pillow, which decodes it or gives the reason.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from pipeline.data.crops import Choose
from pipeline.errors import UserError

try:  # built at set-up where a compiler and libjpeg-turbo's headers are
    from pipeline.data import _jpegcrop
except ImportError:
    _jpegcrop = None  # type: ignore[assignment]
try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None  # type: ignore[assignment,unused-ignore]

JPEG = b"\xff\xd8"  # how each JPEG file begins
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
MAX_SCANS = 500  # of one JPEG, against bombs of another kind; the extension has the same limit
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class DecodeError(UserError):
    """Image bytes that cannot be turned into pixels, in one sentence."""


# (bytes, choose, output uint8 [S, S, 3], interpolation)
Decode = Callable[[bytes, Choose, np.ndarray, str], None]


def decode_pillow(data: bytes, choose: Choose, out: np.ndarray, interpolation: str) -> None:
    """Decode `data` (any format that Pillow reads), write the chosen crop into `out`.

    out: uint8 [S, S, 3]. Raises DecodeError.
    """
    _check_scans(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            _check_pixels(width, height)
            picture = image.convert("RGB")
    except DecodeError:
        raise
    except Exception as error:  # each of Pillow's plugins raises what it likes
        reason = str(error).split("\n")[0]
        if "cannot identify image file" in reason:
            reason = "not an image of a known format"
        raise DecodeError(reason or type(error).__name__) from error
    box, flip = choose(width, height)
    corners: tuple[float, float, float, float] | None
    corners = (box.left, box.top, box.right, box.bottom)
    if box.inside:
        picture, corners = picture.crop(corners), None
    pixels = np.asarray(picture.resize(out.shape[1::-1], _FILTERS[interpolation], corners))
    out[...] = pixels[:, ::-1] if flip else pixels


def decode_jpegcrop(data: bytes, choose: Choose, out: np.ndarray, interpolation: str) -> None:
    """As decode_pillow, by the C extension; ValueError for what it does not take."""
    try:
        width, height = _jpegcrop.size(data)
        _check_pixels(width, height)
        box, flip = choose(width, height)
        corners = (box.left, box.top, box.right, box.bottom)
        cubic = interpolation == "bicubic"
        _jpegcrop.decode(data, out, out.shape[0], *corners, box.inside, flip, cubic)
    except OverflowError as error:
        raise DecodeError(str(error)) from error


def decode_simplejpeg(data: bytes, choose: Choose, out: np.ndarray, interpolation: str) -> None:
    """As decode_pillow, by simplejpeg and torch; ValueError for what simplejpeg does not take."""
    _check_scans(data)
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(width, height)
    if colours not in ("YCbCr", "Gray", "RGB"):
        raise ValueError(f"colour space {colours}")
    box, flip = choose(width, height)
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    if box.inside:
        pixels = pixels[:, int(box.top) : int(box.bottom), int(box.left) : int(box.right)]
        size, left, top = (out.shape[0], out.shape[1]), 0, 0
    else:
        x, y = out.shape[1] / (box.right - box.left), out.shape[0] / (box.bottom - box.top)
        size, left, top = (
            (round(height * y), round(width * x)),
            round(box.left * x),
            round(box.top * y),
        )
    resized = torch.nn.functional.interpolate(
        pixels[None], size, mode=interpolation, antialias=True, align_corners=False
    )[0]
    resized = resized[:, top : top + out.shape[0], left : left + out.shape[1]].permute(1, 2, 0)
    out[...] = resized.numpy()[:, ::-1] if flip else resized.numpy()


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")


def _check_scans(data: bytes) -> None:
    # 0xFF is escaped inside a scan, so this counts start-of-scan markers.
    if data[:2] == JPEG and data.count(b"\xff\xda") > MAX_SCANS:
        raise DecodeError(f"more than {MAX_SCANS} scans")


def _with_last_word(fast: Decode) -> Decode:
    def decode(data: bytes, choose: Choose, out: np.ndarray, interpolation: str) -> None:
        try:
            if data[:2] == JPEG:
                fast(data, choose, out, interpolation)
                return
        except DecodeError:
            raise
        except ValueError:
            pass  # not for the fast path; Pillow decodes it or says why not
        decode_pillow(data, choose, out, interpolation)

    return decode


_FUNCTIONS: dict[str, Decode] = {"pillow": decode_pillow}
if simplejpeg is not None:
    _FUNCTIONS = {"simplejpeg": _with_last_word(decode_simplejpeg), **_FUNCTIONS}
if _jpegcrop is not None:
    _FUNCTIONS = {"jpegcrop": _with_last_word(decode_jpegcrop), **_FUNCTIONS}


def available() -> tuple[str, ...]:
    """Names of the decoders that work here, fastest first."""
    return tuple(_FUNCTIONS)


def decoder(name: str = "auto") -> tuple[str, Decode]:
    """The name and function of decoder `name`, or of the fastest one that works here.

    The function writes the chosen crop into a uint8 [S, S, 3] array or raises DecodeError.
    """
    name = available()[0] if name == "auto" else name
    if name not in _FUNCTIONS:
        raise UserError(
            f"decoder {name!r} is not available here: use auto or one of {', '.join(_FUNCTIONS)}"
        )
    return name, _FUNCTIONS[name]

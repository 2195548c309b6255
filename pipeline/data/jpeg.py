"""Image bytes → one uint8 crop: decode, crop, antialiased resize and flip.

Three decoders give the same picture (bicubic as Pillow's, which is the reference):

    jpegcrop    a small C extension over libjpeg-turbo that decodes only the crop (built at set-up)
    simplejpeg  libjpeg-turbo from a wheel, then torch's uint8 antialiased resize
    pillow      Pillow alone

Which files are accepted is decided before any of them sees the file, in shard_tools/image_file.
The fast ones get plain JPEGs only; the rest, and what they refuse, goes through Pillow, which has
the last word.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from pipeline.data.crops import Box, Choose
from pipeline.errors import UserError
from shard_tools.image_file import (
    Header,
    ImageFault,
    cut_out,
    decode,
    find_pieces,
    read_header,
    whole,
)

try:  # built at set-up where a compiler and libjpeg-turbo's headers are
    from pipeline.data import _jpegcrop
except ImportError:
    _jpegcrop = None  # type: ignore[assignment]
try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None  # type: ignore[assignment,unused-ignore]

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# An extension that was built before it had this function still decodes.
CAN_READ_MANY = hasattr(_jpegcrop, "decode_many")
DecodeError = ImageFault  # what a Decode raises: bytes that cannot be turned into pixels

# (bytes, choose, output uint8 [S, S, 3], interpolation)
Decode = Callable[[bytes, Choose, np.ndarray, str], None]
# The same once the crop is chosen; ValueError for a JPEG that it does not take.
_Fast = Callable[[bytes, Header, Box, bool, np.ndarray, str], None]


def _decoding(fast: _Fast | None) -> Decode:
    """A decoder that asks `fast` for plain JPEGs first, and Pillow for all else."""

    def decode_crop(data: bytes, choose: Choose, out: np.ndarray, interpolation: str) -> None:
        header = read_header(data)
        box, flip = choose(header.width, header.height)
        if fast is not None and header.plain and header.channels != 4:  # not CMYK
            try:
                fast(data, header, box, flip, out, interpolation)
                return
            except ValueError:
                pass  # damaged; Pillow decodes it or says why not
        _by_pillow(data, header, box, flip, out, interpolation)

    return decode_crop


def _by_pillow(
    data: bytes, header: Header, box: Box, flip: bool, out: np.ndarray, interpolation: str
) -> None:
    picture = decode(data, header).convert("RGB")
    corners: tuple[float, float, float, float] | None
    corners = (box.left, box.top, box.right, box.bottom)
    if box.inside:
        picture, corners = picture.crop(corners), None
    pixels = np.asarray(picture.resize(out.shape[1::-1], _FILTERS[interpolation], corners))
    out[...] = pixels[:, ::-1] if flip else pixels


def _by_jpegcrop(
    data: bytes, header: Header, box: Box, flip: bool, out: np.ndarray, interpolation: str
) -> None:
    corners = (box.left, box.top, box.right, box.bottom)
    cubic = interpolation == "bicubic"
    _jpegcrop.decode(data, out, out.shape[0], *corners, box.inside, flip, cubic)


def read_many(files: np.ndarray, buffer: bytearray) -> None:
    """Read files into a buffer; see _jpegcrop.read_many. Needs the decoder jpegcrop."""
    _jpegcrop.read_many(files, buffer)


def decode_many(
    files: np.ndarray, buffer: bytearray, boxes: np.ndarray, out: np.ndarray, interpolation: str
) -> np.ndarray:
    """Decode what read_many read into `out`, uint8 [b, S, S, 3]; bool [b], false where another
    decoder has to be asked. boxes: float64 [b, 6], left, top, right, bottom, inside, flip."""
    done = np.zeros(len(files), np.uint8)
    cubic = interpolation == "bicubic"
    _jpegcrop.decode_many(files, buffer, boxes, out, done, out.shape[1], cubic)
    return done.astype(np.bool_)


def _pixels(data: bytes, width: int, height: int) -> torch.Tensor:
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    if pixels.shape[1:] != (height, width):
        raise ValueError("another size than its header declares")
    return pixels


def _inside(data: bytes, header: Header, box: Box) -> torch.Tensor:
    """The pixels of a box, decoded out of as little of the file as its restart markers allow."""
    left, top, right, bottom = map(int, (box.left, box.top, box.right, box.bottom))
    pieces = find_pieces(data, header)
    part = cut_out(data, pieces, left, top, right, bottom) if pieces else whole(data, header)
    pixels = _pixels(part.data, part.width, part.height)
    return pixels[:, top - part.top : bottom - part.top, left - part.left : right - part.left]


def _by_simplejpeg(
    data: bytes, header: Header, box: Box, flip: bool, out: np.ndarray, interpolation: str
) -> None:
    if box.inside:
        pixels = _inside(data, header, box)
        size, left, top = (out.shape[0], out.shape[1]), 0, 0
    else:
        pixels = _pixels(data, header.width, header.height)
        height, width = pixels.shape[1:]
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


_FUNCTIONS: dict[str, Decode] = {"pillow": _decoding(None)}
if simplejpeg is not None:
    _FUNCTIONS = {"simplejpeg": _decoding(_by_simplejpeg), **_FUNCTIONS}
if _jpegcrop is not None:
    _FUNCTIONS = {"jpegcrop": _decoding(_by_jpegcrop), **_FUNCTIONS}


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

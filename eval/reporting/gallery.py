"""A page of pictures that needs no network: rows of small ones, or large sheets that scroll."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from eval.reporting.page import render


@dataclass(frozen=True)
class Tile:
    """A picture as a data URI, its size in pixels, what it shows, a number before that, and
    whether the others are compared with it."""

    data: str
    width: int
    height: int
    caption: str
    value: str = ""
    query: bool = False


@dataclass(frozen=True)
class Section:
    """Pictures under a title; sheet: wide ones below each other instead of small ones in a row."""

    title: str
    tiles: tuple[Tile, ...]
    texts: tuple[str, ...] = ()
    sheet: bool = False


def tile(picture: Image.Image, caption: str, value: str, query: bool = False) -> Tile:
    """A photograph as a JPEG in the page."""
    return _tile(picture, "jpeg", caption, value, query)


def sheet(picture: Image.Image, caption: str) -> Tile:
    """A drawing, pixel for pixel."""
    return _tile(picture, "png", caption)


def _tile(
    picture: Image.Image, kind: str, caption: str, value: str = "", query: bool = False
) -> Tile:
    data = f"data:image/{kind};base64," + base64.b64encode(encoded(picture, kind)).decode()
    return Tile(data, picture.width, picture.height, caption, value, query)


def encoded(picture: Image.Image, kind: str) -> bytes:
    """A picture as a file: jpeg, of quality 85, or png."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return buffer.getvalue()


def render_gallery(title: str, texts: Sequence[str], sections: Sequence[Section]) -> str:
    """The page as one string; bytes of file names that are no UTF-8 become escapes."""
    page = render("gallery.html", title=title, texts=texts, sections=sections)
    return page.encode("utf-8", "backslashreplace").decode()

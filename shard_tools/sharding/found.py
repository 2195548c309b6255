"""Images as they are found, before they have labels, and what is known to be missing."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pipeline.errors import UserError

# torchvision's IMG_EXTENSIONS, and GIF; other files are left out and reported.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    ".gif",
)
SYNSET = re.compile(r"n\d{8}")
# Folders that systems and programs leave behind.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information")


class Image(NamedTuple):
    """One image: its name (`class/file`, or `file`), and its bytes in a file."""

    name: str
    file: str
    offset: int
    size: int


@dataclass
class Found:
    """images; (name, reason) of what was left out because it is no image, and of images that are
    known to be missing; class folders and class tars, also those of which every image is missing.
    """

    images: list[Image] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)

    @contextmanager
    def catching(self, name: str, skip: bool) -> Iterator[None]:
        """With `skip`, a UserError inside becomes a line of `missing`."""
        try:
            yield
        except UserError as error:
            if not skip:
                raise
            self.missing.append((name, str(error)))

    def extend(self, other: Found) -> None:
        self.images += other.images
        self.ignored += other.ignored
        self.missing += other.missing
        self.classes |= other.classes

    def inside(self, folder: str) -> Found:
        """The same as the class `folder`, with all names below it."""
        return Found(
            [image._replace(name=f"{folder}/{image.name}") for image in self.images],
            [(f"{folder}/{name}", reason) for name, reason in self.ignored],
            [(f"{folder}/{name}", reason) for name, reason in self.missing],
            {folder},
        )

    def without_wrapping(self, *, keep_class: bool = True) -> Found:
        """The same without the leading folders that all images are in; a synset stays, since an
        archive of one class has it above all its images (`keep_class`)."""
        names = [posixpath.normpath(image.name).lstrip("/") for image in self.images]
        common = _common_folders(names)
        if common and keep_class and SYNSET.fullmatch(common[-1]):
            common = common[:-1]
        cut = sum(len(part) + 1 for part in common)
        images = [
            image._replace(name=name[cut:]) for image, name in zip(self.images, names, strict=True)
        ]
        return replace(self, images=images)


def _common_folders(names: list[str]) -> list[str]:
    """The leading folders that all names share."""
    if not names:
        return []
    first, last = (name.split("/")[:-1] for name in (min(names), max(names)))
    shared = []
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        shared.append(a)
    return shared


def is_image(name: str) -> bool:
    """True for a file that is an image by its name, and no leftover of a system."""
    return name.lower().endswith(EXTENSIONS) and not is_system_file(name)


def is_system_file(name: str) -> bool:
    """True below a hidden or system folder, and for macOS's `._name` files."""
    *folders, base = posixpath.normpath(name).split("/")
    return base.startswith("._") or any(map(is_system_folder, folders))


def is_system_folder(name: str) -> bool:
    """True for folders that are no part of a data set: hidden ones, @eaDir, lost+found, …"""
    return name not in (".", "..") and (name.startswith(".") or name.lower() in _SYSTEM_FOLDERS)

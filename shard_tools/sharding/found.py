"""Images as they are found, before they have labels, and what is known to be missing."""

from __future__ import annotations

import posixpath
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, overload

import numpy as np

from pipeline.errors import UserError
from shard_tools.cli import ToolError
from shard_tools.members import plain_name
from shard_tools.texts import Texts

# torchvision's IMG_EXTENSIONS, and others of the same formats; other files are left out and
# reported.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".jfif", ".jpe", ".pbm", ".pnm"),
)
# Images in formats that are not read, which may not be left out without a word; what is called so
# is often a JPEG.
_FOREIGN = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k")
LONGEST_IMAGE = 1 << 30  # bytes; it is read into memory at once
# What a training set and a held-out one are called.
TRAINING = {"train", "training"}
HELD_OUT = {"val", "valid", "validation", "test", "testing"}
SYNSET = re.compile(r"n\d{8}")
# Folders that systems and programs leave behind.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information")


class Image(NamedTuple):
    """One image: its name (`class/file`, or `file`), and its bytes in a file."""

    name: str
    file: str
    offset: int
    size: int


class Images(Sequence[Image]):
    """A sequence of images that can only grow, in columns: 30 bytes each and their names, where
    tuples of Python objects take 300.

    Where the bytes of an image lie is the end of its name (from byte `files[i]` on), or one of the
    `places` (~files[i]), of which there are few: the archives.
    """

    names: Texts
    files: array[int] | np.ndarray
    offsets: array[int] | np.ndarray
    sizes: array[int] | np.ndarray

    def __init__(self, images: Iterable[Image] = ()) -> None:
        self.names = Texts()
        self.files, self.offsets, self.sizes = array("i"), array("q"), array("q")
        self.places: list[str] = []
        self._places: dict[str, int] = {}
        self.extend(images)

    def append(self, image: Image) -> None:
        name, file, offset, size = image
        skip = len(name) - len(file)
        if skip < 0 or (name[skip:] != file if skip else name != file):
            skip = self._places.setdefault(file, ~len(self.places))
            if ~skip == len(self.places):
                self.places.append(file)
        self.names.append(name)
        for column, value in ((self.files, skip), (self.offsets, offset), (self.sizes, size)):
            column.append(value)  # type: ignore[union-attr]

    def extend(self, images: Iterable[Image]) -> None:
        for image in images:
            self.append(image)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, number: int) -> Image: ...
    @overload
    def __getitem__(self, number: slice) -> list[Image]: ...
    def __getitem__(self, number: int | slice) -> Image | list[Image]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return self._image(self.names[number], number)

    def __iter__(self) -> Iterator[Image]:
        for number, name in enumerate(self.names):
            yield self._image(name, number)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Images) or len(self) != len(other):
            return NotImplemented
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _image(self, name: str, number: int) -> Image:
        skip = int(self.files[number])
        file = self.places[~skip] if skip < 0 else name[skip:]
        return Image(name, file, int(self.offsets[number]), int(self.sizes[number]))


class Skippable(ToolError):
    """A file that is missing or damaged, which --on-error skip leaves out."""


class Unskippable(ToolError):
    """What hinders the command and says nothing of a file, such as a full disk: --on-error skip
    does not take the file for damaged."""


@contextmanager
def naming_skip() -> Iterator[None]:
    """Says so in the error, for commands that have the option."""
    try:
        yield
    except Skippable as error:
        raise ToolError(f"{error}; --on-error skip leaves it out") from error


@dataclass
class Found:
    """images; (name, reason) of what was left out because it is no image, and of images that are
    known to be missing; class folders and class tars, also those of which every image is missing.
    """

    images: Images = field(default_factory=Images)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)

    @contextmanager
    def catching(self, name: str, skip: bool) -> Iterator[None]:
        """With `skip`, a UserError inside becomes a line of `missing`, but an Unskippable."""
        try:
            yield
        except Unskippable:
            raise
        except UserError as error:
            if not skip:
                raise Skippable(str(error)) from error
            self.missing.append((name, str(error)))

    def extend(self, other: Found) -> None:
        self.images.extend(other.images)
        self.ignored += other.ignored
        self.missing += other.missing
        self.classes |= other.classes

    def inside(self, folder: str) -> Found:
        """The same as the class `folder`, with all names below it."""
        return Found(
            Images(image._replace(name=f"{folder}/{image.name}") for image in self.images),
            [(f"{folder}/{name}", reason) for name, reason in self.ignored],
            [(f"{folder}/{name}", reason) for name, reason in self.missing],
            {folder},
        )

    def without_wrapping(self, *, keep_class: bool = True) -> Found:
        """The same without the leading folders that all images are in; a synset stays, since an
        archive of one class has it above all its images (`keep_class`)."""
        common = _common_folders(map(plain_name, self.images.names))
        if common and keep_class and SYNSET.fullmatch(common[-1]):
            common = common[:-1]
        cut = sum(len(part) + 1 for part in common)
        images = Images(image._replace(name=plain_name(image.name)[cut:]) for image in self.images)
        return replace(self, images=images)


def _common_folders(names: Iterable[str]) -> list[str]:
    """The leading folders that all names share."""
    first = last = next(iter(names), "")
    for name in names:
        first, last = min(first, name), max(last, name)
    shared = []
    for a, b in zip(first.split("/")[:-1], last.split("/")[:-1], strict=False):
        if a != b:
            break
        shared.append(a)
    return shared


def too_long(what: object, size: int) -> ToolError:
    """The error of an image of `size` bytes, which are more than LONGEST_IMAGE."""
    return ToolError(f"{what}: is {size} bytes long, the limit is {LONGEST_IMAGE}")


def is_image(name: str) -> bool:
    """True for a file that is an image by its name, and no leftover of a system."""
    return name.lower().endswith((*EXTENSIONS, *_FOREIGN)) and not is_system_file(name)


def is_system_file(name: str) -> bool:
    """True below a hidden or system folder, and for macOS's `._name` files."""
    *folders, base = posixpath.normpath(name).split("/")
    return base.startswith("._") or any(map(is_system_folder, folders))


def is_system_folder(name: str) -> bool:
    """True for folders that are no part of a data set: hidden ones, @eaDir, lost+found, …"""
    return name not in (".", "..") and (name.startswith(".") or name.lower() in _SYSTEM_FOLDERS)

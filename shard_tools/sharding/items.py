"""The images that a source has, with their labels; and those of a plan on the disk."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from pipeline.errors import naming
from shard_tools.cli import ToolError
from shard_tools.sharding.found import Image, Images
from shard_tools.texts import Texts


class Item(NamedTuple):
    """One image: its original name, class index (-1 = none), and its bytes in a file."""

    name: str
    label: int
    file: str  # relative to Source.root, or absolute
    offset: int
    size: int


class Items(Sequence[Item]):
    """Items in columns; labels: int32."""

    labels: array[int] | np.ndarray

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.images, self.labels = Images(), array("i")
        self.extend(items)

    @classmethod
    def labelled(cls, images: Images | Items, labels: Iterable[int]) -> Items:
        """The images, which are not copied, with these labels."""
        items = cls()
        items.images = images.images if isinstance(images, Items) else images
        items.labels = array("i", labels)
        assert len(items.labels) == len(items.images)
        return items

    @property
    def names(self) -> Texts:
        return self.images.names

    def append(self, item: Item) -> None:
        self.images.append(Image(item.name, item.file, item.offset, item.size))
        assert isinstance(self.labels, array)
        self.labels.append(item.label)

    def extend(self, items: Iterable[Item]) -> None:
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        name, file, offset, size = self.images[number]
        return Item(name, int(self.labels[number]), file, offset, size)

    def __iter__(self) -> Iterator[Item]:
        for (name, file, offset, size), label in zip(self.images, self.labels, strict=True):
            yield Item(name, int(label), file, offset, size)


def place_of(root: str, item: Item) -> str:
    """Where an item is, as errors say it: its file, and its name where that is an archive."""
    path = os.path.join(root, item.file)
    return f"{path}, {item.name}" if item.offset else path


def read_item(root: str, item: Item) -> bytes:
    """The bytes of one item; ToolError where the file is not what it was when it was listed."""
    path = os.path.join(root, item.file)
    with naming(path, "cannot be read"), open(path, "rb", buffering=0) as file:
        if item.offset:
            file.seek(item.offset)
        data = file.read(item.size) or b""
        while len(data) < item.size and (more := file.read(item.size - len(data))):
            data += more
    if len(data) != item.size:
        raise ToolError(f"{path}: changed since it was listed; start again")
    return data


def file_times(root: str, items: Iterable[Item]) -> str:
    """When the files that hold the items were last modified, as a digest: a file that is replaced
    has another time, though it may have the size of the old one."""
    times: dict[str, int] = {}
    digest = hashlib.sha256()
    for item in items:
        if item.file not in times:
            times[item.file] = modified_at(root, item.file)
        digest.update(b"%d " % times[item.file])
    return digest.hexdigest()


def modified_at(root: str, file: str, *, placed: bool = False) -> int:
    """When a file of an item was last modified, in nanoseconds; -1 where it cannot be said. placed:
    or put there with an older date (mv, cp -p), or given other rights, which looks alike."""
    try:
        about = os.stat(os.path.join(root, file))
    except OSError:  # whoever reads it says so
        return -1
    return max(about.st_mtime_ns, about.st_ctime_ns if placed else 0)

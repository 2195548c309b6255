"""The images that a source has, with their labels; and those of a plan on the disk."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

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

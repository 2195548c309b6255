"""A plan on the disk: what the processes and tasks of a sharding job map instead of listing again.

header   16 bytes: magic, bytes of the JSON
JSON     digest, root, classes, settings, starts, places, and the columns: [dtype, offset, count]
columns  of the items in shard order, each at a multiple of 64 bytes (see Images)
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from shard_tools.atomic import fsync
from shard_tools.cli import ToolError
from shard_tools.image_file import Conversion
from shard_tools.sharding.found import Images
from shard_tools.sharding.images import ImageSettings
from shard_tools.sharding.items import Item, Items
from shard_tools.sharding.layout import PARTS, Plan, Settings
from shard_tools.texts import Texts

PLAN_FILE = "plan.bin"
_MAGIC = b"RMIMPLAN"
_HEADER = struct.Struct("<8sQ")
_CHUNK = 1 << 12  # names that are copied at a time


@dataclass(frozen=True)
class StoredPlan:
    """A plan whose items are in `path`; otherwise as Plan."""

    path: Path
    root: str
    classes: tuple[str, ...]
    settings: Settings
    starts: tuple[int, ...]
    digest: str

    @property
    def shards(self) -> int:
        return len(self.starts) - 1

    def items(self, number: int) -> StoredItems:
        """The items of a shard."""
        return StoredItems(self.path, self.digest, *self.starts[number : number + 2])


@dataclass(frozen=True)
class StoredItems(Sequence[Item]):
    """Items [first, last) of a plan; another process is sent these numbers."""

    path: Path
    digest: str
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        items = _map(self.path, self.digest)
        if isinstance(number, slice):
            return [items[self.first + i] for i in range(*number.indices(len(self)))]
        return items[self.first + range(len(self))[number]]

    def __iter__(self) -> Iterator[Item]:
        return (self[number] for number in range(len(self)))


def write_plan(dest: Path, plan: Plan) -> None:
    """Write the items of a plan below `dest`, atomically, with little memory."""
    items, order = plan.source.items, plan.order
    images, names = items.images, items.names
    ends = np.asarray(names.ends, np.int64)
    lengths = np.diff(ends, prepend=-1)[order]  # with the byte between two
    columns = {
        "labels": ("<i4", len(order)), "files": ("<i4", len(order)), "offsets": ("<i8", len(order)),
        "sizes": ("<i8", len(order)), "ends": ("<i8", len(order)), "names": ("|u1", lengths.sum()),
    }  # fmt: skip
    head: dict[str, Any] = {
        "digest": plan.digest, "root": plan.source.root, "classes": plan.source.classes,
        "settings": plan.settings.record(), "starts": plan.starts, "places": images.places,
    }  # fmt: skip
    placed, end = {}, 0
    for name, (dtype, count) in columns.items():
        placed[name] = (dtype, end, int(count))
        end += -(-int(count) * np.dtype(dtype).itemsize // 64) * 64
    text = json.dumps(head | {"columns": placed}).encode()
    text += b" " * (-(len(text) + _HEADER.size) % 64)
    path = dest / PARTS / PLAN_FILE
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(_HEADER.pack(_MAGIC, len(text)) + text)
            _put(file, np.asarray(items.labels, "<i4")[order])
            _put(file, np.asarray(images.files, "<i4")[order])
            _put(file, np.asarray(images.offsets, "<i8")[order])
            _put(file, np.asarray(images.sizes, "<i8")[order])
            _put(file, np.cumsum(lengths) - 1)
            _put_names(file, names, ends, order)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _put(file: BinaryIO, column: np.ndarray) -> None:
    file.write(column.data)
    file.write(bytes(-column.nbytes % 64))


def _put_names(file: BinaryIO, names: Texts, ends: np.ndarray, order: np.ndarray) -> None:
    data = memoryview(names.data)
    for first in range(0, len(order), _CHUNK):
        rows = order[first : first + _CHUNK]
        begins = np.where(rows > 0, ends[rows - 1] + 1, 0).tolist()
        file.write(
            b"".join(data[a : b + 1] for a, b in zip(begins, ends[rows].tolist(), strict=True))
        )
    file.write(bytes(-len(data) % 64))


def read_plan(dest: Path) -> StoredPlan:
    """The plan below `dest`; ToolError where there is none, or no whole one."""
    path = dest / PARTS / PLAN_FILE
    head = _head(path)[0]
    image = head["settings"].pop("image")
    conversion = Conversion(**image.pop("conversion"))
    settings = Settings(**head["settings"], image=ImageSettings(**image, conversion=conversion))
    starts, classes = tuple(head["starts"]), tuple(head["classes"])
    return StoredPlan(path, head["root"], classes, settings, starts, head["digest"])


def _head(path: Path) -> tuple[dict[str, Any], mmap.mmap, int]:
    """The JSON of a plan, the mapped file, and where its columns begin."""
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, length = _HEADER.unpack(data[: _HEADER.size])
        begin = _HEADER.size + length
        head = json.loads(data[_HEADER.size : begin])
        _, offset, count = head["columns"]["names"]
        if magic != _MAGIC or len(data) < begin + offset + count:
            raise ValueError("cut")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ToolError(f"{path}: cannot be read ({error}); remove {path.parent}") from error
    return head, data, begin


@lru_cache(maxsize=4)
def _map(path: Path, digest: str) -> Items:
    """The items of a plan, memory-mapped."""
    head, data, begin = _head(path)
    if head["digest"] != digest:
        raise ToolError(f"{path}: was replaced by another plan; start again")
    columns = {
        name: np.frombuffer(data, dtype, count, begin + offset)
        for name, (dtype, offset, count) in head["columns"].items()
    }
    images = Images()
    images.names = Texts.at(columns["names"], columns["ends"])
    images.files, images.offsets = columns["files"], columns["offsets"]
    images.sizes, images.places = columns["sizes"], head["places"]
    items = Items()
    items.images, items.labels = images, columns["labels"]
    return items

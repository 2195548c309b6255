"""What there is to shard: the images of a folder, of a tar, or of a CSV or JSONL list.

Every source becomes a flat list of items that say where the bytes of one image lie. Archives are
never extracted: an item inside a tar is a byte range of that tar.
"""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shard_tools.cli import ToolError, read_list

# torchvision's IMG_EXTENSIONS, and GIF; other files in a folder are left out and reported.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    ".gif",
)
# A class index beyond this is taken for a mistake.
MOST_CLASSES = 1_000_000


class Item(NamedTuple):
    """One image: its original name, class index (-1 = none), and its bytes in a file."""

    name: str
    label: int
    file: str  # relative to Source.root
    offset: int
    size: int


class Source(NamedTuple):
    """Items, their classes (index → name), and (file, reason) for what was left out."""

    root: str
    items: list[Item]
    classes: tuple[str, ...]
    ignored: list[tuple[str, str]]


def open_source(
    path: Path,
    *,
    classes: tuple[str, ...] = (),
    synsets: Path | None = None,
    devkit: Path | None = None,
    root: Path | None = None,
) -> Source:
    """Find out what `path` is and list it.

    classes: the class order to use instead of the sorted names (such as that of the training
        set); an unknown class is an error. synsets, devkit: labels of a flat tar, see
        `_val_labels`. root: where the paths of a CSV or JSONL start (default: its folder).
    """
    if path.is_dir():
        source = _folder(path)
    elif not path.is_file():
        raise ToolError(f"{path}: no such file or folder")
    elif path.suffix.lower() in LISTS:
        source = LISTS[path.suffix.lower()](path, root or path.parent)
    else:
        source = _tar(path, _val_labels(synsets, devkit))
    if not source.items:
        raise ToolError(f"{path}: holds no images ({' '.join(EXTENSIONS)})")
    for item in source.items:
        if "\n" in item.name or (not item.name.isprintable() and not _is_utf8(item.name)):
            raise ToolError(f"{path}: file name {item.name!r} is not plain UTF-8 text; rename it")
    return _relabel(source, classes, path) if classes else source


def read_item(root: str, item: Item) -> bytes:
    """The bytes of one item; ToolError where the file is not what it was when it was listed."""
    try:
        with open(os.path.join(root, item.file), "rb", buffering=0) as file:
            if item.offset:
                file.seek(item.offset)
            data = file.read(item.size) or b""
            while len(data) < item.size and (more := file.read(item.size - len(data))):
                data += more
    except OSError as error:
        raise ToolError(f"{root}/{item.file}: cannot be read ({error.strerror})") from error
    if len(data) != item.size:
        raise ToolError(f"{root}/{item.file}: changed since it was listed; start again")
    return data


def _folder(path: Path) -> Source:
    """An ImageFolder tree, labelled as torchvision does (index = position of the class folder in
    sorted order); a folder that holds images and no folders is a set without labels."""
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    hidden = [name for name in folders if name.startswith(".")]
    if hidden:
        raise ToolError(f"{path}/{hidden[0]}: would become a class; remove this folder")
    items: list[Item] = []
    ignored: list[tuple[str, str]] = []
    for label, name in enumerate(folders):
        before = len(items)
        _walk(path, name, label, items, ignored)
        if len(items) == before:
            ignored.append((name, "class folder without images"))
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if not entry.is_file():
            continue
        if folders or not _is_image(entry.name):
            ignored.append((entry.name, "outside the class folders" if folders else "no image"))
        else:
            items.append(Item(entry.name, -1, entry.name, 0, entry.stat().st_size))
    return Source(str(path), items, tuple(folders), ignored)


def _walk(
    top: Path, name: str, label: int, items: list[Item], ignored: list[tuple[str, str]]
) -> None:
    for entry in sorted(os.scandir(top / name), key=lambda entry: entry.name):
        inner = f"{name}/{entry.name}"
        if entry.is_dir():
            _walk(top, inner, label, items, ignored)
        elif _is_image(entry.name):
            items.append(Item(inner, label, inner, 0, entry.stat().st_size))
        else:
            ignored.append((inner, "not an image by its name"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith("._")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tar(path: Path, labels: dict[str, str] | list[str]) -> Source:
    """ImageNet's archives: a tar of one tar per class, a tar with class folders, or a flat tar
    whose labels are given."""
    found: list[tuple[str, str, int, int]] = []  # name, class, offset, size
    ignored: list[tuple[str, str]] = []
    for member in _members(path, 0):
        if member.name.lower().endswith(".tar"):
            synset = Path(member.name).stem
            for inner in _members(path, member.offset_data):
                name = f"{synset}/{inner.name}"
                found.append((name, synset, member.offset_data + inner.offset_data, inner.size))
        elif _is_image(os.path.basename(member.name)):
            folder = os.path.basename(os.path.dirname(member.name))
            found.append((member.name, folder, member.offset_data, member.size))
        else:
            ignored.append((member.name, "not an image by its name"))
    if labels:
        found = list(_label_flat(path, found, labels))
    classes = tuple(sorted({synset for _, synset, _, _ in found} - {"", "."}))
    numbers = {name: number for number, name in enumerate(classes)}
    if classes and any(synset not in numbers for _, synset, _, _ in found):
        raise ToolError(f"{path}: some images lie in class folders and some do not")
    items = [Item(name, numbers.get(s, -1), path.name, at, size) for name, s, at, size in found]
    return Source(str(path.parent), items, classes, ignored)


def _members(path: Path, start: int) -> Iterator[tarfile.TarInfo]:
    """Regular files of the tar that begins at byte `start` of `path`."""
    with open(path, "rb") as file:
        window = _Window(file, start)
        try:
            with tarfile.open(fileobj=window, mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    if member.size < 0:  # tarfile would walk backwards
                        raise ToolError(f"{path}: {member.name} has a negative size")
                    if member.isreg() and not member.issparse():
                        if start + member.offset_data + member.size > window.end:
                            raise ToolError(f"{path}: cut inside {member.name}")
                        yield member
                    archive.members = []  # or tarfile would keep every header in memory
        except tarfile.TarError as error:
            raise ToolError(f"{path}: not a readable, uncompressed tar ({error})") from error


class _Window:
    """A file object that begins at byte `start` of another one."""

    def __init__(self, file: Any, start: int) -> None:
        self.file, self.start = file, start
        self.end = file.seek(0, os.SEEK_END)
        file.seek(start)

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = self.start if whence == os.SEEK_SET else 0
        return self.file.seek(base + offset, whence) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start


def _label_flat(
    path: Path,
    found: list[tuple[str, str, int, int]],
    labels: dict[str, str] | list[str],
) -> Iterator[tuple[str, str, int, int]]:
    """Give each image of a flat tar its synset, by file name or by position in name order."""
    found = sorted(found)
    if isinstance(labels, list):
        if len(labels) != len(found):
            raise ToolError(f"{path}: {len(found)} images, but {len(labels)} labels are given")
        labels = {os.path.basename(name): s for (name, *_), s in zip(found, labels, strict=True)}
    for name, _, offset, size in found:
        synset = labels.get(os.path.basename(name))
        if synset is None:
            raise ToolError(f"{path}: the label file has no line for {os.path.basename(name)}")
        yield name, synset, offset, size


def _val_labels(synsets: Path | None, devkit: Path | None) -> dict[str, str] | list[str]:
    """Labels of ImageNet's validation tar: one synset per line in name order, or `name synset`
    lines (`synsets`); or the ground truth of the development kit, ILSVRC2012_devkit_t12, as a
    folder or tar.gz (`devkit`)."""
    if synsets and devkit:
        raise ToolError("give --synsets or --devkit, not both")
    if devkit:
        from shard_tools.sharding.imagenet_devkit import validation_synsets  # needs scipy

        return validation_synsets(devkit)
    if not synsets:
        return []
    lines = [line.split() for line in read_list(synsets)]
    widths = {len(line) for line in lines}
    if widths == {1}:
        return [line[0] for line in lines]
    if widths == {2}:
        return {line[0]: line[1] for line in lines}
    raise ToolError(f"{synsets}: each line must be `synset` or `image-name synset`")


def _table(path: Path, root: Path) -> Source:
    """A CSV with a header line, or a JSONL: column `path`, and optionally `label` (class index or
    class name; all of one kind)."""
    rows = list(_rows(path))
    labels = [str(row.get("label", "")).strip() for row in rows]
    if all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        if max(numbers, default=0) >= MOST_CLASSES:
            raise ToolError(f"{path}: label {max(numbers)} is no class index (0 to {MOST_CLASSES})")
        classes = tuple(str(number) for number in range(max(numbers, default=-1) + 1))
    elif not any(labels):
        numbers, classes = [-1] * len(rows), ()
    elif all(labels):
        classes = tuple(sorted(set(labels)))
        index = {name: number for number, name in enumerate(classes)}
        numbers = [index[label] for label in labels]
    else:
        raise ToolError(f"{path}: line {labels.index('') + 1} of the data has no label")
    items = []
    for line, (row, number) in enumerate(zip(rows, numbers, strict=True), 1):
        name = row["path"]
        try:
            size = os.stat(root / name).st_size
        except OSError as error:
            raise ToolError(f"{path}: row {line}: {root / name}: {error.strerror}") from error
        items.append(Item(name, number, name, 0, size))
    return Source(str(root), items, classes, [])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows: Iterable[Any]
        if path.suffix.lower() == ".csv":
            rows = csv.DictReader(file)
        else:
            rows = (json.loads(line) for line in file if line.strip())
        try:
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or not isinstance(row.get("path"), str):
                    raise ToolError(f"{path}: row {number} has no column `path`")
                if not row["path"] or "\n" in row["path"]:
                    raise ToolError(f"{path}: row {number} has no usable path")
                yield row
        except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
            raise ToolError(f"{path}: cannot be read ({error})") from error


def _relabel(source: Source, classes: tuple[str, ...], path: Path) -> Source:
    """The same items, labelled by the given class order."""
    if not source.classes:
        raise ToolError(f"{path}: has no class folders or labels to match the given classes")
    unknown = set(source.classes) - set(classes)
    if unknown:
        raise ToolError(f"{path}: class {min(unknown)!r} is not among the {len(classes)} given")
    numbers = [classes.index(name) for name in source.classes]
    items = [item._replace(label=numbers[item.label]) for item in source.items]
    return source._replace(items=items, classes=classes)


# Suffix of a list of images → its reader: (list, folder that its paths start from) → Source.
LISTS: dict[str, Callable[[Path, Path], Source]] = {
    ".csv": _table,
    ".jsonl": _table,
    ".ndjson": _table,
}

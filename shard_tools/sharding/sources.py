"""What there is to shard: the images of a folder, of tars or Parquet files, or of a CSV or JSONL.

Every source becomes a flat list of items that say where the bytes of one image are. Archives are
never extracted: an item inside a tar is a byte range of that tar.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.errors import naming, not_there
from shard_tools.cli import ToolError
from shard_tools.sharding.archives import is_archive, is_archive_file, list_archive, list_class_tars
from shard_tools.sharding.folders import class_folders, files_in, list_folder
from shard_tools.sharding.found import (
    EXTENSIONS,
    HELD_OUT,
    SYNSET,
    TRAINING,
    Found,
    Images,
    is_image,
)
from shard_tools.sharding.items import Items
from shard_tools.sharding.labels import Labels, label_flat, labels_in_names
from shard_tools.sharding.parquet import Wanted, list_parquet
from shard_tools.sharding.parquet_sets import SUFFIX, arrow_hint, is_parquet, parquet_sets
from shard_tools.sharding.splits import check_splits, splits_error
from shard_tools.sharding.tables import label_column, list_table
from shard_tools.texts import Texts

_METADATA = ("metadata.csv", "metadata.jsonl")  # of Hugging Face: labels, captions, …
_GIVE_ONE = "give one of them, or the folder of both where they are called train and val"


@dataclass(frozen=True)
class Source:
    """Items, their classes (index → name), (name, reason) for files that are no images, for images
    that are known to be missing and for dropped duplicates, and a remark about how it was read."""

    root: str
    items: Items
    classes: tuple[str, ...] = ()
    ignored: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    remark: str = ""
    duplicates: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Listing:
    """How a source is listed.

    classes: the class order to use instead of the sorted names (such as that of the training set);
        an unknown class is an error, a class without images is kept. labels: of a flat folder or
        tar, see shard_tools/sharding/labels.py. root: where the paths of a CSV or JSONL start
        (default: its folder). unlabelled: take every image and no labels. unpacked: folder for the
        content of compressed archives and Parquet files, None = refuse them. skip: report what is
        damaged or missing, and take the rest. image_column, label_column: of Parquet files, "" =
        the only ones. takes: what a command takes that does not take all, for the error.
    """

    classes: tuple[str, ...] = ()
    labels: Labels | None = None
    root: Path | None = None
    unlabelled: bool = False
    unpacked: Path | None = None
    skip: bool = False
    image_column: str = ""
    label_column: str = ""
    takes: str = ""


def open_source(path: Path, how: Listing = Listing()) -> Source:
    """Find out what `path` is and list it. UserError where it cannot be read as it should."""
    if not os.path.lexists(path):
        raise ToolError(not_there(path))
    if how.unlabelled and (how.labels or how.classes):
        raise ToolError(
            "--unlabelled takes no labels: leave out --classes-from, --synsets, --devkit"
        )
    suffix = path.suffix.lower()
    if how.root and suffix not in LISTS:
        raise ToolError(f"--root is for a CSV or JSONL; {path} is none")
    if (how.image_column or how.label_column) and not (path.is_dir() or is_parquet(path.name)):
        raise ToolError(f"--image-column and --label-column are for Parquet; {path} is none")
    with naming(path, "cannot be read"):
        if path.is_dir():
            source = _folder(path, how)
        elif not path.is_file():
            raise ToolError(f"{path}: is neither a regular file nor a folder")
        elif is_image(path.name):
            raise ToolError(f"{path}: is one image; give its folder, or a table of paths")
        elif suffix in LISTS:
            source = LISTS[suffix](path, how)
        elif is_parquet(path.name):
            source = _parquet([path], how)
        elif not is_archive_file(path):
            takes = how.takes or f"a folder, a tar, a zip, Parquet nor a list ({' '.join(LISTS)})"
            raise ToolError(f"{path}: is neither {takes}{arrow_hint(path.name)}")
        else:
            source = _archives([path], how)
    return _checked(source, path)


def open_found(found: Found, archive: Path, folder: str, how: Listing) -> Source:
    """The source of what was found in a folder of an archive."""
    where = archive / folder
    return _checked(_labelled(found, archive.parent, how, str(where)), where)


def open_parts(paths: Sequence[Path], how: Listing) -> Source:
    """List one data set that is in several tars or Parquet files."""
    read = _parquet if is_parquet(paths[0].name) else _archives
    return _checked(read(paths, how), paths[0])


def _archives(paths: Sequence[Path], how: Listing) -> Source:
    found = Found()
    for path in paths:
        found.extend(list_archive(path, how.unpacked, how.skip))
    if not how.unlabelled:
        check_splits(found, str(paths[0]), "unpack it and give the folder of both")
        _check_metadata(paths[0], found, how)
    return _labelled(found, paths[0].parent, how, str(paths[0]))


def _check_metadata(path: Path, found: Found, how: Listing) -> None:
    """No list of Hugging Face's is beside the images of an archive without class folders."""
    flat = not any("/" in name for name in found.images.names)
    names = (name for name, _ in found.ignored if Path(name).name.lower() in _METADATA)
    if flat and not how.labels and (name := next(names, "")):
        raise ToolError(
            f"{path}: holds {name}, which is not read in an archive; unpack it and give {name} "
            "instead, or take the images only with --unlabelled"
        )


def _folder(path: Path, how: Listing) -> Source:
    """An ImageFolder tree (class = folder right below `path`, index = its position in sorted order,
    as torchvision does), a folder of class tars, or images without classes."""
    archives = files_in(path, is_archive)
    class_tars = [name for name in archives if SYNSET.fullmatch(name.split(".")[0])]
    if class_tars and len(class_tars) == len(archives):
        return _class_tars(path, class_tars, how)
    found = list_folder(path, how.skip)
    if tables := [name for name, _ in found.ignored if is_parquet(name)]:
        if sets := parquet_sets(path):
            return _parquet_folder(path, sets, found, how)
        if not found.images:
            folders = sorted({str(Path(name).parent) for name in tables})
            raise ToolError(
                f"{path}: holds several sets in Parquet; give the folder of one: "
                f"{', '.join(folders[:4])}{' …' if len(folders) > 4 else ''}"
            )
    if how.image_column or how.label_column:
        raise ToolError(f"{path}: holds no Parquet; --image-column and --label-column are for that")
    if archives and not found.images:
        raise ToolError(
            f"{path}: holds archives such as {archives[0]}; give one of them, or adopt WebDataset "
            "tars with shard_tools/index_shards.py"
        )
    if not how.unlabelled:
        _check_class_folders(path, found, how)
        _check_lists(path, found, how)
    return _labelled(found, path, how, str(path))


def _parquet_folder(
    path: Path, sets: dict[str, tuple[Path, ...]], found: Found, how: Listing
) -> Source:
    """The images of a folder of Parquet files, which is one split and has no other images."""
    if found.images:
        first = next(iter(sets.values()))[0]
        raise ToolError(
            f"{path}: holds images, such as {found.images.names[0]}, and beside them {first}, "
            "which may hold images or labels too; give the folder of one of them"
        )
    named = [name for name in sets if name.lower() in TRAINING | HELD_OUT]
    if named and len(sets) > 1 and not how.unlabelled:
        raise splits_error(str(path), sorted(sets), "give a folder with the files of one of them")
    return _parquet([file for files in sets.values() for file in files], how)


def _parquet(paths: Sequence[Path], how: Listing) -> Source:
    """One data set in Parquet files. ImageNet's file names say the synsets of its classes, which
    have the order of the labels in the file."""
    where, root = paths[0], paths[0].parent
    if how.labels:
        raise ToolError(f"{where}: has its own labels, so --synsets and --devkit do nothing")
    wanted = Wanted(not how.unlabelled, how.image_column, how.label_column)
    rows = list_parquet(paths, how.unpacked, how.skip, wanted)
    labels, names, remark = rows.labels, rows.names, ""
    synsets = [] if how.unlabelled else labels_in_names(rows.found)
    if not labels and synsets:
        labels, remark = list(synsets), "labels from the file names"
    elif not labels and not how.unlabelled:
        remark = "no column of labels, so without labels"
    elif labels and synsets:
        pairs = set(zip(labels, synsets, strict=True))
        if not len(pairs) == len(set(labels)) == len(set(synsets)):
            raise ToolError(f"{where}: its labels and the synsets in its file names disagree")
        names = tuple(synset for _, synset in sorted(pairs))
        labels = list(map({synset: i for i, synset in enumerate(names)}.__getitem__, synsets))
    return _by_column(where, root, rows.found, labels, how, names, remark)


def _class_tars(path: Path, names: list[str], how: Listing) -> Source:
    loose = [name for name in files_in(path) if is_image(name)] or class_folders(path)
    if loose:
        raise ToolError(f"{path}: holds class tars and beside them {loose[0]}; separate them")
    found = list_class_tars([path / name for name in names], how.unpacked, how.skip)
    ignored = [name for name in files_in(path) if name not in names]
    found.ignored += [(name, "not an image by its name") for name in ignored]
    return _labelled(found, path, how, str(path))


def _check_class_folders(path: Path, found: Found, how: Listing) -> None:
    """No class folder is empty, and the folders are no splits."""
    folders = class_folders(path)
    called = {name.lower() for name in folders}
    if called and called <= TRAINING | HELD_OUT and any(class_folders(path / f) for f in folders):
        raise splits_error(str(path), folders, _GIVE_ONE)
    check_splits(found, str(path), _GIVE_ONE)
    names = chain(found.images.names, (name for name, _ in found.missing))
    filled = {name.split("/")[0] for name in names} & set(folders)
    empty = sorted(set(folders) - filled - set(how.classes))
    if empty and filled:
        raise ToolError(
            f"{path}: the class folder {empty[0]} holds no images; remove it, or name all classes "
            "with --classes-from"
        )
    found.ignored += [(name, "a folder without images") for name in empty]
    found.classes |= filled


def _check_lists(path: Path, found: Found, how: Listing) -> None:
    """No list of images and labels is among images that have no class folders of their own, such
    as Hugging Face's metadata.csv: its labels would be lost."""
    classes = {name.split("/")[0] for name in found.images.names if "/" in name}
    for name, _ in found.ignored if not how.labels else ():
        among = "/" in name or len(classes) < 2
        if among and name.lower().endswith(tuple(LISTS)) and (column := label_column(path / name)):
            raise ToolError(
                f"{path / name}: lists images with labels (its column `{column}`), which images of "
                "a folder do not get; give this list instead of the folder, or take the images "
                "only with --unlabelled"
            )


def _labelled(found: Found, root: Path, how: Listing, where: str) -> Source:
    """Labels by class folder, by the given labels, or by ImageNet's own file names."""
    inside = sum("/" in name for name in found.images.names)
    stored = next((name for name, _ in found.ignored if name.lower().endswith(".cls")), "")
    if stored and not how.unlabelled and not how.labels:
        raise ToolError(
            f"{where}: holds labels of WebDataset, which are not read here ({stored}); adopt such "
            "tars with shard_tools/index_shards.py, or take the images only with --unlabelled"
        )
    names: list[str] = []
    remark = ""
    if how.unlabelled:
        pass
    elif inside and inside < len(found.images):
        loose = next(name for name in found.images.names if "/" not in name)
        raise ToolError(
            f"{where}: {loose} is outside the class folders; move such images into them, or take "
            "all images without labels with --unlabelled"
        )
    elif inside:
        if how.labels:
            raise ToolError(f"{where}: has class folders, so --synsets and --devkit do nothing")
        names = [sys.intern(name.split("/")[0]) for name in found.images.names]
        if ".." in names:
            out = found.images.names[names.index("..")]
            raise ToolError(f"{where}: {out} leads out of the archive, so its folder is no class")
    elif how.labels:
        names = label_flat(found, how.labels, where, how.skip)
        _check_synsets(names, how, where)
    elif found.images:
        names = labels_in_names(found)
        remark = "labels from the file names" if names else "no class folders, so without labels"
    classes = tuple(sorted({*names, *(found.classes if inside else ())}))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[name] for name in names] or [-1] * len(found.images)
    source = _source(root, found.images, labels, classes, found, remark)
    return _relabel(source, how.classes, where) if how.classes else source


def _check_synsets(names: Sequence[str], how: Listing, where: str) -> None:
    """Labels that are numbers name no classes, but for the given ones: sorted as text they would be
    other numbers (ILSVRC2012_validation_ground_truth.txt, or Caffe's val.txt)."""
    if names and not how.classes and all(map(str.isdecimal, names)):
        raise ToolError(
            f"{where}: the labels are numbers such as {names[0]}, not synsets; --devkit knows "
            "those of ILSVRC2012_validation_ground_truth.txt, a CSV of path and label has indices"
        )


def _table(path: Path, how: Listing) -> Source:
    """A CSV or JSONL, see shard_tools/sharding/tables.py."""
    if how.labels:
        raise ToolError(f"{path}: has its own labels, so --synsets and --devkit do nothing")
    root = how.root or path.parent
    images, labels = list_table(path, root)
    return _by_column(path, root, Found(images), [] if how.unlabelled else labels, how)


def _by_column(
    path: Path, root: Path, found: Found, labels: list[int | str], how: Listing,
    names: tuple[str, ...] = (), remark: str = "",
) -> Source:  # fmt: skip
    """Labelled by a column: of class indices, which may have `names`, of class names, or none."""
    classes: tuple[str, ...] = ()
    numbers = [-1] * len(found.images)
    if labels and isinstance(labels[0], int):
        numbers = [int(label) for label in labels]
        classes = names or tuple(map(str, range(max(numbers) + 1)))
        if how.classes and not names and not all(name.isdecimal() for name in how.classes):
            if len(how.classes) < len(classes):
                raise ToolError(
                    f"{path}: label {max(numbers)}, but {len(how.classes)} classes are given"
                )
            return _source(root, found.images, numbers, how.classes, found, remark)
    elif labels:
        classes = tuple(sorted(map(str, set(labels))))
        index = {name: number for number, name in enumerate(classes)}
        numbers = [index[str(label)] for label in labels]
    source = _source(root, found.images, numbers, classes, found, remark)
    return _relabel(source, how.classes, str(path)) if how.classes else source


def _source(
    root: Path,
    images: Images,
    labels: list[int],
    classes: tuple[str, ...],
    found: Found,
    remark: str = "",
) -> Source:
    # absolute: a job may be finished from another working directory
    items = Items.labelled(images, labels)
    return Source(os.path.abspath(root), items, classes, found.ignored, found.missing, remark)


def _relabel(source: Source, classes: tuple[str, ...], where: str) -> Source:
    """The same items, labelled by the given class order."""
    if not source.classes:
        table = Path(where).suffix.lower() in (*LISTS, SUFFIX)
        raise ToolError(
            f"{where}: has no column `label` to match the given classes" if table
            else f"{where}: has no class folders or labels to match the classes; --synsets or "
            "--devkit gives labels (of ImageNet's validation set LOC_val_solution.csv or "
            "ILSVRC2012_devkit_t12)"
        )  # fmt: skip
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(source.classes) - set(classes))
    if unknown:
        _check_forms((unknown[0], *classes), where)
        raise ToolError(f"{where}: class {unknown[0]!r} is not among the {len(classes)} given")
    numbers = [index[name] for name in source.classes]
    items = Items.labelled(source.items, (numbers[label] for label in source.items.labels))
    return replace(source, items=items, classes=classes)


def _check_forms(classes: Sequence[str], where: str) -> None:
    """No two classes look the same, such as é as one character (NFC) and as e and an accent (NFD),
    of which folders have one on macOS and the other elsewhere."""
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise ToolError(
                f"{where}: the classes {other!a} and {name!a} are both {name!r}, in two forms of "
                "Unicode (NFC, and NFD as macOS has it); give them one name"
            )


def _checked(source: Source, path: Path) -> Source:
    """There are images; names are text, and none names two different images."""
    _check_forms(source.classes, str(path))
    if not source.items:
        first = source.ignored[0][0] if source.ignored else ""
        reason = f", but {first}{arrow_hint(first)}" if first else ""
        reason = f"; {source.missing[0][1]}" if source.missing else reason
        raise ToolError(f"{path}: holds no images ({' '.join(EXTENSIONS)}){reason}")
    names = source.items.names
    for name in names:
        if "\n" in name or (not name.isprintable() and not _is_utf8(name)):
            raise ToolError(f"{path}: file name {name!r} is not plain UTF-8 text; rename it")
    if path.suffix.lower() not in LISTS and (twice := _repeated(names)):
        name, count = Counter(name for name in names if name in twice).most_common(1)[0]
        raise ToolError(f"{path}: holds {count} images named {name}")
    return source


def _repeated(names: Texts) -> set[str]:
    """The names that occur more than once; a set of all of them would take too much memory."""
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    ordered = np.sort(hashes)
    equal = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: set[str] = set()
    twice: set[str] = set()
    for name in names if equal else ():
        if hash(name) in equal:
            (twice if name in seen else seen).add(name)
    return twice


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# Suffix of a list of images → its reader.
LISTS: dict[str, Callable[[Path, Listing], Source]] = {
    ".csv": _table,
    ".jsonl": _table,
    ".ndjson": _table,
}

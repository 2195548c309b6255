"""The layouts in which people have ImageNet: train and validation set in one folder.

    train/ and val/                 as torchvision's ImageFolder; val/ in class folders, or flat
                                    beside LOC_val_solution.csv or the development kit
    ILSVRC2012_img_train.tar …      the three original files (with _img_val and _devkit_t12)
    ILSVRC/Data/CLS-LOC             Kaggle's, with LOC_val_solution.csv
    data/train_images_0.tar.gz …    Hugging Face's, and
    data/train-00000-of-00294.parquet … in Parquet, as any data set with labels there
    train.zip and val.zip           or train.tar.gz and the like
    imagenet.tar                    a tar or zip of both: in class folders, or Kaggle's
    train/ and val/images/          Tiny ImageNet's, with val/val_annotations.txt

All give the same shards: image names are `synset/file` and classes the sorted synsets, which
LOC_synset_mapping.txt has to confirm where it is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.errors import naming
from shard_tools.class_list import parse_classes, read_classes
from shard_tools.cli import ToolError
from shard_tools.sharding.archives import (
    archive_stem,
    is_archive,
    is_archive_file,
    list_archive,
    member_names,
    read_member,
)
from shard_tools.sharding.folders import class_folders, files_in
from shard_tools.sharding.found import HELD_OUT, TRAINING, is_image
from shard_tools.sharding.imagenet_devkit import validation_synsets
from shard_tools.sharding.labels import Labels, parse_annotations, parse_solution, read_solution
from shard_tools.sharding.parquet_sets import parquet_sets
from shard_tools.sharding.sources import Listing, Source, open_found, open_parts, open_source
from shard_tools.sharding.splits import divided, split_folders, training_and_held_out

_VAL_FOLDERS = ("val", "valid", "validation")
_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_SOLUTION, _MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's
_DEVKIT = "ILSVRC2012_devkit_t12"
_PART = re.compile(r"train_images_(\d+)\.tar(\.gz|\.zst)?")


# What a list of synsets is called, and what reads it.
SynsetList = tuple[str, Callable[[], Sequence[str]]]


@dataclass(frozen=True)
class Layout:
    """A folder that holds train and validation set: what it is, the paths of both (several only
    for archives), how the labels of a flat validation set are read, and the list of synsets, with
    what it is called. together: both paths are those of one archive."""

    what: str
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    labels: Callable[[], Labels] | None = None
    mapping: SynsetList | None = None
    together: bool = False


def recognise(root: Path, unpacked: Path | None) -> Layout | None:
    """The layout of `root`; None for a folder or file that is one set of images. UserError where a
    part of the layout is missing, or a compressed archive cannot be unpacked into `unpacked`."""
    if not root.is_dir():
        return _one_archive(root, unpacked) if is_archive_file(root) else None
    for look in (_kaggle, _tiny, _folders, _original, _hugging_face, _parquet, _archive_each):
        layout = look(root)
        if layout is not None:
            return layout
    return None


def open_splits(layout: Layout, how: Listing) -> tuple[Source, Source]:
    """List train and validation set, the second in the classes of the first."""
    if how.unlabelled:
        raise ToolError("--unlabelled is for one folder of images; give the train folder itself")
    open_train, open_val = (
        _together(layout, how)
        if layout.together
        else (partial(_open, layout.train), partial(_open, layout.val))
    )
    train = open_train(replace(how, labels=None))
    if layout.mapping:
        _check_mapping(layout, train.classes)
    if not train.classes:
        raise ToolError(f"{layout.train[0]}: the training set has no class folders or labels")
    _check_depth(layout, train)
    how = replace(how, classes=train.classes)
    if layout.labels and how.labels is None:
        how = replace(how, labels=layout.labels())
    return train, open_val(how)


def _open(paths: Sequence[Path], how: Listing) -> Source:
    return open_source(paths[0], how) if len(paths) == 1 else open_parts(paths, how)


def _together(layout: Layout, how: Listing) -> tuple[Callable[[Listing], Source], ...]:
    """What opens each set of an archive, which is listed once."""
    path = layout.train[0]
    found = list_archive(path, how.unpacked, how.skip)
    sets = split_folders(found.images.names)
    if sets is None:
        raise ToolError(f"{path}: the images of one of its sets cannot be read")
    above, folders = sets
    names = training_and_held_out(folders)
    parts = divided(found, [above + name for name in names])
    if layout.labels:
        parts[1] = parts[1].without_wrapping(keep_class=False)  # Tiny ImageNet's val/images
    return tuple(
        partial(open_found, part, path, above + name)
        for part, name in zip(parts, names, strict=True)
    )


def _check_depth(layout: Layout, train: Source) -> None:
    """The only class folder of the training set does not hold the classes."""
    flat = any(name.count("/") < 2 for name in train.items.names)
    if len(train.classes) > 1 or flat:
        return
    inside = {name.split("/")[1] for name in train.items.names}
    if len(inside) > 1:
        raise ToolError(
            f"{layout.train[0]}: the training set has one class folder, {train.classes[0]}, which "
            f"holds folders such as {min(inside)}; move them one folder up"
        )


def _check_mapping(layout: Layout, classes: Sequence[str]) -> None:
    assert layout.mapping
    where, read = layout.mapping
    named = read()
    wrong = set(named) ^ set(classes)
    if wrong:
        raise ToolError(
            f"{layout.train[0]}: {len(classes)} classes where {where} names {len(named)}; "
            f"{min(wrong)} is only in one of them"
        )


def _kaggle(root: Path) -> Layout | None:
    for below in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "."):
        folder = root / below
        if below == "." and os.path.basename(os.path.realpath(root)) != "CLS-LOC":
            return None
        if (folder / "train").is_dir():
            val = folder / "val"
            if not val.is_dir():
                raise ToolError(f"{val}: is missing beside {folder / 'train'}")
            beside = [folder, *Path(os.path.realpath(folder)).parents[:3]]
            return Layout(
                "ImageNet as Kaggle has it",
                (folder / "train",),
                (val,),
                _flat_labels(val, beside),
                _mapping(beside),
            )
    return None


def _folders(root: Path) -> Layout | None:
    inside = class_folders(root)
    for folder in (root, root / inside[0]) if len(inside) == 1 else (root,):
        names = class_folders(folder)
        # ImageNet's own test set has no classes.
        tests = [name for name in names if name.lower() in ("test", "testing")]
        names = [name for name in names if name not in tests or class_folders(folder / name)]
        called = {name.lower() for name in names}
        if called & TRAINING and called & HELD_OUT:
            train, val = training_and_held_out(names)
            more = _not_read(
                [name for name in names if name.lower() in TRAINING | HELD_OUT], train, val
            )
            return Layout(
                f"class folders in {train}/, validation set in {val}/{more}",
                (folder / train,),
                (folder / val,),
                _flat_labels(folder / val, [folder, folder / val, root]),
                _mapping([folder, root]),
            )
    return None


def _tiny(root: Path) -> Layout | None:
    val, table = root / "val" / "images", root / "val" / _ANNOTATIONS
    if not (table.is_file() and val.is_dir() and (root / "train").is_dir()):
        return None
    with naming(table, "cannot be read"):
        data = table.read_bytes()
    labels = partial(parse_annotations, data, str(table))
    return Layout("Tiny ImageNet", (root / "train",), (val,), labels)


def _original(root: Path) -> Layout | None:
    train, val = _packed(root, _TRAIN_TAR), _packed(root, _VAL_TAR)
    if train is None and val is None:
        return None
    devkit = _devkit([root])
    if train is None or val is None or devkit is None:
        name = f"{_DEVKIT}.tar.gz" if train and val else _VAL_TAR if train else _TRAIN_TAR
        raise ToolError(
            f"{root / name}: is missing beside ImageNet's other files; for one of them alone, "
            "give its own path"
        )
    return Layout(
        "ImageNet's original archives",
        (train,),
        (val,),
        partial(validation_synsets, devkit),
        _mapping([root]),
    )


def _hugging_face(root: Path) -> Layout | None:
    for folder in (root, root / "data"):
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        parts = {int(match[1]): name for name in names if (match := _PART.fullmatch(name))}
        if not parts:
            continue
        missing = set(range(max(parts))) - set(parts)
        if missing:
            raise ToolError(f"{folder}: train_images_{min(missing)} is missing among the archives")
        val = next((name for name in names if re.fullmatch(r"val_images\.tar(\.\w+)?", name)), None)
        if val is None:
            raise ToolError(f"{folder / 'val_images.tar.gz'}: is missing beside the train archives")
        train = tuple(folder / parts[number] for number in sorted(parts))
        mapping = _mapping([folder, root])
        return Layout("ImageNet as Hugging Face has it", train, (folder / val,), None, mapping)
    return None


def _parquet(root: Path) -> Layout | None:
    sets = parquet_sets(root)
    train = next((name for name in sets if name.lower() in TRAINING), None)
    held_out = [name for name in sets if name.lower() in HELD_OUT]
    held_out.sort(key=lambda name: name.lower() not in _VAL_FOLDERS)
    if train is None or not held_out:
        return None
    val = held_out[0]
    more = _not_read(sets, train, val)
    return Layout(f"Parquet files, validation set in {val}{more}", sets[train], sets[val])


def _archive_each(root: Path) -> Layout | None:
    stems: dict[str, list[str]] = {}
    for name in files_in(root, is_archive):
        stems.setdefault(archive_stem(name).lower(), []).append(name)
    train = [name for stem in sorted(TRAINING) for name in stems.get(stem, ())]
    val = [name for stem in (*_VAL_FOLDERS, "test") for name in stems.get(stem, ())]
    if not train or not val:
        return None
    if len(train) > 1:
        raise ToolError(f"{root}: holds {' and '.join(train)}; give a folder with one of them")
    return Layout(
        f"an archive of the training set, validation set in {val[0]}",
        (root / train[0],),
        (root / val[0],),
        mapping=_mapping([root]),
    )


def _one_archive(path: Path, unpacked: Path | None) -> Layout | None:
    names = member_names(path, unpacked)
    sets = split_folders(filter(is_image, names))
    if sets is None:
        _check_both(path, names)
        return None
    above, folders = sets
    train, val = training_and_held_out(folders)
    return Layout(
        f"an archive of both, validation set in {val}{_not_read(folders, train, val)}",
        (path,),
        (path,),
        _labels_inside(path, unpacked, names, above + val),
        _mapping_inside(path, unpacked, names) or _mapping([path.parent]),
        together=True,
    )


def _not_read(sets: Iterable[str], train: str, val: str) -> str:
    left = sorted(set(sets) - {train, val})
    return f"; not read: {', '.join(left)}" if left else ""


def _labels_inside(
    archive: Path, unpacked: Path | None, names: Sequence[str], val: str
) -> Callable[[], Labels] | None:
    """How to label the validation set in the folder `val` of an archive, of which these are the
    members; None where it has class folders."""
    tiny = next((name for name in names if f"/{name}".endswith(f"/{val}/{_ANNOTATIONS}")), "")
    if tiny:
        return lambda: parse_annotations(read_member(archive, unpacked, tiny), f"{archive}, {tiny}")
    images = (f"/{name}".partition(f"/{val}/")[2] for name in names if is_image(name))
    if any("/" in image for image in images):
        return None
    table = next((name for name in names if name.rpartition("/")[2] == _SOLUTION), "")
    if table:
        return lambda: parse_solution(read_member(archive, unpacked, table), f"{archive}, {table}")
    return _labels_in([archive.parent])


def _check_both(path: Path, names: Sequence[str]) -> None:
    """No training or held-out set is there that holds other files than images only."""
    if sets := split_folders(names):
        above, folders = sets
        for folder in training_and_held_out(folders):
            if not any(f"/{above}{folder}/" in f"/{name}" for name in names if is_image(name)):
                raise ToolError(f"{path}: its folder {above}{folder} holds no images")


def _mapping_inside(
    archive: Path, unpacked: Path | None, names: Sequence[str]
) -> SynsetList | None:
    """The list of synsets among the members of an archive."""
    name = next((name for name in names if name.rpartition("/")[2] == _MAPPING), "")
    where = f"{archive}, {name}"

    def read() -> Sequence[str]:
        text = read_member(archive, unpacked, name).decode("utf-8-sig", "replace")
        return parse_classes(text.split("\n"), where)

    return (where, read) if name else None


def _flat_labels(val: Path, folders: Sequence[Path]) -> Callable[[], Labels] | None:
    """How to label a validation folder without class folders; None where it has them."""
    return None if class_folders(val) else _labels_in(folders)


def _labels_in(folders: Sequence[Path]) -> Callable[[], Labels] | None:
    """How to read the labels that one of the folders has."""
    table, devkit = _first(folders, _SOLUTION), _devkit(folders)
    if table:
        return partial(read_solution, table)
    if devkit:
        return partial(validation_synsets, devkit)
    return None


def _devkit(folders: Sequence[Path]) -> Path | None:
    return next(
        (path for folder in folders if (path := _packed(folder, _DEVKIT, f"{_DEVKIT}.tar"))), None
    )


def _packed(folder: Path, *names: str) -> Path | None:
    """The first of the names, plain or compressed, that is in the folder."""
    suffixes = ("", ".gz", ".zst")
    paths = (folder / (name + suffix) for name in names for suffix in suffixes)
    return next((path for path in paths if path.exists()), None)


def _mapping(folders: Sequence[Path]) -> SynsetList | None:
    """The list of synsets in one of the folders."""
    path = _first(folders, _MAPPING)
    return (str(path), partial(read_classes, path)) if path else None


def _first(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)

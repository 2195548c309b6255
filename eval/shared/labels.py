"""The labels of the sets that an evaluation trains and scores on."""

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import UserError, naming, not_there
from pipeline.runtime.same_run import data_identity
from shard_tools.cli import read_list
from shard_tools.manifest import (
    INDEX,
    MANIFEST,
    NAMES,
    SHARDS,
    Manifest,
    is_remote,
    read_manifest,
    shards_below,
)
from shard_tools.sharding.archives import is_archive
from shard_tools.sharding.found import is_image

LIST = ".txt"  # of paths, one a line
TABLES = (".csv", ".jsonl", ".ndjson")
IMAGES = {"train": "training images", "val": "validation images"}  # set → name in `images_of`
MOST_CLASSES = 1 << 20  # that labels without names may number, where there are fewer images
FILES = (MANIFEST, INDEX, NAMES, SHARDS)  # of a folder of shards, beside its tars
GLANCE = 1000  # folders that are looked into for a first image


def with_images(folder: str | Path) -> Manifest:
    """The manifest of a shard folder that has samples."""
    manifest = read_manifest(folder)
    if not manifest.samples:
        raise UserError(f"{folder}: has no images")
    return manifest


def labelled(folder: str | Path) -> Manifest:
    """The manifest of a shard folder, with the assurance that every sample has a label."""
    manifest = with_images(folder)
    if bool((manifest.index["label"] < 0).any()):
        raise UserError(f"{folder}: some samples have no label; an evaluation needs every label")
    return manifest


def images_of(train: Manifest, val: Manifest) -> dict[str, str]:
    """What a checkpoint knows of the images that it was trained and validated on, beside their
    indices, which are alike where others of the same sizes are in their place."""
    return {IMAGES["train"]: data_identity(train), IMAGES["val"]: data_identity(val)}


def content_of(settings: object) -> dict[str, str]:
    """Set → what stands for the content of its shards, for a result of settings that name `train`
    and `val`, or one of them: a path may hold others later."""
    folders = {name: getattr(settings, name) for name in IMAGES if hasattr(settings, name)}
    return {name: data_identity(read_manifest(at))[:12] for name, at in folders.items()}


def set_of(key: str) -> str:
    """The set, train or val, that a key of `images_of` is about; any other key as it is."""
    return next((name for name, about in IMAGES.items() if about == key), key)


def check_classes(where: str, labels: np.ndarray) -> None:
    """UserError where all images that would be trained on, at least one, are of one class."""
    if labels.min() == labels.max():
        raise UserError(
            f"{where}: all images are of one class, which every encoder would then answer; give "
            "training images of two classes or more"
        )


def _difference(train: Sequence[str], val: Sequence[str]) -> str:
    """How two lists of names of classes differ."""
    if len(train) != len(val):
        return f"{len(train)} and {len(val)}"
    number = next(n for n, (a, b) in enumerate(zip(train, val, strict=True)) if a != b)
    return f"number {number} is {train[number]} and {val[number]}"


@functools.cache  # once, however many look
def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def say_unseen(where: str, labels: np.ndarray, val: Manifest, classes: int) -> None:
    """A warning where images of `val` are of classes that no training image, of `labels`, is of."""
    seen = np.zeros(classes, bool)
    seen[labels] = True
    if unseen := int((~seen[val.index["label"]]).sum()):
        _warn(
            f"{unseen} of {val.samples} images of --val {val.home} are of classes of which "
            f"{where} has no image: every answer to them is wrong"
        )


def shared_images(train: Manifest, val: Manifest) -> int:
    """How many images of `val` are in `train` too, as of two subsets: at one place of one shard."""
    numbers = {shard.sha256: number for number, shard in enumerate(train.shards)}
    theirs = np.array([numbers.get(shard.sha256, -1) for shard in val.shards])
    if (theirs < 0).all():
        return 0
    widest = int(max(train.table.bytes.max(), val.table.bytes.max())) + 1
    there, here = (
        np.repeat(number, manifest.table.samples) * widest + manifest.index["offset"].astype(int)
        for number, manifest in ((theirs, val), (np.arange(len(train.shards)), train))
    )
    return int(np.isin(there[there >= 0], here).sum())


def class_count(train: Manifest, val: Manifest) -> int:
    """Number of classes, with the assurance that both sets number the same classes alike, and that
    the training set has images of two at least. A warning where both have the same images, where
    the training set has no image of a class, or where the validation set is of one."""
    check_classes(train.home, train.index["label"])
    if train.classes and val.classes and train.classes != val.classes:
        raise UserError(
            f"{train.home} and {val.home} do not have the same classes "
            f"({_difference(train.classes, val.classes)}); make {val.home} with make_shards.py "
            f"--classes-from {train.home}"
        )
    if train.index_sha256 == val.index_sha256 and list(train.shards) == list(val.shards):
        _warn(
            f"--val {val.home} has the images of --train {train.home}: the result is of "
            "training images"
        )
    elif count := shared_images(train, val):
        _warn(
            f"{count} of {val.samples} images of --val {val.home} are in --train {train.home} "
            "too: the result is partly of training images (subset.py --rest leaves them out)"
        )
    largest = {m.home: int(m.index["label"].max()) for m in (train, val)}
    named = next((m for m in (train, val) if m.classes), None)
    if named is None:
        for m in (train, val):
            if largest[m.home] >= max(MOST_CLASSES, m.samples):
                raise UserError(
                    f"{m.home}: has label {largest[m.home]} among {m.samples} images, and "
                    "names no classes; number the labels from 0"
                )
    classes = len(named.classes) if named else max(largest.values()) + 1
    for folder, label in largest.items():  # of the set that names none
        if named and label >= classes:
            raise UserError(
                f"{folder}: has label {label} where {named.folder} names {classes} classes, from "
                "0; make both from one dataset"
            )
    say_unseen(f"--train {train.home}", train.index["label"], val, classes)
    answers = val.index["label"]
    if answers.min() == answers.max():
        names = train.classes or val.classes or tuple(map(str, range(classes)))
        _warn(
            f"all {val.samples} images of --val {val.home} are of one class, {names[answers[0]]}: "
            "a probe that always answers it scores 100 %"
        )
    return classes


def check_images(where: str | Path, root: str | Path | None = None) -> None:
    """UserError where `image_sets.open_images` would find nothing, as far as a glance shows."""
    path = Path(where)
    suffix = path.suffix.lower()
    if root and suffix not in (LIST, *TABLES):
        raise UserError(
            f"--root {root} does nothing with {where}, neither a list nor a table of paths; "
            "leave it out"
        )
    if is_remote(str(where)) or (path / MANIFEST).is_file():
        with_images(where)
    elif not path.exists():
        raise UserError(not_there(where))
    elif root and not Path(root).is_dir():
        raise UserError(f"--root {root}: no such folder")
    elif suffix == LIST:
        check_files([Path(root or path.parent) / listed_in(path)[0]])
    elif path.is_dir() and (path / "train" / MANIFEST).is_file():
        raise UserError(f"{path}: holds folders of shards; give one of them, such as {path}/train")
    elif path.is_dir() and not _may_hold_images(path):
        below = shards_below(path)
        advice = f"holds folders of shards; give one of them, such as {below}"
        raise UserError(f"{path}: {advice if below else 'holds no images'}")
    elif path.name in FILES and (path.parent / MANIFEST).is_file():
        raise UserError(f"{path}: is a file; give the folder of the shards, {path.parent}")
    elif is_image(path.name):
        raise UserError(f"{path}: is one image; give its folder, or a table of paths")


def _may_hold_images(folder: Path) -> bool:
    """Whether an image, or a tar, is in the first folders below this one that hold no shards, or
    there are more."""
    for number, (_, below, names) in enumerate(os.walk(folder, followlinks=True)):
        if MANIFEST in names:
            below.clear()
            continue
        if number == GLANCE or any(is_image(name) or is_archive(name) for name in names):
            return True
    return False


def listed_in(path: Path) -> list[str]:
    """The lines of a list of paths. UserError where there are none."""
    lines = read_list(path)
    if not lines:
        raise UserError(f"{path}: names no image; write one path per line")
    return lines


def check_files(files: Iterable[str | Path]) -> None:
    """UserError for the first that is no file."""
    for file in files:
        with naming(file, "cannot be read"):
            os.stat(file)
        if not Path(file).is_file():
            raise UserError(f"{file}: is not an image file")

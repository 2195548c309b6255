"""The labels of the sets that an evaluation trains and scores on."""

import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import UserError, naming
from shard_tools.manifest import MANIFEST, Manifest, is_remote, read_manifest


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


def class_count(train: Manifest, val: Manifest) -> int:
    """Number of classes, with the assurance that both sets number the same classes alike."""
    if train.classes and val.classes and train.classes != val.classes:
        raise UserError(
            f"{train.folder} and {val.folder} do not have the same classes "
            f"({len(train.classes)} and {len(val.classes)}); make both from one dataset"
        )
    labels = max(int(m.index["label"].max()) + 1 for m in (train, val))
    return max(labels, len(train.classes), len(val.classes))


def check_images(where: str | Path) -> None:
    """UserError where there is nothing that `image_sets.open_images` could list."""
    if is_remote(str(where)) or (Path(where) / MANIFEST).is_file():
        read_manifest(where)
    elif not Path(where).exists():
        raise UserError(f"{where}: no such file or folder")


def check_files(files: Iterable[str | Path]) -> None:
    """UserError for the first that is no file."""
    for file in files:
        with naming(file, "cannot be read"):
            os.stat(file)
        if not Path(file).is_file():
            raise UserError(f"{file}: is no image file")

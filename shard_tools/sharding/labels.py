"""Labels of images that are in no class folder: ImageNet's validation set, above all.

Labels come as one synset per line in name order, as `name synset` lines, from the development kit,
from Kaggle's LOC_val_solution.csv, or from the file names of Hugging Face's archives.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
import sys
from pathlib import Path

from pipeline.errors import naming
from shard_tools.cli import ToolError, read_list
from shard_tools.sharding.found import Found, Images
from shard_tools.sharding.imagenet_devkit import validation_synsets

# By file name with or without its suffix, or in the order of the names.
Labels = dict[str, str] | list[str]

_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")
_NAMED = re.compile(r"(?P<stem>.+)_(?P<synset>n\d{8})(?P<suffix>\.\w+)")
_IMAGENET = re.compile(r"(n\d{8}_\d+|ILSVRC2012_\w+)")


def read_labels(synsets: Path | None, devkit: Path | None) -> Labels | None:
    """The labels that --synsets (one synset per line in name order, or `name synset` lines) or
    --devkit (ILSVRC2012_devkit_t12 as a folder or tar) name; None without either."""
    if synsets and devkit:
        raise ToolError("give --synsets or --devkit, not both")
    if devkit:
        return validation_synsets(devkit)
    if not synsets:
        return None
    if synsets.suffix.lower() == ".csv":
        return read_solution(synsets)
    lines = [line.split() for line in read_list(synsets)]
    widths = {len(line) for line in lines}
    if widths == {1}:
        return [line[0] for line in lines]
    if widths == {2}:
        labels = {line[0]: line[1] for line in lines}
        if len(labels) == len(lines):
            return labels
        raise ToolError(f"{synsets}: names an image twice")
    raise ToolError(f"{synsets}: each line must be `synset` or `image-name synset`")


def read_solution(path: Path) -> dict[str, str]:
    """Kaggle's LOC_val_solution.csv: ImageId, PredictionString (`synset box [synset box …]`)."""
    with naming(path, "cannot be read"):
        return parse_solution(path.read_bytes(), str(path))


def parse_solution(data: bytes, path: str) -> dict[str, str]:
    """As `read_solution`, of the bytes of a file, which is called `path`."""
    try:
        text = data.decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ToolError(f"{path}: cannot be read ({error})") from error
    if not rows or [name.strip().lower() for name in rows[0]] != ["imageid", "predictionstring"]:
        raise ToolError(f"{path}: lacks the columns ImageId and PredictionString")
    labels: dict[str, str] = {}
    for number, row in enumerate(rows[1:], 1):
        if len(row) != 2 or not row[1].split():
            raise ToolError(f"{path}: row {number} is not `ImageId,synset box`")
        if row[0] in labels:
            raise ToolError(f"{path}: row {number} names {row[0]} a second time")
        labels[row[0]] = row[1].split()[0]
    return labels


def parse_annotations(data: bytes, path: str) -> dict[str, str]:
    """Of the bytes of Tiny ImageNet's val_annotations.txt, called `path`: lines of an image, its
    synset and a box, separated by tabs."""
    lines = [line.split("\t") for line in data.decode(errors="replace").splitlines() if line]
    labels = {line[0]: line[1] for line in lines if len(line) == 6}
    if len(labels) != len(lines):
        raise ToolError(f"{path}: each line must be an image, its synset and a box, once each")
    return labels


def label_flat(found: Found, labels: Labels, where: str, skip: bool) -> list[str]:
    """A synset for each image; the images are renamed to `synset/name`, as in a class folder.

    UserError for an image without a label, and (unless `skip`) for labels without their image.
    """
    names = found.images.names
    by_name = _by_name(sorted(names), labels, where) if isinstance(labels, list) else labels
    used, synsets = set(), []
    for name in names:
        key = next((key for key in (name, posixpath.splitext(name)[0]) if key in by_name), None)
        if key is None:
            raise ToolError(f"{where}: the label file has no line for {name}")
        used.add(key)
        synsets.append(by_name[key])
    absent = sorted(by_name.keys() - used)
    if absent:
        with found.catching(absent[0], skip):
            raise ToolError(
                f"{where}: {len(absent)} of {len(by_name)} labelled images are not there, "
                f"such as {absent[0]}"
            )
    found.images = Images(
        image._replace(name=f"{synset}/{image.name}")
        for image, synset in zip(found.images, synsets, strict=True)
    )
    return synsets


def _by_name(names: list[str], labels: list[str], where: str) -> dict[str, str]:
    """Labels in name order by name. ImageNet's names say their number, so one that is missing
    does not shift the others; other names need one label each."""
    numbers = [_VALIDATION.fullmatch(posixpath.splitext(name)[0]) for name in names]
    if names and all(numbers):
        return {f"ILSVRC2012_val_{i:08d}": synset for i, synset in enumerate(labels, 1)}
    if len(labels) != len(names):
        raise ToolError(f"{where}: {len(names)} images, but {len(labels)} labels are given")
    return dict(zip(names, labels, strict=True))


def labels_in_names(found: Found) -> list[str]:
    """Synsets from the names of Hugging Face's archives, `n01440764_18_n01440764.JPEG`; the images
    are renamed to `n01440764/n01440764_18.JPEG`. [] where not all names are of this kind."""
    synsets = []
    for name in found.images.names:
        match = _NAMED.fullmatch(name)
        if match is None or not _IMAGENET.fullmatch(match["stem"]):
            return []
        synsets.append(sys.intern(match["synset"]))
    found.images = Images(
        image._replace(name=f"{match['synset']}/{match['stem']}{match['suffix']}")
        for image in found.images
        if (match := _NAMED.fullmatch(image.name))
    )
    return synsets

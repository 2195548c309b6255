"""Choose samples of a shard folder: a subset is a small index over the same shards, not a copy.

    python shard_tools/subset.py data/shards/train data/shards/train-10percent --fraction 0.1

Exactly one way to choose is given:
  --fraction F    stratified: the share F of every class (at least one image)
  --names FILE    the images whose file names FILE lists, one per line (SimCLR's 10percent.txt);
                  of adopted tars, whose samples have keys, those with the same stem. Folders may
                  stand before a name, and then must be the image's
  --classes FILE  the classes FILE lists, renumbered in their old order (ImageNet-100)
  --count N       N images: --choose random | first | one-class | one-per-class
`--rest` takes all the others: with the same choice a held-out part and what is left.
`--copy` writes tars of their own instead. A draw depends on the seed and on the original names
only, so shards of another size, order or resolution give the same images.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import check_range, naming
from pipeline.help_text import HelpFormatter
from shard_tools.atomic import check_writable
from shard_tools.cli import (
    ToolError,
    byte_size,
    counted,
    parse,
    read_list,
    run,
    seed_number,
    shard_bytes,
    worker_count,
)
from shard_tools.cores import cores
from shard_tools.manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from shard_tools.sharding.copy_samples import copy_samples
from shard_tools.sharding.found import EXTENSIONS
from shard_tools.texts import Texts

CHOICES = ("random", "first", "one-class", "one-per-class")
SHARD_SIZE = "256MiB"


def ranks(manifest: Manifest, seed: int) -> np.ndarray:
    """A pseudo-random uint64 per sample from (seed, original name), or from its number where no
    names were recorded: int order, independent of how the shards were packed."""
    keys = manifest.names or map(str, range(manifest.samples))
    salt, digests = f"subset {seed}".encode(), bytearray()
    for key in keys:
        digests += hashlib.blake2b(key.encode(), key=salt, digest_size=8).digest()
    return np.frombuffer(digests, "<u8")


def by_fraction(manifest: Manifest, fraction: float, seed: int) -> np.ndarray:
    """`fraction` of every class, rounded, at least one image; sample numbers, ascending."""
    check_range("--fraction", fraction, above=0, at_most=1)
    labels = manifest.index["label"]
    order = np.lexsort((ranks(manifest, seed), labels))  # class by class, shuffled inside
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    taken = np.maximum(1, (sizes * fraction + 0.5).astype(np.int64))
    return np.sort(np.concatenate([order[a : a + n] for a, n in zip(first, taken, strict=True)]))


def by_names(manifest: Manifest, path: Path) -> np.ndarray:
    """Samples whose file name is in the list: the name itself, else its stem (the keys of adopted
    tars have no suffix); in the same folders, as far as both name some. Every listed name must be
    there exactly once."""
    wanted = {os.path.normpath(line.strip()) for line in _lines(path)}
    if not wanted:
        raise ToolError(f"{path}: lists no image")
    if not manifest.names:
        raise ToolError(f"{manifest.home}: no file names were recorded; --fraction can be used")
    exact, stems = _numbers(manifest.names, {os.path.basename(name) for name in wanted})
    found = {}
    for name in wanted:
        base = os.path.basename(name)
        numbers = exact.get(base) or stems.get(_stem(base), [])
        found[name] = [n for n in numbers if _folders_agree(name, manifest.names[n])]
    missing = [name for name in wanted if not found[name]]
    if missing:
        raise ToolError(
            f"{path}: {len(missing)} of {len(wanted)} names are not in {manifest.home}, "
            f"such as {min(missing)}"
        )
    for name in sorted(wanted):
        if len(found[name]) > 1:
            first, second = (manifest.names[number] for number in found[name][:2])
            raise ToolError(
                f"{manifest.home}: {name} of {path} occurs more than once, as {first} and {second}"
            )
    chosen = np.unique([numbers[0] for numbers in found.values()])
    if len(chosen) != len(wanted):
        raise ToolError(f"{path}: two of its names stand for one image of {manifest.home}")
    return chosen


def _folders_agree(one: str, other: str) -> bool:
    """Whether two paths have the same folders, from the innermost to where one of them begins."""
    plain = (os.path.normpath(path) for path in (one, other))  # a URL has an empty part, too
    folders = (path.split("/")[-2::-1] for path in plain)
    return all(a == b for a, b in zip(*folders, strict=False))


def _numbers(
    names: Iterable[str], wanted: set[str]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The positions of each file name that is wanted, and of each stem of one."""
    exact: dict[str, list[int]] = {}
    stems: dict[str, list[int]] = {_stem(name): [] for name in wanted}
    for number, name in enumerate(map(os.path.basename, names)):
        if name in wanted:
            exact.setdefault(name, []).append(number)
        if (stem := _stem(name)) in stems:
            stems[stem].append(number)
    return exact, stems


def _stem(name: str) -> str:
    """A file name without the suffix of an image."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in EXTENSIONS else name


def by_classes(manifest: Manifest, path: Path) -> np.ndarray:
    """All samples of the listed classes: a name per line, which may have text behind it."""
    lines = [line.strip() for line in _lines(path)]
    wanted = [line if line in manifest.classes else line.split()[0] for line in lines]
    unknown = set(wanted) - set(manifest.classes)
    if unknown or not wanted:
        example = f"such as {min(unknown)}" if unknown else "it is empty"
        raise ToolError(f"{path}: not all of its classes are in {manifest.home}, {example}")
    numbers = [manifest.classes.index(name) for name in wanted]
    return np.flatnonzero(np.isin(manifest.index["label"], numbers))


def by_count(
    manifest: Manifest, count: int, choose: str, seed: int, class_name: str | None
) -> np.ndarray:
    """`count` samples. first: in shard order; one-class: of the class `class_name`, or of one
    drawn among those large enough; one-per-class: one of each of `count` classes."""
    labels = manifest.index["label"]
    order = np.argsort(ranks(manifest, seed), kind="stable")
    if choose == "first":
        candidates = np.arange(manifest.samples)
    elif choose == "random":
        candidates = order
    elif choose == "one-class":
        label = _one_class(manifest, count, seed, class_name)
        candidates = order[labels[order] == label]
    else:
        _, first = np.unique(labels[order], return_index=True)
        candidates = order[np.sort(first)]
    if not 1 <= count <= len(candidates):
        raise ToolError(
            f"--count {count} with --choose {choose}: {manifest.home} offers 1 to "
            f"{len(candidates)} images"
        )
    return np.sort(candidates[:count])


def _one_class(manifest: Manifest, count: int, seed: int, class_name: str | None) -> int:
    if class_name is not None:
        if class_name not in manifest.classes:
            raise ToolError(f"--class {class_name}: not a class of {manifest.home}")
        return manifest.classes.index(class_name)
    sizes = np.bincount(np.maximum(manifest.index["label"], 0))
    large = np.flatnonzero(sizes >= count)
    if not len(large):
        raise ToolError(f"{manifest.home}: the largest class has {sizes.max()} images, not {count}")
    names = [manifest.classes[i] if manifest.classes else str(i) for i in large]
    digest = [hashlib.blake2b(n.encode(), key=str(seed).encode()).digest() for n in names]
    return int(large[digest.index(min(digest))])


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ToolError(f"{path}: no such file")
    return read_list(path)


@dataclass(frozen=True)
class Choice:
    """One way to choose samples: exactly one of fraction, names, classes and count.

    fraction: share of every class. names, classes: lists in files; classes are renumbered. count:
    this many images, chosen as `choose` says (class_name: of one-class). seed: of every draw. rest:
    the samples that are not chosen instead.
    """

    fraction: float | None = None
    names: Path | None = None
    classes: Path | None = None
    count: int | None = None
    choose: str = "random"
    class_name: str | None = None
    seed: int = 0
    rest: bool = False

    def record(self) -> dict[str, Any]:
        """How the samples were chosen, for the manifest."""
        record = asdict(self)
        for key in ("names", "classes"):
            record[key] = record[key].name if record[key] else None
        if self.count is None:
            record["choose"] = None
        record["rest"] = self.rest or None
        return {key: value for key, value in record.items() if value is not None}


def choose_samples(manifest: Manifest, choice: Choice) -> np.ndarray:
    """Sample numbers, ascending, one at least. ToolError where the choice cannot be made."""
    if not manifest.samples:
        raise ToolError(f"{manifest.home}: holds no image to choose from")
    chosen = _rest(manifest, choice) if choice.rest else _chosen(manifest, choice)
    if not len(chosen):
        raise ToolError(f"{manifest.home}: none of its images is chosen")
    return chosen


def _chosen(manifest: Manifest, choice: Choice) -> np.ndarray:
    if choice.class_name is not None and choice.choose != "one-class":
        raise ToolError("--class belongs to --choose one-class")
    if choice.fraction is not None:
        return by_fraction(manifest, choice.fraction, choice.seed)
    if choice.names is not None:
        return by_names(manifest, choice.names)
    if choice.classes is not None:
        return by_classes(manifest, choice.classes)
    if choice.count is None:
        raise ToolError("a choice needs one of fraction, names, classes and count")
    return by_count(manifest, choice.count, choice.choose, choice.seed, choice.class_name)


def _rest(manifest: Manifest, choice: Choice) -> np.ndarray:
    if choice.classes is not None:
        raise ToolError("--rest does not go with --classes: list the other classes")
    chosen = _chosen(manifest, replace(choice, rest=False))
    left = np.setdiff1d(np.arange(manifest.samples), chosen)
    if not len(left):
        raise ToolError(f"{manifest.home}: --rest leaves no image, since all of them are chosen")
    return left


def renumber(manifest: Manifest, rows: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Rows and classes with labels 0…n-1 for the classes that occur, in their old order."""
    kept = np.unique(rows["label"])
    rows = rows.copy()
    rows["label"] = np.searchsorted(kept, rows["label"])
    return rows, tuple(manifest.classes[label] for label in kept)


@dataclass(frozen=True)
class Chosen:
    """Samples of a manifest on their way to a folder of their own."""

    shard: np.ndarray
    rows: np.ndarray
    names: Texts
    classes: tuple[str, ...]
    made: dict[str, Any]


def take(manifest: Manifest, samples: np.ndarray, record: dict[str, Any], kind: str) -> Chosen:
    """The rows of chosen samples; a choice of classes renumbers them."""
    shard, rows = manifest.locate(samples)
    classes = manifest.classes
    if "classes" in record:
        rows, classes = renumber(manifest, rows)
    names = Texts(manifest.names[i] for i in samples) if manifest.names else Texts()
    made: dict[str, Any] = {
        "kind": kind,
        "tool": "subset",
        "version": version("relaxmim"),
        "of": manifest.index_sha256,
        "options": record,
    }
    if manifest.made.get("unlabelled"):
        made["unlabelled"] = True
    if marked := int(np.count_nonzero(rows["interval"])):
        made["restart_markers"] = {"images": marked}
    return Chosen(shard, rows, names, classes, made)


def write_subset(
    manifest: Manifest, dest: Path, samples: np.ndarray, record: dict[str, Any]
) -> Chosen:
    """Write a subset as a small index over the same tars.

    samples: numbers in the manifest, ascending; record: how they were chosen. ToolError where
    `dest` is not empty.
    """
    check_empty(dest)
    chosen = take(manifest, samples, record, "subset")
    made = dict(chosen.made)
    if chosen.classes != stored_classes(manifest):
        made["stored_classes"] = list(stored_classes(manifest))
    if manifest.made.get("lenient"):
        made["lenient"] = True
    with naming(dest, "cannot be written"):
        write_manifest(
            dest,
            shards=kept_shards(manifest, chosen.shard),
            index=chosen.rows,
            classes=chosen.classes,
            made=made,
            names=chosen.names,
            shard_folder=manifest.folder,
        )
    return chosen


def check_empty(dest: Path) -> None:
    """UserError unless the folder is new or empty, and can be written."""
    with naming(dest, "cannot be read"):
        used = (dest / MANIFEST).exists() or (dest.is_dir() and any(dest.iterdir()))
    if used:
        raise ToolError(f"{dest}: is not empty; give another folder")
    check_writable(dest, folder=True)


def choice_of(options: argparse.Namespace) -> Choice:
    """What a command line chooses. ToolError for an option that would do nothing."""
    if options.choose and options.count is None:
        raise ToolError(f"--choose {options.choose} belongs to --count")
    if options.shard_size is not None and not options.copy:
        raise ToolError("--shard-size belongs to --copy: without it no tar is written")
    if options.workers is not None and not options.copy:
        raise ToolError("--workers belongs to --copy: an index is written by this process")
    drawn = options.fraction is not None or (
        options.count is not None and options.choose != "first"
    )
    if options.seed is not None and not drawn:
        raise ToolError("--seed belongs to --fraction and --count: nothing else is drawn")
    given = {field.name: getattr(options, field.name) for field in fields(Choice)}
    chosen = {"choose": options.choose or Choice.choose, "seed": options.seed or Choice.seed}
    return Choice(**given | chosen)


def subset(options: argparse.Namespace) -> int:
    """The command."""
    manifest = read_manifest(options.source)
    choice = choice_of(options)
    dest: Path = options.dest
    check_empty(dest)
    samples = choose_samples(manifest, choice)
    if not options.copy:
        chosen = write_subset(manifest, dest, samples, choice.record())
        classes = f", {counted(len(chosen.classes), 'class')}" if chosen.classes else ""
        print(f"{dest}: {len(samples)} of {counted(manifest.samples, 'image')}{classes}, by index")
        return 0
    chosen = take(manifest, samples, choice.record(), "shards")
    size = copy_samples(
        manifest,
        chosen.shard,
        chosen.rows,
        dest,
        classes=chosen.classes,
        names=chosen.names,
        made=chosen.made,
        shard_size=byte_size(SHARD_SIZE) if options.shard_size is None else options.shard_size,
        workers=cores() if options.workers is None else options.workers,
    )
    print(f"{dest}: copied {len(samples)} of {manifest.samples} images, {size / 1e6:.1f} MB")
    return 0


def kept_shards(manifest: Manifest, shard: np.ndarray) -> list[Shard]:
    """The shards that still hold samples, with their new counts."""
    counts = np.bincount(shard, minlength=len(manifest.shards))
    return [
        Shard(old.name, int(count), old.bytes, old.sha256)
        for old, count in zip(manifest.shards, counts, strict=True)
        if count
    ]


def stored_classes(manifest: Manifest) -> tuple[str, ...]:
    """What the numbers inside the tars mean: a subset of a subset keeps the first meaning."""
    return tuple(manifest.made.get("stored_classes", manifest.classes))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Choose samples of a shard folder; the result is a small index over it.",
        formatter_class=HelpFormatter,
    )
    a = p.add_argument
    a("source", metavar="FOLDER", help="folder (or fsspec URL) with a manifest")
    a("dest", type=Path, metavar="DEST", help="folder for the subset")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--fraction", type=float, help="share of every class, stratified")
    way.add_argument("--names", type=Path, metavar="FILE", help="list of file names")
    way.add_argument("--classes", type=Path, metavar="FILE", help="list of classes; renumbered")
    way.add_argument("--count", type=int, metavar="N", help="this many images, see --choose")
    a("--choose", choices=CHOICES, help=f"how --count chooses (default: {Choice.choose})")
    a("--class", dest="class_name", metavar="NAME", help="the class of --choose one-class")
    a("--seed", type=seed_number, metavar="N", help="seed of every draw (default: 0)")
    a("--rest", action="store_true", help="take the images that are not chosen")
    a("--copy", action="store_true", help="write tars of their own instead of an index")
    a(
        "--shard-size",
        type=shard_bytes,
        metavar="BYTES",
        help=f"with --copy: bytes of a shard, at most (default: {SHARD_SIZE})",
    )
    a(
        "--workers", type=worker_count, metavar="N",
        help=f"with --copy: processes (default: {cores()})",
    )  # fmt: skip
    return p


def main(arguments: list[str] | None = None) -> int:
    return run(subset, parse(parser(), arguments))


if __name__ == "__main__":
    sys.exit(main())

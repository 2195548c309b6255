"""Adopt WebDataset tars that others wrote: write a manifest for them and leave them as they are.

    python shard_tools/index_shards.py TARS

Known are the layouts of webdataset's own writers, of img2dataset (jpg, txt, json) and of timm's
ImageNet shards (jpg, cls, json): the image is the first of the fields jpg, jpeg, png, webp, tif, …
(in any case; also input.jpg) or the one that --image-field names; the label is the number in
`cls`, else `label` in the json, else none.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import is_url, naming, not_there
from pipeline.help_text import HelpFormatter
from shard_tools.atomic import check_writable, write_atomic
from shard_tools.class_list import read_classes
from shard_tools.cli import ToolError, counted, images_of, parse, run, worker_count
from shard_tools.cores import cores
from shard_tools.manifest import MANIFEST, write_manifest
from shard_tools.sharding.adopt import (
    Adopted,
    IndexJob,
    Settings,
    adopt,
    class_names,
    same_labels,
    unique_names,
)
from shard_tools.sharding.found import HELD_OUT, TRAINING
from shard_tools.sharding.merge import REPORT, report_lines
from shard_tools.sharding.stored_sample import printable
from shard_tools.sharding.tar_files import tar_files
from shard_tools.workers import map_in_workers


@dataclass(frozen=True)
class Tars:
    """Tars by their names relative to `folder`; folders: those, also relative, that were searched
    for tars."""

    folder: Path
    names: tuple[str, ...]
    folders: tuple[str, ...]


def index_shards(
    tars: Tars, output: Path, settings: Settings, *, replace_old: bool, workers: int
) -> None:
    """Read all tars, then write report and manifest into `output`."""
    if (output / MANIFEST).exists() and not replace_old:
        raise ToolError(f"{output}: already has a {MANIFEST}; --replace overwrites it")
    check_writable(output, folder=True)
    jobs = [IndexJob(i, tars.folder, name, settings) for i, name in enumerate(tars.names)]
    read = map_in_workers(
        adopt, jobs, workers=workers, description=f"index of {tars.folder}", total=None
    )
    found = same_labels(sorted(read, key=lambda adopted: adopted.number), settings)
    with naming(output, "cannot be written"):
        write(output, tars, found, settings)


def find_tars(given: Sequence[Path]) -> Tars:
    """All given tars: files, or those below given folders."""
    paths: list[Path] = []
    searched: list[Path] = []
    for source in given:
        path = Path(os.path.abspath(source))
        if path.is_dir():
            with naming(path, "cannot be read"):
                below = tar_files(path)
            _check_one_set(path, below)
            paths += [path / name for name in below]
            searched.append(path)
        elif os.path.lexists(path):
            paths.append(path)
        else:
            braces = "; give the folder, or braces without quotes" if "{" in path.name else ""
            raise ToolError(not_there(source if is_url(source) else path) + braces)
    if not paths:
        raise ToolError(f"{given[0]}: holds no .tar files")
    first: dict[str, Path] = {}
    for path in paths:
        other = first.setdefault(os.path.realpath(path), path)
        if other is not path:
            raise ToolError(f"{path}: the same tar is given twice, also as {other}")
    folder = Path(os.path.commonpath([*(path.parent for path in paths), *searched]))
    names = tuple(str(path.relative_to(folder)) for path in paths)
    return Tars(folder, names, tuple(str(path.relative_to(folder)) for path in searched))


def _check_one_set(folder: Path, names: Sequence[str]) -> None:
    """UserError where the tars below a folder are, by their names, a training set and another."""
    words = [(name, set(re.split("[^a-z]+", name.lower()))) for name in names]
    training = [name for name, called in words if called & TRAINING and not called & HELD_OUT]
    held_out = [name for name, called in words if called & HELD_OUT and not called & TRAINING]
    if training and held_out:
        raise ToolError(
            f"{folder}: holds a training set and a held-out one ({training[0]}, {held_out[0]}); "
            "give the tars of one of them, or all tars by name if they are meant together"
        )


def write(output: Path, tars: Tars, found: list[Adopted], settings: Settings) -> None:
    """Report and manifest; says in one line what was adopted."""
    parts = [adopted.part for adopted in found if adopted.part.shard]
    remarks = [
        (printable(name), what, printable(reason))
        for adopted in found
        for name, what, reason in adopted.part.report
    ]
    if not parts:
        raise ToolError(
            f"{tars.folder}: no sample of the tars can be used; the first: "
            f"{remarks[0][0]}: {remarks[0][2]}"
        )
    index = np.concatenate([part.rows for part in parts])
    counts = Counter(what for _, what, _ in remarks)
    made: dict[str, Any] = {
        "kind": "index",
        "tool": "index_shards",
        "version": version("relaxmim"),
        "report": {what: counts[what] for what in ("skipped", "ignored")},
        "folders": list(tars.folders),
        "left_out": {adopted.name: adopted.left_out for adopted in found if adopted.left_out},
        "lenient": settings.lenient,
        "unlabelled": settings.unlabelled,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / REPORT, report_lines(remarks))
    manifest = write_manifest(
        output,
        shards=[part.shard for part in parts if part.shard],
        index=index,
        classes=settings.classes or class_names(index, found),
        made=made,
        names=unique_names(parts),
        shard_folder=None if output.absolute() == tars.folder else tars.folder,
    )
    listed = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    see = f"; {listed} (see {output / REPORT})" if listed else ""
    print(
        f"{output}: adopted {images_of(manifest.samples, len(manifest.classes))} in "
        f"{counted(len(manifest.shards), 'shard')}{see}"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Write a manifest for WebDataset tars that others wrote.",
        formatter_class=HelpFormatter,
    )
    a = p.add_argument
    a("tars", type=Path, nargs="+", metavar="TARS", help="tars, or folders that hold them")
    a("--output", type=Path, metavar="FOLDER", help="where to write it (default: beside the tars)")
    a("--image-field", metavar="FIELD", help="field of the image, such as `left.jpg` or `*.jpg`")
    a("--classes-from", type=Path, metavar="PATH", help="class names: a shard folder or a list")
    a("--unlabelled", action="store_true", help="take the images only, whatever labels they have")
    a("--lenient", action="store_true", help="accept tars without the two zero blocks at their end")
    a(
        *("--on-error",), choices=("fail", "skip"), default="fail",
        help="what to do with a tar or sample that cannot be used",
    )  # fmt: skip
    a("--replace", action="store_true", help="replace an older manifest")
    a("--workers", type=worker_count, default=cores(), metavar="N", help="processes")
    return p


def command(options: argparse.Namespace) -> int:
    if options.unlabelled and options.classes_from:
        raise ToolError("--classes-from names labels, which --unlabelled leaves out; give one")
    fields = (options.image_field or "").lower().split(";")
    settings = Settings(
        on_error=options.on_error,
        image_fields=tuple(text for name in fields if (text := name.strip().removeprefix("."))),
        unlabelled=options.unlabelled,
        lenient=options.lenient,
        classes=read_classes(options.classes_from),
    )
    tars = find_tars(options.tars)
    output = options.output or tars.folder
    index_shards(tars, output, settings, replace_old=options.replace, workers=options.workers)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(command, parse(parser(), arguments))


if __name__ == "__main__":
    sys.exit(main())

"""Adopt WebDataset tars that others wrote: write a manifest for them and leave them as they are.

    python shard_tools/index_shards.py TARS

Known are the layouts of webdataset's own writer, of img2dataset (jpg, txt, json) and of timm's
ImageNet shards (jpg, cls, json): the image is the first of the fields jpg, jpeg, png, webp; the
label is the number in `cls`, else `label` in the json, else none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import naming
from shard_tools.atomic import write_atomic
from shard_tools.class_list import read_classes
from shard_tools.cli import HelpFormatter, ToolError, cores, run
from shard_tools.manifest import FORMATS, MANIFEST, SAMPLE, Shard, write_manifest
from shard_tools.sharding.images import ImageFault, probe
from shard_tools.sharding.layout import Part
from shard_tools.sharding.merge import REPORT, report_lines
from shard_tools.sharding.tables import MOST_CLASSES
from shard_tools.tar import (
    Sample,
    TarError,
    file_sha256,
    image_field,
    read_range,
    read_samples,
)
from shard_tools.workers import map_in_workers, report, working_on

_NAME_KEYS = ("name", "filename", "url", "key")  # of the json, for the original name


@dataclass(frozen=True)
class IndexJob:
    """One tar to read; `name` is relative to `folder`."""

    number: int
    folder: Path
    name: str
    on_error: str


@dataclass(frozen=True)
class Adopted:
    """What was found in one tar; synsets: label → name, as far as the json fields say."""

    number: int
    part: Part
    synsets: dict[int, str]


def adopt(job: IndexJob) -> Adopted:
    """Read one tar. Raises ToolError for a damaged tar, or (on_error "fail") an unusable sample."""
    path = job.folder / job.name
    working_on(path)
    with naming(path, "cannot be read"):
        return _adopt(job, path)


def _adopt(job: IndexJob, path: Path) -> Adopted:
    size = os.path.getsize(path)
    rows, names, remarks, synsets = [], [], [], {}
    handle = os.open(path, os.O_RDONLY)
    try:
        for sample in read_samples(path):
            try:
                row, name, synset = read_sample(handle, sample)
            except (ImageFault, TarError) as fault:
                if job.on_error == "fail":
                    raise ToolError(
                        f"{path}: sample {sample.key!r}: {fault}; --on-error skip leaves it out"
                    ) from None
                remarks.append((sample.key, "skipped", str(fault)))
                continue
            rows.append(row)
            names.append(name)
            report(row[1])
            if synset:
                synsets[row[2]] = synset
    finally:
        os.close(handle)
    shard = Shard(job.name, len(rows), size, file_sha256(path)) if rows else None
    part = Part(shard, np.array(rows, SAMPLE), names, remarks)
    return Adopted(job.number, part, synsets)


def read_sample(handle: int, sample: Sample) -> tuple[tuple[int, ...], str, str]:
    """SAMPLE row, original name and synset ("" if unknown). Raises ImageFault with the reason."""
    field = image_field(sample)
    if not field:
        raise ImageFault(f"has no image, only {', '.join(sorted(sample.fields))}")
    place = sample.fields[field]
    kind, width, height, orientation = probe(read_range(handle, place))
    if max(width, height) > np.iinfo("u2").max:
        raise ImageFault(f"{width} x {height} pixels are too many")
    about = _json(handle, sample)
    row = (*place, _label(handle, sample, about), width, height, orientation)
    name = next((about[key] for key in _NAME_KEYS if isinstance(about.get(key), str)), sample.key)
    synset = about.get("synset")
    return (
        (*row, FORMATS.index(kind), 0),
        name.replace("\n", " "),
        synset if isinstance(synset, str) else "",
    )


def _json(handle: int, sample: Sample) -> dict[str, Any]:
    if "json" not in sample.fields:
        return {}
    try:
        about = json.loads(read_range(handle, sample.fields["json"]))
    except ValueError as error:
        raise ImageFault(f"its json cannot be read ({error})") from error
    return about if isinstance(about, dict) else {}


def _label(handle: int, sample: Sample, about: dict[str, Any]) -> int:
    if "cls" not in sample.fields:
        label = about.get("label", -1)
        return label if isinstance(label, int) and 0 <= label < MOST_CLASSES else -1
    text = read_range(handle, sample.fields["cls"]).decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) >= MOST_CLASSES:
        raise ImageFault(f"its cls is {text[:40]!r}, not a class index")
    return int(text)


def index_shards(options: argparse.Namespace) -> int:
    """The command: read all tars, then write the manifest."""
    with naming(options.tars[0], "cannot be read"):
        folder, names = find_tars(options.tars)
    output: Path = options.output or folder
    if (output / MANIFEST).exists() and not options.replace:
        raise ToolError(f"{output}: already has a {MANIFEST}; --replace overwrites it")
    jobs = [IndexJob(i, folder, name, options.on_error) for i, name in enumerate(names)]
    found: list[Adopted | None] = [None] * len(jobs)
    for adopted in map_in_workers(
        adopt, jobs, workers=options.workers, description=f"index of {folder}", total=None
    ):
        found[adopted.number] = adopted
    classes = read_classes(options.classes_from)
    with naming(output, "cannot be written"):
        write(output, folder, [a for a in found if a], classes)
    return 0


def find_tars(given: list[Path]) -> tuple[Path, list[str]]:
    """The folder that holds all given tars (files, or folders of tars), and their names in it."""
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            paths += sorted(path.rglob("*.tar"))
        elif path.is_file():
            paths.append(path)
        else:
            raise ToolError(f"{path}: no such file or folder")
    paths = [path.absolute() for path in paths]
    if not paths:
        raise ToolError(f"{given[0]}: holds no .tar files")
    if len(set(paths)) != len(paths):
        raise ToolError("the same tar is given twice")
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    return folder, [str(path.relative_to(folder)) for path in paths]


def write(output: Path, folder: Path, found: list[Adopted], classes: tuple[str, ...]) -> None:
    """Report and manifest; says in one line what was adopted."""
    parts = [adopted.part for adopted in found if adopted.part.shard]
    remarks = [line for adopted in found for line in adopted.part.report]
    if not parts:
        raise ToolError(f"{folder}: the tars hold no samples with an image")
    index = np.concatenate([part.rows for part in parts])
    made = {
        "kind": "index",
        "tool": "index_shards",
        "version": version("relaxmim"),
        "report": {"skipped": len(remarks)},
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / REPORT, report_lines(remarks))
    manifest = write_manifest(
        output,
        shards=[part.shard for part in parts if part.shard],
        index=index,
        classes=classes or class_names(index, found),
        made=made,
        names=[name for part in parts for name in part.names],
        shard_folder=None if output.absolute() == folder else folder,
    )
    skipped = f"; {len(remarks)} skipped (see {output / REPORT})" if remarks else ""
    print(
        f"{output}: adopted {manifest.samples} images of {len(manifest.classes)} classes in "
        f"{len(manifest.shards)} shards{skipped}"
    )


def class_names(index: np.ndarray, found: list[Adopted]) -> tuple[str, ...]:
    """Names by label: the synset that the json fields give, else the number."""
    known: dict[int, str] = {}
    for adopted in found:
        known |= adopted.synsets
    count = int(index["label"].max()) + 1
    names = tuple(known.get(label, str(label)) for label in range(count))
    return names if len(set(names)) == count else tuple(map(str, range(count)))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Write a manifest for WebDataset tars that others wrote.",
        formatter_class=HelpFormatter,
    )
    a = p.add_argument
    a("tars", type=Path, nargs="+", metavar="TARS", help="tars, or folders that hold them")
    a("--output", type=Path, metavar="DIR", help="where to write it (default: beside the tars)")
    a("--classes-from", type=Path, metavar="PATH", help="class names: a shard folder or a list")
    a("--on-error", choices=("fail", "skip"), default="fail", help="samples that cannot be used")
    a("--replace", action="store_true", help="replace an older manifest")
    a("--workers", type=int, default=cores(), help="processes")
    return p


def main(arguments: list[str] | None = None) -> int:
    return run(index_shards, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())

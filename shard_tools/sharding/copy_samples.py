"""Copy chosen samples, with all their fields, into tars of their own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import naming
from shard_tools.atomic import fsync
from shard_tools.cli import ToolError
from shard_tools.manifest import SAMPLE, Manifest, Shard, is_remote, write_manifest
from shard_tools.members import BLOCK
from shard_tools.sharding.stored_sample import (
    images_by_offset,
    read_json,
    stored_labels,
    take_candidate,
)
from shard_tools.tar import Sample, ShardWriter, read_range, read_samples
from shard_tools.workers import map_in_workers, report, working_on


@dataclass(frozen=True)
class CopyJob:
    """One new tar: `pieces` are (path of an old tar, rows to take from it); stored_labels: what the
    labels of the rows are in the old tars; lenient: as these were adopted."""

    number: int
    path: Path
    first: int
    pieces: list[tuple[str, np.ndarray]]
    stored_labels: tuple[int, ...]
    lenient: bool


def copy_samples(
    manifest: Manifest,
    shard: np.ndarray,
    rows: np.ndarray,
    dest: Path,
    *,
    classes: Sequence[str],
    names: Sequence[str],
    made: dict[str, Any],
    shard_size: int,
    workers: int,
) -> int:
    """Write the samples `rows` of the shards number `shard` into new tars and their manifest.

    Keys are renumbered (so they are unique and without dots), fields are kept, `cls` follows
    the labels of `rows`. The tars are built in a temporary folder that is renamed at the end.
    Returns the bytes of all new tars.
    """
    if is_remote(manifest.folder):
        raise ToolError(f"{manifest.folder}: --copy reads local shards only; copy them first")
    partial = dest.with_name(f".{dest.name}.{os.getpid()}.tmp")
    with naming(dest, "cannot be written"):
        partial.mkdir(parents=True)
    try:
        before = manifest.made.get("stored_classes", manifest.classes)
        labels = stored_labels(classes, before)
        jobs = _cut(manifest, shard, rows, partial, shard_size, labels)
        made_tars = map_in_workers(
            copy, jobs, workers=workers, description=f"copy to {dest}", total=len(rows)
        )
        found = sorted(made_tars, key=lambda tar: tar[0])
        with naming(dest, "cannot be written"):
            write_manifest(
                partial,
                shards=[new for _, new, _ in found],
                index=np.concatenate([new_rows for *_, new_rows in found]),
                classes=classes,
                names=names,
                made=made,
            )
            if dest.exists():
                dest.rmdir()  # the caller saw that it is empty
            partial.rename(dest)
            fsync(dest.absolute().parent)
        return sum(new.bytes for _, new, _ in found)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cut(
    manifest: Manifest,
    shard: np.ndarray,
    rows: np.ndarray,
    folder: Path,
    shard_size: int,
    labels: tuple[int, ...],
) -> list[CopyJob]:
    """Jobs of about `shard_size` bytes each, in the order of the rows."""
    sizes = rows["length"].astype(np.int64) + 8 * BLOCK
    group = (np.cumsum(sizes) - sizes) // shard_size
    jobs = []
    for number, label in enumerate(np.unique(group)):
        members = np.flatnonzero(group == label)
        pieces = [
            (manifest.path(int(old)), rows[members[shard[members] == old]])
            for old in np.unique(shard[members])
        ]
        path = folder / f"subset-{number:06d}.tar"
        lenient = bool(manifest.made.get("lenient"))
        jobs.append(CopyJob(number, path, int(members[0]), pieces, labels, lenient))
    return jobs


def copy(job: CopyJob) -> tuple[int, Shard, np.ndarray]:
    """Write one new tar. UserError where an old one cannot be read or the new one written."""
    with naming(job.path):
        return _copy(job)


def _copy(job: CopyJob) -> tuple[int, Shard, np.ndarray]:
    new = np.concatenate([np.zeros(0, SAMPLE), *(rows for _, rows in job.pieces)])
    handle = os.open(job.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        writer = ShardWriter(handle)
        for path, rows in job.pieces:
            working_on(path)
            by_offset = images_by_offset(read_samples(path, lenient=job.lenient).samples)
            source = os.open(path, os.O_RDONLY)
            try:
                for row in rows:
                    report(int(row["length"]))
                    candidates = by_offset.get(int(row["offset"]))
                    if not candidates:
                        raise ToolError(f"{path}: no image at byte {row['offset']}; verify it")
                    label = int(row["label"])
                    stored = job.stored_labels[label] if job.stored_labels and label >= 0 else label
                    sample, image = take_candidate(source, candidates, stored)
                    key = f"{job.first + writer.samples:09d}"
                    offsets = writer.write(key, _fields(source, sample, label))
                    new["offset"][writer.samples - 1] = offsets[image]
            finally:
                os.close(source)
        digest = writer.close()
        os.fsync(handle)
    finally:
        os.close(handle)
    return job.number, Shard(job.path.name, len(new), writer.bytes, digest), new


def _fields(source: int, sample: Sample, label: int) -> dict[str, bytes]:
    """All fields, with the label of the new index in `cls` and where the json has one."""
    fields = {name: read_range(source, extent) for name, extent in sample.fields.items()}
    if label >= 0:
        about = read_json(source, sample)
        if "cls" in fields or type(about.get("label")) is not int:
            fields["cls"] = b"%d" % label
        if type(about.get("label")) is int and about["label"] != label:
            fields["json"] = json.dumps(about | {"label": label}).encode()
    return fields

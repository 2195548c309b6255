"""Check a shard folder against its manifest and name every fault.

    python shard_tools/verify_shards.py DIR

Checked are the checksum and size of every tar, its structure, that keys are unique in it, that the
index and the labels agree with what the tar holds, that restart markers are where the index says,
and that no tar is missing or extra.
`--decode` also decodes every image. Exit code: 0 sound, 1 faults, 2 cannot be checked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError, naming
from pipeline.help_text import HelpFormatter
from shard_tools.cli import FAULTS, ToolError, counted, parse, run, worker_count
from shard_tools.cores import cores
from shard_tools.image_file import ImageFault, find_pieces, read_header, walk_ahead
from shard_tools.manifest import FORMATS, Manifest, ManifestError, Shard, is_remote, read_manifest
from shard_tools.sharding.images import decode_fully, probe
from shard_tools.sharding.layout import PARTS
from shard_tools.sharding.stored_sample import (
    SampleFault,
    images_by_offset,
    read_json,
    read_label,
    read_synset,
    stored_labels,
    take_candidate,
)
from shard_tools.sharding.tar_files import tar_files
from shard_tools.tar import Contents, Sample, Sweep, read_samples
from shard_tools.texts import Texts
from shard_tools.workers import map_in_workers, report, working_on

LISTED = 20  # faults that are named of one shard; the rest is counted


@dataclass(frozen=True)
class VerifyJob:
    """One shard to check against its rows. complete: the tar must hold nothing but these samples;
    stored_classes: what a number in `cls` means, where labels were renumbered (a subset).
    lenient, unlabelled: as the tars were adopted."""

    folder: str
    shard: Shard
    rows: np.ndarray
    names: tuple[str, ...]
    classes: tuple[str, ...]
    stored_classes: tuple[str, ...]
    complete: bool
    decode: bool
    lenient: bool
    unlabelled: bool

    @cached_property
    def stored_labels(self) -> tuple[int, ...]:
        """What the labels of the rows are in the tar; empty where they are the same."""
        return stored_labels(self.classes, self.stored_classes)

    @cached_property
    def synsets(self) -> frozenset[str]:
        """Every name that a class has in the index or had in the tars."""
        return frozenset((*self.classes, *self.stored_classes))


@dataclass
class Findings:
    """Faults and remarks on one shard, one sentence each."""

    shard: str
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @contextmanager
    def catching(self, path: str) -> Iterator[None]:
        """What cannot be used or read inside becomes a fault."""
        try:
            with naming(path, "cannot be read"):
                yield
        except UserError as error:
            fault = str(error).removeprefix(f"{path}: ")
            if fault not in self.faults:
                self.faults.append(fault)


def check_shard(job: VerifyJob) -> Findings:
    """All checks of one tar in one pass; a disk that cannot read it is a fault of the shard."""
    path = os.path.join(job.folder, job.shard.name)
    found = Findings(job.shard.name)
    working_on(path)
    with found.catching(path):
        if not os.path.isfile(path):
            found.faults.append("the shard is missing")
            return found
        handle = os.open(path, os.O_RDONLY)
        try:
            _check_tar(job, path, handle, found)
        finally:
            os.close(handle)
    return found


def _check_tar(job: VerifyJob, path: str, handle: int, found: Findings) -> None:
    size = os.fstat(handle).st_size
    if size != job.shard.bytes:
        found.faults.append(f"{size} bytes long where the manifest says {job.shard.bytes}")
    first, sweep = len(found.faults), Sweep(handle)
    with found.catching(path):  # the index would only repeat it for every sample
        contents = read_samples(path, lenient=job.lenient)
        if job.complete:
            found.faults += _surplus(contents, len(job.rows))
        check_rows(job, path, sweep, contents.samples, found)
    if sweep.finish() != job.shard.sha256:
        found.faults.insert(first, "its sha256 is not the one of the manifest")


def _surplus(contents: Contents, rows: int) -> Iterator[str]:
    """What a tar of our own does not hold."""
    if len(contents.samples) != rows:
        yield f"holds {len(contents.samples)} samples, the index lists {rows}"
    for name, reason in contents.others:
        yield f"member {name!r}: {reason}"


def check_rows(
    job: VerifyJob, path: str, sweep: Sweep, samples: list[Sample], found: Findings
) -> None:
    """Every row of the index against the samples of the tar."""
    files = read_rows(job, path, sweep, samples, found)
    for data, sound, (number, sample) in walk_ahead(files, job.decode):
        working_on(f"{path}: sample {sample.key!r}")
        name = job.names[number] if job.names else ""
        row = job.rows[number]
        for fault in check_sample(job, sweep.handle, row, sample, data, sound, name, found.remarks):
            found.faults.append(f"sample {sample.key!r}: {fault}")


def read_rows(
    job: VerifyJob, path: str, sweep: Sweep, samples: list[Sample], found: Findings
) -> Iterator[tuple[bytes, tuple[int, Sample]]]:
    """(file, (number, sample)) of each row whose image is where the index says."""
    by_offset = images_by_offset(samples)
    for number, row in enumerate(job.rows):
        report(int(row["length"]))
        candidates = by_offset.get(int(row["offset"]))
        if not candidates:
            found.faults.append(f"no image begins at byte {row['offset']} (sample {number})")
            continue
        label = int(row["label"])
        label = job.stored_labels[label] if job.stored_labels and label >= 0 else label
        sample, image = take_candidate(sweep.handle, candidates, label)
        working_on(f"{path}: sample {sample.key!r}")
        extent = sample.fields[image]
        fault = sample.problem
        if not fault and extent[1] != row["length"]:
            fault = f"image of {extent[1]} bytes, the index says {row['length']}"
        if fault:
            found.faults.append(f"sample {sample.key!r}: {fault}")
        else:
            yield sweep.read(extent), (number, sample)


def check_sample(
    job: VerifyJob,
    handle: int,
    row: np.void,
    sample: Sample,
    data: bytes,
    sound: int,
    name: str,
    remarks: list[str],
) -> Iterator[str]:
    """Faults of one sample: index, label, name and its image; sound: `sound_until` of it."""
    try:
        found = _describe(*probe(data))
        warning = decode_fully(data, sound) if job.decode else ""
    except ImageFault as error:
        yield f"image cannot be decoded ({error})"
        return
    recorded = dict(enumerate(FORMATS)).get(row["format"], f"format {row['format']}")
    expected = _describe(recorded, row["width"], row["height"], row["orientation"])
    if found != expected:
        yield f"image is {found}, the index says {expected}"
    if row["interval"]:
        pieces = find_pieces(data, read_header(data))
        if pieces is None or pieces.interval != row["interval"]:
            yield f"its restart markers are not {row['interval']} MCUs apart, as the index says"
    if warning:
        remarks.append(f"sample {sample.key!r}: decodes with a warning ({warning})")
    try:
        about = read_json(handle, sample)
        if not job.unlabelled:
            yield from _check_label(job, handle, int(row["label"]), sample, about)
    except SampleFault as fault:
        yield str(fault)
        return
    if job.complete and name and about.get("name", name) != name:
        yield f"its json says {about.get('name')!r}, names.bin says {name!r}"


def _describe(kind: str, width: int, height: int, orientation: int) -> str:
    return f"{kind} of {width}x{height} pixels, orientation {orientation}"


def _check_label(
    job: VerifyJob, handle: int, label: int, sample: Sample, about: dict[str, Any]
) -> Iterator[str]:
    stored = read_label(handle, sample, about)
    source = "cls" if "cls" in sample.fields else "label of its json"
    if stored < 0:
        if label >= 0:
            yield f"has no cls, the index says {label}"
        return
    if label < 0:
        yield f"{source} is {stored}, the index has no label"
    elif job.stored_classes:
        if stored >= len(job.stored_classes) or job.stored_classes[stored] != job.classes[label]:
            yield f"{source} is {stored}, which is not class {job.classes[label]!r}"
    elif stored != label:
        yield f"{source} is {stored}, the index says {label}"
    synset = read_synset(about)
    if label >= 0 and synset in job.synsets and synset != job.classes[label]:
        yield f"its json says synset {synset!r}, the index says {job.classes[label]!r}"


def verify(folder: str, *, decode: bool, workers: int) -> tuple[list[str], list[str]]:
    """Faults and remarks of a local shard folder, each with the file it is about.

    Raises ManifestError where the manifest itself cannot be read, ToolError for a remote folder.
    """
    manifest = read_manifest(folder, check_shards=False)
    if is_remote(manifest.folder):
        raise ToolError(f"{manifest.folder}: only local shards can be verified; copy them first")
    with naming(folder, "cannot be read"):
        faults = list(_check_folder(manifest))
    jobs = _Jobs(manifest, decode)
    faults += jobs.faults
    results = {
        found.shard: found
        for found in map_in_workers(
            check_shard,
            jobs,
            workers=workers,
            description=f"verify {folder}",
            total=manifest.samples,
        )
    }
    remarks = [
        f"{name}: left out as the tars were adopted ({reason})"
        for name, reason in manifest.made.get("left_out", {}).items()
    ]
    for shard in manifest.shards:
        found = results[shard.name]
        faults += [f"{shard.name}: {fault}" for fault in found.faults[:LISTED]]
        if len(found.faults) > LISTED:
            faults.append(f"{shard.name}: and {len(found.faults) - LISTED} further faults")
        remarks += [f"{shard.name}: {remark}" for remark in found.remarks]
    return faults, remarks


class _Jobs(Collection[VerifyJob]):
    """One job per shard, made as one iterates; without rows where the index or the names cannot be
    used, which `faults` then says."""

    def __init__(self, manifest: Manifest, decode: bool) -> None:
        self.manifest, self.decode, self.faults = manifest, decode, list[str]()
        try:
            self.rows: np.ndarray | None = manifest.index
            self.names = manifest.names
        except ManifestError as error:
            self.rows, self.names, self.faults = None, Texts(), [str(error)]

    def __len__(self) -> int:
        return len(self.manifest.shards)

    def __contains__(self, job: object) -> bool:
        return any(job == own for own in self)

    def __iter__(self) -> Iterator[VerifyJob]:
        manifest, made = self.manifest, self.manifest.made
        for number, shard in enumerate(manifest.shards):
            part = slice(*map(int, manifest.starts[number : number + 2]))
            yield VerifyJob(
                folder=manifest.folder,
                shard=shard,
                rows=self.rows[part] if self.rows is not None else np.zeros(0),
                names=tuple(self.names[part]),
                classes=manifest.classes,
                stored_classes=tuple(made.get("stored_classes", ())),
                complete=self.rows is not None and made.get("kind") == "shards",
                decode=self.decode,
                lenient=bool(made.get("lenient")),
                unlabelled=bool(made.get("unlabelled")),
            )


def _check_folder(manifest: Manifest) -> Iterator[str]:
    """Tars that the manifest does not know, and traces of a job that did not end."""
    made = manifest.made
    known = {shard.name for shard in manifest.shards} | set(made.get("left_out", {}))
    searched = [] if made.get("kind") == "subset" else made.get("folders", ["."])
    for inner in searched:
        for name in tar_files(Path(manifest.folder, inner)):
            name = os.path.normpath(os.path.join(inner, name))
            if name not in known and name.endswith(".tar"):
                yield f"{name}: this tar is not in the manifest"
    if (Path(manifest.home) / PARTS).exists():
        yield f"{PARTS}: a sharding job did not end; resume it with make_shards.py --resume"
    for path in sorted(Path(manifest.home).glob(".*.tmp")):
        yield f"{path.name}: left behind by a killed process"


def verify_shards(folder: str, *, decode: bool, workers: int) -> int:
    """Print remarks, faults and a verdict; the exit code."""
    faults, remarks = verify(folder, decode=decode, workers=workers)
    for line in remarks:
        print(f"remark: {line}")
    for line in faults:
        print(f"fault: {line}")
    manifest = read_manifest(folder, check_shards=False)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    verdict = counted(len(faults), "fault") if faults else "sound"
    marked = manifest.made.get("restart_markers", {}).get("images", 0)
    cut = f", restart markers in {marked}" if marked else ""
    print(
        f"{folder}: {counted(manifest.samples, 'sample')} in "
        f"{counted(len(manifest.shards), 'shard')}, {size:.1f} MB{cut}: {verdict}"
    )
    return FAULTS if faults else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Check a shard folder against its manifest and name every fault; exit code 1 "
        "where there is one.",
        formatter_class=HelpFormatter,
    )
    p.add_argument("folder", metavar="FOLDER", help="folder with a manifest.json")
    p.add_argument("--decode", action="store_true", help="also decode every image")
    p.add_argument("--workers", type=worker_count, default=cores(), metavar="N", help="processes")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parse(parser(), arguments)
    return run(lambda o: verify_shards(o.folder, decode=o.decode, workers=o.workers), options)


if __name__ == "__main__":
    sys.exit(main())

"""Check a shard folder against its manifest and name every fault.

    python shard_tools/verify_shards.py DIR

Checked are the checksum and size of every tar, the structure of the tar, that keys are unique,
that the index and the labels agree with what the tar holds, and that no tar is missing or extra.
`--decode` also decodes every image. Exit code: 0 sound, 1 faults, 2 cannot be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shard_tools.cli import FAULTS, HelpFormatter, ToolError, cores, run
from shard_tools.manifest import (
    FORMATS,
    Manifest,
    ManifestError,
    Shard,
    is_remote,
    read_manifest,
)
from shard_tools.sharding.images import ImageFault, decode_fully, probe
from shard_tools.sharding.layout import PARTS
from shard_tools.tar import (
    Sample,
    TarError,
    file_sha256,
    image_field,
    read_range,
    read_samples,
)
from shard_tools.workers import map_in_workers, report, working_on

LISTED = 20  # faults that are named of one shard; the rest is counted


@dataclass(frozen=True)
class VerifyJob:
    """One shard to check against its rows. complete: the tar must hold nothing but these samples;
    stored_classes: what a number in `cls` means, where labels were renumbered (a subset)."""

    folder: str
    shard: Shard
    rows: np.ndarray
    names: tuple[str, ...]
    classes: tuple[str, ...]
    stored_classes: tuple[str, ...]
    complete: bool
    decode: bool


@dataclass
class Findings:
    """Faults and remarks on one shard, one sentence each, and the keys of all its samples."""

    shard: str
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def check_shard(job: VerifyJob) -> Findings:
    """All checks of one tar; a disk that cannot read it is a fault of the shard."""
    path = os.path.join(job.folder, job.shard.name)
    found = Findings(job.shard.name)
    working_on(path)
    try:
        _check_tar(job, path, found)
    except OSError as error:
        found.faults.append(f"cannot be read ({error.strerror or error})")
    return found


def _check_tar(job: VerifyJob, path: str, found: Findings) -> None:
    if not os.path.isfile(path):
        found.faults.append("the shard is missing")
        return
    size = os.path.getsize(path)
    if size != job.shard.bytes:
        found.faults.append(f"{size} bytes long where the manifest says {job.shard.bytes}")
    if file_sha256(path) != job.shard.sha256:
        found.faults.append("its sha256 is not the one of the manifest")
    samples: dict[int, Sample] = {}
    try:
        for sample in read_samples(path):
            found.keys.append(sample.key)
            place = sample.fields.get(image_field(sample))
            if place:
                samples[place[0]] = sample
    except TarError as error:
        found.faults.append(str(error).removeprefix(f"{path}: "))
        return  # the index would only repeat it for every sample
    check_rows(job, path, samples, found)


def check_rows(job: VerifyJob, path: str, samples: dict[int, Sample], found: Findings) -> None:
    """Every row of the index against the samples of the tar, given by the offset of the image."""
    if job.complete and len(samples) != len(job.rows):
        found.faults.append(f"holds {len(samples)} samples, the index lists {len(job.rows)}")
    handle = os.open(path, os.O_RDONLY)
    try:
        for number, row in enumerate(job.rows):
            report(int(row["length"]))
            sample = samples.get(int(row["offset"]))
            if sample is None:
                found.faults.append(f"no image begins at byte {row['offset']} (sample {number})")
                continue
            name = job.names[number] if job.names else ""
            for fault in check_sample(job, handle, row, sample, name, found.remarks):
                found.faults.append(f"sample {sample.key!r}: {fault}")
    finally:
        os.close(handle)


def check_sample(
    job: VerifyJob, handle: int, row: np.void, sample: Sample, name: str, remarks: list[str]
) -> Iterator[str]:
    """Faults of one sample: index, label, name and image."""
    place = sample.fields[image_field(sample)]
    if place[1] != row["length"]:
        yield f"image of {place[1]} bytes, the index says {row['length']}"
    try:
        data = read_range(handle, place)
        found = _describe(*probe(data))
        recorded = dict(enumerate(FORMATS)).get(row["format"], f"format {row['format']}")
        expected = _describe(recorded, row["width"], row["height"], row["orientation"])
        if found != expected:
            yield f"image is {found}, the index says {expected}"
        if job.decode and (warning := decode_fully(data)):
            remarks.append(f"sample {sample.key!r}: decodes with a warning ({warning})")
    except (ImageFault, TarError) as error:
        yield f"image cannot be decoded ({error})"
        return
    yield from _check_label(job, handle, int(row["label"]), sample)
    if job.complete and "json" in sample.fields:
        try:
            about = json.loads(read_range(handle, sample.fields["json"]))
            if name and about.get("name", name) != name:
                yield f"its json says {about.get('name')!r}, names.bin says {name!r}"
        except (ValueError, AttributeError):
            yield "its json cannot be read"


def _describe(kind: str, width: int, height: int, orientation: int) -> str:
    return f"{kind} of {width}x{height} pixels, orientation {orientation}"


def _check_label(job: VerifyJob, handle: int, label: int, sample: Sample) -> Iterator[str]:
    if "cls" not in sample.fields:
        if job.complete and label != -1:
            yield f"has no cls, the index says {label}"
        return
    text = read_range(handle, sample.fields["cls"]).decode("ascii", "replace").strip()
    if not text.isdecimal():
        yield f"cls is {text[:40]!r}, not a class index"
    elif label < 0:
        yield f"cls is {text}, the index has no label"
    elif job.stored_classes:
        stored = int(text)
        if stored >= len(job.stored_classes) or job.stored_classes[stored] != job.classes[label]:
            yield f"cls is {text}, which is not class {job.classes[label]!r}"
    elif int(text) != label:
        yield f"cls is {text}, the index says {label}"


def verify(folder: str, *, decode: bool, workers: int) -> tuple[list[str], list[str]]:
    """Faults and remarks of a local shard folder, each with the file it is about.

    Raises ManifestError where the manifest itself cannot be read, ToolError for a remote folder.
    """
    manifest = read_manifest(folder, check_shards=False)
    if is_remote(manifest.folder):
        raise ToolError(f"{manifest.folder}: only local shards can be verified; copy them first")
    faults = list(_check_folder(manifest))
    jobs, index_faults = _jobs(manifest, decode)
    faults += index_faults
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
    remarks: list[str] = []
    seen: dict[str, str] = {}
    for shard in manifest.shards:
        found = results[shard.name]
        faults += [f"{shard.name}: {fault}" for fault in found.faults[:LISTED]]
        if len(found.faults) > LISTED:
            faults.append(f"{shard.name}: and {len(found.faults) - LISTED} further faults")
        remarks += [f"{shard.name}: {remark}" for remark in found.remarks]
        for key in found.keys:
            if key in seen:
                faults.append(f"{shard.name}: key {key!r} was already used in {seen[key]}")
            seen[key] = shard.name
    return faults, remarks


def _jobs(manifest: Manifest, decode: bool) -> tuple[list[VerifyJob], list[str]]:
    """One job per shard; without rows where the index or the names cannot be used."""
    try:
        rows, names, faults = manifest.index, manifest.names, []
    except ManifestError as error:
        rows, names, faults = None, (), [str(error)]
    jobs = []
    for number, shard in enumerate(manifest.shards):
        part = slice(*map(int, manifest.starts[number : number + 2]))
        jobs.append(
            VerifyJob(
                folder=manifest.folder,
                shard=shard,
                rows=rows[part] if rows is not None else np.zeros(0),
                names=names[part],
                classes=manifest.classes,
                stored_classes=tuple(manifest.made.get("stored_classes", ())),
                complete=rows is not None and manifest.made.get("kind") == "shards",
                decode=decode,
            )
        )
    return jobs, faults


def _check_folder(manifest: Manifest) -> Iterator[str]:
    """Tars that the manifest does not know, and traces of a job that did not end."""
    if manifest.made.get("kind") != "subset":
        known = {shard.name for shard in manifest.shards}
        for path in sorted(Path(manifest.folder).glob("**/*.tar")):
            name = str(path.relative_to(manifest.folder))
            if name not in known:
                yield f"{name}: this tar is not in the manifest"
    if (Path(manifest.home) / PARTS).exists():
        yield f"{PARTS}: a sharding job did not end; resume it with make_shards.py --resume"
    for path in sorted(Path(manifest.home).glob(".*.tmp")):
        yield f"{path.name}: left behind by a killed process"


def verify_shards(options: argparse.Namespace) -> int:
    """The command."""
    faults, remarks = verify(options.folder, decode=options.decode, workers=options.workers)
    for line in remarks:
        print(f"remark: {line}")
    for line in faults:
        print(f"fault: {line}")
    manifest = read_manifest(options.folder, check_shards=False)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    verdict = f"{len(faults)} faults" if faults else "sound"
    print(
        f"{options.folder}: {manifest.samples} samples in {len(manifest.shards)} shards, "
        f"{size:.1f} MB: {verdict}"
    )
    return FAULTS if faults else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Check a shard folder against its manifest; exit code 1 names faults.",
        formatter_class=HelpFormatter,
    )
    p.add_argument("folder", metavar="DIR", help="folder with a manifest.json")
    p.add_argument("--decode", action="store_true", help="also decode every image")
    p.add_argument("--workers", type=int, default=cores(), help="processes")
    return p


def main(arguments: list[str] | None = None) -> int:
    return run(verify_shards, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())

"""Read tars that others wrote: the rows of their samples, and whether their labels fit together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.errors import UserError, naming
from shard_tools.atomic import file_sha256
from shard_tools.cli import ToolError
from shard_tools.image_file import ImageFault
from shard_tools.manifest import FORMATS, SAMPLE, Shard
from shard_tools.members import MissingEnd, TarError
from shard_tools.sharding.archives import compression
from shard_tools.sharding.images import probe
from shard_tools.sharding.layout import Part
from shard_tools.sharding.stored_sample import SampleFault, StoredSample, describe, printable
from shard_tools.tar import Sample, read_range, read_samples
from shard_tools.workers import report, working_on


@dataclass(frozen=True)
class Settings:
    """How tars are read. on_error: "fail" stops at the first tar or sample that cannot be used,
    "skip" leaves it out and reports it. image_fields, unlabelled: see `describe`. lenient: see
    `read_members`. classes: class names, if they are given."""

    on_error: str = "fail"
    image_fields: tuple[str, ...] = ()
    unlabelled: bool = False
    lenient: bool = False
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class IndexJob:
    """One tar to read; `name` is relative to `folder`."""

    number: int
    folder: Path
    name: str
    settings: Settings


class Synsets:
    """Which synset belongs to which label, as far as the samples say, and which sample said it."""

    def __init__(self) -> None:
        self.by_label: dict[int, tuple[str, str]] = {}
        self._labels: dict[str, int] = {}

    def conflict(self, label: int, synset: str, sample: str) -> str:
        """Add what one sample says; the reason where another sample has said otherwise, else ""."""
        known, other = self.by_label.get(label, (synset, sample))
        if known != synset:
            return f"has label {label} and synset {synset!r}, but {other} has {known!r} for it"
        before = self._labels.get(synset, label)
        if before != label:
            other = self.by_label[before][1]
            return f"has label {label} and synset {synset!r}, but {other} has label {before} for it"
        self.by_label.setdefault(label, (synset, sample))
        self._labels[synset] = label
        return ""


@dataclass(frozen=True)
class Adopted:
    """What was found in one tar. left_out: why nothing of it is used, "" if something is."""

    number: int
    name: str
    part: Part
    left_out: str = ""
    synsets: Synsets = field(default_factory=Synsets)


def adopt(job: IndexJob) -> Adopted:
    """Read one tar. UserError if on_error is "fail" and it, or a sample of it, cannot be used."""
    path = job.folder / job.name
    working_on(path)
    try:
        with naming(path, "cannot be read"):
            return _adopt(job, path)
    except UserError as error:
        if job.settings.on_error == "fail":
            raise
        reason = str(error).removeprefix(f"{path}: ")
        part = Part(None, np.zeros(0, SAMPLE), [], [(job.name, "skipped", reason)])
        return Adopted(job.number, job.name, part, left_out=reason)


def _adopt(job: IndexJob, path: Path) -> Adopted:
    if not path.is_file():
        raise TarError(f"{path}: is not a regular file, or is a link to nothing")
    if kind := compression(path):
        raise TarError(
            f"{path}: is compressed ({kind}), and samples are read by their offset; decompress it"
        )
    try:
        contents = read_samples(path, lenient=job.settings.lenient)
    except MissingEnd as error:
        raise TarError(
            f"{error}; --lenient takes the end of the file for it, as webdataset does"
        ) from None
    if not contents.samples:
        raise TarError(f"{path}: holds no samples; --on-error skip leaves it out")
    part, synsets = _adopt_samples(job, path, contents.samples)
    part.report.extend((f"{job.name}/{name}", "ignored", why) for name, why in contents.others)
    left_out = "" if part.shard else "none of its samples can be used"
    return Adopted(job.number, job.name, part, left_out, synsets)


def _adopt_samples(job: IndexJob, path: Path, samples: list[Sample]) -> tuple[Part, Synsets]:
    rows, names, keys, remarks = [], [], [], []
    synsets, labels = Synsets(), {name: label for label, name in enumerate(job.settings.classes)}
    size = os.path.getsize(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        for sample in samples:
            working_on(f"{path}: sample {sample.key!r}")
            name = printable(f"{job.name}/{sample.key}")
            try:
                about, row = read_row(handle, sample, job.settings)
                _check_class(about, labels)
                if clash := _clash(about, synsets, name):
                    raise SampleFault(clash)
            except (SampleFault, ImageFault, TarError) as fault:
                if job.settings.on_error == "fail":
                    raise ToolError(
                        f"{path}: sample {sample.key!r}: {fault}; --on-error skip leaves it out"
                    ) from None
                remarks.append((name, "skipped", str(fault)))
                continue
            rows.append(row)
            names.append(about.name)
            keys.append(printable(sample.key))
            report(about.image[1])
    finally:
        os.close(handle)
    shared = Counter(names)  # a URL may come with several captions
    names = [name if shared[name] == 1 else key for name, key in zip(names, keys, strict=True)]
    shard = Shard(job.name, len(rows), size, file_sha256(path)) if rows else None
    return Part(shard, np.array(rows, SAMPLE), names, remarks), synsets


def read_row(
    handle: int, sample: Sample, settings: Settings
) -> tuple[StoredSample, tuple[int, ...]]:
    """What the sample says, and its SAMPLE row. SampleFault or ImageFault with the reason."""
    about = describe(
        handle, sample, image_fields=settings.image_fields, unlabelled=settings.unlabelled
    )
    kind, width, height, orientation = probe(read_range(handle, about.image))
    if max(width, height) > np.iinfo("u2").max:
        raise ImageFault(f"{width} x {height} pixels are too many")
    row = (*about.image, about.label, width, height, orientation, FORMATS.index(kind), 0)
    return about, row


def _clash(about: StoredSample, synsets: Synsets, name: str) -> str:
    if about.label < 0 or not about.synset:
        return ""
    return synsets.conflict(about.label, about.synset, name)


def _check_class(about: StoredSample, labels: dict[str, int]) -> None:
    """The label is one of the given classes, and the one that the synset has among them."""
    if labels and about.label >= len(labels):
        raise SampleFault(f"has label {about.label} of {len(labels)} classes")
    expected = labels.get(about.synset, about.label)
    if about.label >= 0 and expected != about.label:
        raise SampleFault(
            f"has label {about.label} and synset {about.synset!r}, which is class {expected}"
        )


def same_labels(found: list[Adopted], settings: Settings) -> list[Adopted]:
    """All samples have labels or none has, and a synset has one label in all tars.

    ToolError otherwise; where samples are skipped, those without a label are left out and reported.
    """
    synsets = Synsets()
    for adopted in found:
        for label, (synset, sample) in adopted.synsets.by_label.items():
            if clash := synsets.conflict(label, synset, sample):
                raise ToolError(f"{sample}: {clash}")
    if not any((adopted.part.rows["label"] >= 0).any() for adopted in found):
        return found
    return [_labelled_only(adopted, settings) for adopted in found]


def _labelled_only(adopted: Adopted, settings: Settings) -> Adopted:
    part = adopted.part
    labelled = part.rows["label"] >= 0
    if labelled.all():
        return adopted
    missing = [name for name, kept in zip(part.names, labelled, strict=True) if not kept]
    if settings.on_error == "fail":
        raise ToolError(
            f"{adopted.name}: sample {missing[0]!r} has no label, other samples have one; "
            "--on-error skip leaves out what has none, --unlabelled ignores all labels"
        )
    remarks = [(f"{adopted.name}/{name}", "skipped", "has no label") for name in missing]
    names = [name for name, kept in zip(part.names, labelled, strict=True) if kept]
    shard = replace(part.shard, samples=len(names)) if part.shard and names else None
    left = Part(shard, part.rows[labelled], names, [*part.report, *remarks])
    reason = adopted.left_out or ("" if names else "none of its samples has a label")
    return replace(adopted, part=left, left_out=reason)


def unique_names(parts: list[Part]) -> list[str]:
    """The names of all samples; with their tar in front if one occurs twice, since a key has to be
    unique in its own tar only."""
    names = [name for part in parts for name in part.names]
    if len(set(names)) == len(names):
        return names
    return [
        f"{printable(part.shard.name.removesuffix('.tar'))}/{name}"
        for part in parts
        if part.shard
        for name in part.names
    ]


def class_names(index: np.ndarray, found: Sequence[Adopted]) -> tuple[str, ...]:
    """Names by label: the synset that the json fields give, else the number."""
    known: dict[int, str] = {}
    for adopted in found:
        known |= {label: synset for label, (synset, _) in adopted.synsets.by_label.items()}
    count = int(index["label"].max()) + 1
    names = tuple(known.get(label, str(label)) for label in range(count))
    return names if len(set(names)) == count else tuple(map(str, range(count)))

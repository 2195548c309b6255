"""Write planned shards."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import naming
from shard_tools.atomic import fsync
from shard_tools.cli import ToolError
from shard_tools.image_file import ImageFault, walk_ahead
from shard_tools.manifest import FORMATS, SAMPLE, Shard
from shard_tools.sharding.images import CheckedImage, ImageSettings, check_image
from shard_tools.sharding.items import Item, file_times, place_of, read_item
from shard_tools.sharding.layout import ALL_FIELDS, Part, shard_name, write_part
from shard_tools.sharding.plan_file import StoredPlan
from shard_tools.sharding.statistics import NO_PIXELS, fingerprint, is_sampled, pixel_sums
from shard_tools.tar import ShardWriter
from shard_tools.workers import WorkerDied, map_in_workers, report, working_on


@dataclass(frozen=True)
class ShardJob:
    """One shard to write; `first` is the number of its first image in the plan."""

    number: int
    name: str
    first: int
    items: Sequence[Item]
    root: str
    classes: tuple[str, ...]
    settings: ImageSettings
    on_error: str
    dest: Path
    digest: str
    total: int  # images of the whole plan
    fields: str = ALL_FIELDS


def write_shards(
    plan: StoredPlan, dest: Path, numbers: Sequence[int], *, workers: int, on_error: str,
    finished: int,
) -> None:  # fmt: skip
    """Write the shards `numbers` of the plan into `dest`; `finished` images were there before."""
    jobs = [
        ShardJob(
            number=number,
            name=shard_name(plan.settings, number),
            first=plan.starts[number],
            items=plan.items(number),
            root=plan.root,
            classes=plan.classes,
            settings=plan.settings.image,
            on_error=on_error,
            dest=dest,
            digest=plan.digest,
            total=plan.starts[-1],
            fields=plan.settings.fields,
        )
        for number in numbers
    ]
    total = finished + sum(len(job.items) for job in jobs)
    try:
        for _ in map_in_workers(
            finish_shard,
            jobs,
            workers=workers,
            description=str(dest),
            total=total,
            finished=finished,
        ):
            pass
    except WorkerDied as death:
        for pid in death.pids:
            for leftover in dest.glob(f".*.tar.{socket.gethostname()}.{pid}.tmp"):
                leftover.unlink(missing_ok=True)
        raise ToolError(f"{death}; finished shards are kept, --resume does the rest") from None


def finish_shard(job: ShardJob) -> None:
    """Write one shard, then the part that says so."""
    times = file_times(job.root, job.items)  # before they are read, so that no change is missed
    with naming(job.dest / job.name, "cannot be written"):
        part = replace(write_shard(job), times=times)
        write_part(job.dest, job.number, job.digest, part)


def write_shard(job: ShardJob) -> Part:
    """Write one shard under a temporary name, fsync, rename. Raises ToolError at the first image
    that cannot be used, where job.on_error is "fail"."""
    partial = job.dest / f".{job.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    rows = np.zeros(len(job.items), SAMPLE)
    prints = np.zeros(len(job.items), np.uint64)
    pixels = NO_PIXELS
    names: list[str] = []
    remarks: list[tuple[str, str, str]] = []
    markers: Counter[str] = Counter()
    handle = -1
    try:  # from here on, since a signal may come between the opening and the next line
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        writer = ShardWriter(handle)
        walk = job.settings.check == "decode"
        for data, sound, (index, item) in walk_ahead(_read(job), walk):
            source = place_of(job.root, item)
            working_on(source)
            report(item.size)
            try:
                image = check_image(data, job.settings, sound)
            except ImageFault as fault:
                if job.on_error == "fail":
                    raise ToolError(f"{source}: {fault}; --on-error skip leaves it out") from None
                remarks.append((item.name, "skipped", str(fault)))
                continue
            if image.converted:
                remarks.append((item.name, "converted", image.converted))
            if image.damage:
                remarks.append((item.name, "damaged", image.damage))
            if image.markers:
                markers[image.markers] += 1
            offsets = writer.write(f"{index:09d}", fields_of(job, item, image))
            rows[len(names)] = row_of(item, image, offsets["jpg"])
            prints[len(names)] = fingerprint(data)
            if is_sampled(index, job.total):
                pixels = pixels + pixel_sums(image.data)
            names.append(item.name)
        digest = writer.close()
        os.fsync(handle)
        if not names:
            return Part(None, rows[:0], names, remarks)
        os.replace(partial, job.dest / job.name)
        fsync(job.dest)
        shard = Shard(job.name, len(names), writer.bytes, digest)
        count = len(names)
        return Part(shard, rows[:count], names, remarks, prints[:count], pixels, dict(markers))
    finally:
        partial.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


def _read(job: ShardJob) -> Iterator[tuple[bytes, tuple[int, Item]]]:
    """Each file of the job, with its number in the plan."""
    for index, item in enumerate(job.items, job.first):
        working_on(place_of(job.root, item))
        yield read_item(job.root, item), (index, item)


def fields_of(job: ShardJob, item: Item, image: CheckedImage) -> dict[str, bytes]:
    """The fields of one sample."""
    wanted = job.fields.split(",")
    about: dict[str, Any] = {"name": item.name, "width": image.width, "height": image.height}
    fields = {"jpg": image.data}
    if item.label >= 0:
        about["synset"] = job.classes[item.label]
        if "cls" in wanted:
            fields["cls"] = b"%d" % item.label
        else:
            about["label"] = item.label
    if image.orientation != 1:
        about["orientation"] = image.orientation
    if image.converted:
        about["converted"] = image.converted
    if "json" in wanted:
        fields["json"] = json.dumps(about, sort_keys=True, ensure_ascii=False).encode()
    return fields


def row_of(item: Item, image: CheckedImage, offset: int) -> tuple[int, ...]:
    """The SAMPLE row of one sample."""
    kind = FORMATS.index("jpeg")
    extent = (offset, len(image.data), item.label)
    return (*extent, image.width, image.height, image.orientation, kind, image.interval)

"""Which image goes into which shard, decided before any work and independent of who does it.

The plan is a pure function of the source's listing and the options, so any number of processes
or cluster tasks write the same shards, and a resumed job ends in the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.atomic import write_atomic
from shard_tools.cli import ToolError
from shard_tools.image_file import GROWTH, ImageFault
from shard_tools.manifest import SAMPLE, Shard
from shard_tools.sharding.images import ImageSettings, check_image
from shard_tools.sharding.items import Items, read_item
from shard_tools.sharding.sources import Source
from shard_tools.sharding.statistics import NO_PIXELS
from shard_tools.tar import BLOCK, RECORD

PARTS = ".parts"  # folder inside DEST while the job runs
PLAN = "plan.json"
LAYOUT = 2  # raised when equal options would give other bytes
# Fields that a sample can have, and the bytes beside its image: a header for each, and cls and json
# with their padding.
FIELDS = {"jpg,cls,json": 5 * BLOCK, "jpg,cls": 3 * BLOCK, "jpg,json": 3 * BLOCK}
ALL_FIELDS = next(iter(FIELDS))
_CHUNK = 1 << 12  # items that are handled as Python objects at a time
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
PROBE = 64  # images whose new size is measured when they are to be resized


@dataclass(frozen=True)
class Settings:
    """Everything the bytes of the shards depend on, apart from the source."""

    name: str = "shard"
    seed: int = 0
    shard_size: int = 256 << 20  # bytes; only images over half of it can make a shard larger
    image: ImageSettings = field(default_factory=ImageSettings)
    fields: str = ALL_FIELDS  # one of FIELDS

    def record(self) -> dict[str, Any]:
        """All of it as JSON values; what could not always be chosen only where it is not what it
        was before, so that older jobs can be resumed."""
        record = asdict(self)
        if self.fields == ALL_FIELDS:
            del record["fields"]
        if not self.image.restart_markers:
            del record["image"]["restart_markers"]
        return record


@dataclass(frozen=True)
class Plan:
    """Items in shard order, which is items[order]; shard i holds those of order[starts[i]:
    starts[i+1]]."""

    source: Source
    settings: Settings
    order: np.ndarray
    starts: list[int]
    digest: str

    @property
    def shards(self) -> int:
        return len(self.starts) - 1

    @property
    def copied(self) -> int:
        """Bytes that the JPEGs (by their names) take in shards where they keep their bytes."""
        if self.settings.image.changes_size:
            return 0
        images = self.source.items.images
        sizes = np.asarray(images.sizes, np.int64) + FIELDS[self.settings.fields]
        jpeg = (name.lower().endswith(_JPEG) for name in images.names)
        return int(sizes[np.fromiter(jpeg, np.bool_, len(sizes))].sum())


def shard_name(settings: Settings, number: int) -> str:
    """The file name of a shard."""
    return f"{settings.name}-{number:06d}.tar"


def make_plan(source: Source, settings: Settings) -> Plan:
    """Shuffle by (seed, name), then cut into shards of equal planned size."""
    items = source.items
    order = _shuffled(items, settings.seed)
    ratio = _size_ratio(source, order, settings.image) if settings.image.changes_size else 1.0
    sizes = np.asarray(items.images.sizes, np.int64)[order]
    if ratio != 1:
        sizes = (sizes * ratio).astype(np.int64)
    if settings.image.restart_markers:
        sizes = sizes + sizes // GROWTH
    sizes = sizes + -sizes % BLOCK + FIELDS[settings.fields]
    largest, ends = int(sizes.max()), np.cumsum(sizes)
    total = int(ends[-1])
    # A shard may pass its even share by one image, and still has to keep to the limit.
    limit = settings.shard_size - RECORD
    share = max(limit - largest, limit // 2, 1)
    count = min(len(items), -(-total // share))
    cuts = np.searchsorted(ends, [total * i / count for i in range(1, count)], side="left") + 1
    starts = sorted({0, *(int(cut) for cut in cuts if cut < len(items)), len(items)})
    return Plan(source, settings, order, starts, _digest(source, settings, order, starts))


def _shuffled(items: Items, seed: int) -> np.ndarray:
    """The order of a pseudo-random rank by name, then of the offset: int64 [items]. A hash keeps
    its meaning over library versions, a shuffle may not."""
    key, ranks = str(seed).encode(), bytearray()
    for name in items.names:
        ranks += hashlib.blake2b(name.encode(), key=key, digest_size=16).digest()
    halves = np.frombuffer(ranks, ">u8").reshape(-1, 2)
    order = np.argsort(halves[:, 0].astype(np.uint64), kind="stable")
    first = halves[order, 0]
    equal = np.flatnonzero(first[1:] == first[:-1])
    if len(equal):  # images of one name, or 64 equal bits: few
        some = np.union1d(equal, equal + 1)
        rows = order[some]
        offsets = np.asarray(items.images.offsets, np.int64)[rows]
        order[some] = rows[np.lexsort((rows, offsets, halves[rows, 1], halves[rows, 0]))]
    return order


def _size_ratio(source: Source, order: np.ndarray, settings: ImageSettings) -> float:
    """New bytes per source byte, from the first images of the shuffled order."""
    before = after = 0
    for number in order[:PROBE].tolist():
        item = source.items[number]
        try:
            after += len(check_image(read_item(source.root, item), settings).data)
            before += item.size
        except ImageFault:
            continue
    return after / before if before else 1.0


def _digest(source: Source, settings: Settings, order: np.ndarray, starts: list[int]) -> str:
    content = hashlib.sha256()
    content.update(json.dumps([LAYOUT, settings.record(), source.classes, starts]).encode())
    names, labels, sizes = source.items.names, source.items.labels, source.items.images.sizes
    for first in range(0, len(order), _CHUNK):
        for i in order[first : first + _CHUNK].tolist():
            content.update(f"{names[i]}\n{labels[i]} {sizes[i]}\n".encode())
    return content.hexdigest()


@dataclass(frozen=True)
class Part:
    """A finished shard: what the manifest needs to know of it, and what happened to its images.

    shard is None where no image of it could be used. report: (name, what, reason) with what one of
    converted, damaged, skipped. prints, pixels: see shard_tools/sharding/statistics.py. markers:
    how often CheckedImage.markers was what. times: `file_times` of its images as they were read
    ("": not known).
    """

    shard: Shard | None
    rows: np.ndarray
    names: list[str]
    report: list[tuple[str, str, str]]
    prints: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    pixels: np.ndarray = field(default_factory=lambda: NO_PIXELS)
    markers: dict[str, int] = field(default_factory=dict)
    times: str = ""


def part_path(dest: Path, number: int) -> Path:
    return dest / PARTS / f"{number:06d}.json"


def write_part(dest: Path, number: int, digest: str, part: Part) -> None:
    content = {
        "plan": digest,
        "shard": asdict(part.shard) if part.shard else None,
        "rows": base64.b64encode(part.rows.tobytes()).decode(),
        "names": part.names,
        "report": part.report,
        "fingerprints": base64.b64encode(part.prints.tobytes()).decode(),
        "pixels": part.pixels.tolist(),
        "markers": part.markers,
        "times": part.times,
    }
    write_atomic(part_path(dest, number), json.dumps(content).encode())


def read_part(dest: Path, number: int, digest: str) -> Part | None:
    """The part if this plan's shard is finished, else None (not there, or its tar is not)."""
    try:
        content = json.loads(part_path(dest, number).read_bytes())
        if content["plan"] != digest:
            return None
        shard = Shard(**content["shard"]) if content["shard"] else None
        if shard and (dest / shard.name).stat().st_size != shard.bytes:
            return None
        rows = np.frombuffer(base64.b64decode(content["rows"]), SAMPLE)
        report = [(name, what, reason) for name, what, reason in content["report"]]
        prints = np.frombuffer(base64.b64decode(content["fingerprints"]), np.uint64)
        pixels = np.array(content["pixels"])
        markers, times = content.get("markers", {}), content.get("times", "")
        return Part(shard, rows, content["names"], report, prints, pixels, markers, times)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def plan_record(
    plan: Plan, source_name: str, request: str, note: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `--merge` and `--resume` need of a plan; the content of plan.json. request: names the
    call that made it (see shard_tools/sharding/job.py). note: for the manifest too."""
    return {
        "request": request,
        "digest": plan.digest,
        "shards": plan.shards,
        "classes": list(plan.source.classes),
        "ignored": plan.source.ignored,
        "missing": plan.source.missing,
        "duplicates": plan.source.duplicates,
        "made": {
            "source": source_name,
            "images": len(plan.order),
            "options": plan.settings.record(),
            **(note or {}),
        },
    }


def read_plan_record(dest: Path) -> dict[str, Any] | None:
    """plan.json of a job under way in `dest`, or None."""
    path = dest / PARTS / PLAN
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ToolError(f"{path}: damaged ({error}); remove {dest / PARTS}") from error

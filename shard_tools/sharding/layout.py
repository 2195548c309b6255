"""Which image goes into which shard, decided before any work and independent of who does it.

The plan is a pure function of the source's listing and the options, so any number of processes
or cluster tasks write the same shards, and a resumed job ends in the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.atomic import write_atomic
from shard_tools.cli import ToolError
from shard_tools.manifest import SAMPLE, Shard
from shard_tools.sharding.images import ImageFault, ImageSettings, check_image
from shard_tools.sharding.sources import Item, Source, read_item
from shard_tools.sharding.statistics import NO_PIXELS
from shard_tools.tar import BLOCK, RECORD, padded

PARTS = ".parts"  # folder inside DEST while the job runs
PLAN = "plan.json"
LAYOUT = 2  # raised when equal options would give other bytes
# Bytes of a sample beside its image: three headers, cls and json with their padding.
OVERHEAD = 5 * BLOCK
PROBE = 64  # images whose new size is measured when they are to be resized


@dataclass(frozen=True)
class Settings:
    """Everything the bytes of the shards depend on, apart from the source."""

    name: str = "shard"
    seed: int = 0
    shard_size: int = 256 << 20  # bytes; only images over half of it can make a shard larger
    image: ImageSettings = field(default_factory=ImageSettings)


@dataclass(frozen=True)
class Plan:
    """Items in shard order; shard i holds items[starts[i]:starts[i+1]]."""

    source: Source
    settings: Settings
    items: list[Item]
    starts: list[int]
    digest: str

    @property
    def shards(self) -> int:
        return len(self.starts) - 1

    def shard_name(self, number: int) -> str:
        return f"{self.settings.name}-{number:06d}.tar"


def make_plan(source: Source, settings: Settings) -> Plan:
    """Shuffle by (seed, name), then cut into shards of equal planned size."""
    items = sorted(source.items, key=lambda item: (_rank(settings.seed, item.name), item.offset))
    ratio = _size_ratio(source, items, settings.image) if settings.image.changes_size else 1.0
    sizes = [padded(int(item.size * ratio)) + OVERHEAD for item in items]
    ends = list(accumulate(sizes))
    # A shard may pass its even share by one image, and still has to keep to the limit.
    limit = settings.shard_size - RECORD
    share = max(limit - max(sizes), limit // 2, 1)
    count = min(len(items), -(-ends[-1] // share))
    cuts = np.searchsorted(ends, [ends[-1] * i / count for i in range(1, count)], side="left") + 1
    starts = sorted({0, *(int(cut) for cut in cuts if cut < len(items)), len(items)})
    return Plan(source, settings, items, starts, _digest(source, settings, items, starts))


def _rank(seed: int, name: str) -> bytes:
    """A pseudo-random rank; a hash keeps its meaning over library versions, a shuffle may not."""
    return hashlib.blake2b(name.encode(), key=str(seed).encode(), digest_size=16).digest()


def _size_ratio(source: Source, items: list[Item], settings: ImageSettings) -> float:
    """New bytes per source byte, from the first images of the shuffled order."""
    before = after = 0
    for item in items[:PROBE]:
        try:
            after += len(check_image(read_item(source.root, item), settings).data)
            before += item.size
        except ImageFault:
            continue
    return after / before if before else 1.0


def _digest(source: Source, settings: Settings, items: list[Item], starts: list[int]) -> str:
    content = hashlib.sha256()
    content.update(json.dumps([LAYOUT, asdict(settings), source.classes, starts]).encode())
    for item in items:
        content.update(f"{item.name}\n{item.label} {item.size}\n".encode())
    return content.hexdigest()


@dataclass(frozen=True)
class Part:
    """A finished shard: what the manifest needs to know of it, and what happened to its images.

    shard is None where no image of it could be used. report: (name, what, reason) with what one of
    converted, damaged, skipped. prints, pixels: see shard_tools/sharding/statistics.py.
    """

    shard: Shard | None
    rows: np.ndarray
    names: list[str]
    report: list[tuple[str, str, str]]
    prints: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    pixels: np.ndarray = field(default_factory=lambda: NO_PIXELS)


def part_path(dest: Path, number: int) -> Path:
    return dest / PARTS / f"{number:06d}.json"


def write_part(dest: Path, number: int, digest: str, part: Part) -> None:
    content = {
        "plan": digest,
        "shard": asdict(part.shard) if part.shard else None,
        "rows": base64.b64encode(part.rows.tobytes()).decode(),
        "names": part.names,
        "report": part.report,
        "prints": base64.b64encode(part.prints.tobytes()).decode(),
        "pixels": part.pixels.tolist(),
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
        prints = np.frombuffer(base64.b64decode(content["prints"]), np.uint64)
        pixels = np.array(content["pixels"])
        return Part(shard, rows, content["names"], report, prints, pixels)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def plan_record(plan: Plan, source_name: str) -> dict[str, Any]:
    """What `--merge` and `--resume` need of a plan; the content of plan.json."""
    return {
        "digest": plan.digest,
        "shards": plan.shards,
        "classes": list(plan.source.classes),
        "ignored": plan.source.ignored,
        "missing": plan.source.missing,
        "duplicates": plan.source.duplicates,
        "made": {
            "source": source_name,
            "images": len(plan.items),
            "options": asdict(plan.settings),
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


def shard_items(plan: Plan, number: int) -> list[Item]:
    return plan.items[plan.starts[number] : plan.starts[number + 1]]

"""Put the parts of a sharding job together: report, manifest, clean-up."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from shard_tools.atomic import write_atomic
from shard_tools.cli import ToolError
from shard_tools.manifest import SAMPLE, Manifest, write_manifest
from shard_tools.sharding.layout import PARTS, read_part, read_plan_record
from shard_tools.sharding.statistics import duplicates, mean_and_std

REPORT = "report.jsonl"
_REMARKS = ("converted", "damaged", "skipped", "ignored", "dropped", "duplicate")


def merge_parts(dest: Path) -> Manifest:
    """Write report.jsonl and the manifest from the finished parts in `dest`, then remove them.

    Raises ToolError where there is no job, a shard is not finished, or no image was usable.
    """
    record = read_plan_record(dest)
    if record is None:
        raise ToolError(f"{dest}: no sharding job is here, so there is nothing to merge")
    found = [read_part(dest, number, record["digest"]) for number in range(record["shards"])]
    missing = [number for number, part in enumerate(found) if part is None]
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        raise ToolError(f"{dest}: {len(missing)} shards are not finished yet: numbers {listed}")
    parts = [part for part in found if part is not None]
    lines: list[tuple[str, str, str]] = [
        (name, "ignored", reason) for name, reason in record["ignored"]
    ]
    lines += [(name, "skipped", reason) for name, reason in record["missing"]]
    lines += [line for part in parts for line in part.report]
    filled = [part for part in parts if part.shard]
    if not filled:
        raise ToolError(f"{dest}: no image could be used; the first: {': '.join(lines[0])}")
    rows = np.concatenate([np.zeros(0, SAMPLE), *(part.rows for part in filled)])
    names = [name for part in filled for name in part.names]
    prints = np.concatenate([part.prints for part in filled])
    lines += [(name, "dropped", reason) for name, reason in record["duplicates"]]
    again = duplicates(prints, rows["label"], names)
    lines += [(names[row], "duplicate", reason) for row, reason in again]
    counts = Counter(what for _, what, _ in lines)
    write_atomic(dest / REPORT, report_lines(lines))
    made = {
        "kind": "shards",
        "tool": "make_shards",
        "version": version("relaxmim"),
        "plan": record["digest"],
        **record["made"],
        "report": {what: counts[what] for what in _REMARKS},
        "pixels": mean_and_std(np.sum([part.pixels for part in filled], axis=0)),
    }
    manifest = write_manifest(
        dest,
        shards=[part.shard for part in filled if part.shard],
        index=rows,
        classes=record["classes"],
        made=made,
        names=names,
    )
    clean_up(dest)
    return manifest


def clean_up(dest: Path) -> None:
    """Take away what a finished job no longer needs."""
    remove_leftovers(dest)
    shutil.rmtree(dest / PARTS, ignore_errors=True)


def remove_leftovers(dest: Path) -> None:
    """Temporary tars of processes that were killed."""
    for leftover in dest.glob(".*.tar.*.tmp"):
        leftover.unlink(missing_ok=True)


def report_lines(remarks: list[tuple[str, str, str]]) -> bytes:
    """report.jsonl: one line per image that was not taken as it is."""
    lines = [
        json.dumps({"name": name, "what": what, "reason": reason}, ensure_ascii=False) + "\n"
        for name, what, reason in remarks
    ]
    return "".join(lines).encode()

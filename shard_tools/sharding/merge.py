"""Put the parts of a sharding job together: report, manifest, clean-up."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from shard_tools.atomic import write_atomic
from shard_tools.cli import ToolError
from shard_tools.manifest import SAMPLE, Manifest, write_manifest
from shard_tools.sharding.archives import UNPACKED
from shard_tools.sharding.layout import PARTS, read_part, read_plan_record
from shard_tools.sharding.statistics import NO_PIXELS, duplicates, mean_and_std
from shard_tools.texts import Texts

REPORT = "report.jsonl"
_REMARKS = ("converted", "damaged", "skipped", "ignored", "dropped", "duplicate")


def merge_parts(dest: Path) -> Manifest:
    """Write report.jsonl and the manifest from the finished parts in `dest`, then remove them.

    Raises ToolError where there is no job, a shard is not finished, or no image was usable.
    """
    record = read_plan_record(dest)
    if record is None:
        raise ToolError(f"{dest}: no sharding job is here, so there is nothing to merge")
    shards, rows, names, prints, pixels = [], [np.zeros(0, SAMPLE)], Texts(), [], NO_PIXELS
    missing, markers = [], Counter[str]()
    lines: list[tuple[str, str, str]] = [
        (name, "ignored", reason) for name, reason in record["ignored"]
    ]
    lines += [(name, "skipped", reason) for name, reason in record["missing"]]
    for number in range(record["shards"]):
        part = read_part(dest, number, record["digest"])
        if part is None:
            missing.append(number)
            continue
        lines += part.report
        markers.update(part.markers)
        if part.shard:
            shards.append(part.shard)
            rows.append(part.rows)
            names.extend(part.names)
            prints.append(part.prints)
            pixels = pixels + part.pixels
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        raise ToolError(f"{dest}: {len(missing)} shards are not finished yet: numbers {listed}")
    if not shards:
        raise ToolError(f"{dest}: no image could be used; the first: {': '.join(lines[0])}")
    index = np.concatenate(rows)
    rows.clear()
    lines += [(name, "dropped", reason) for name, reason in record["duplicates"]]
    again = duplicates(np.concatenate(prints), index["label"], names)
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
        "pixels": mean_and_std(pixels),
    }
    if markers:
        made["restart_markers"] = restart_markers(index, markers)
    manifest = write_manifest(
        dest,
        shards=shards,
        index=index,
        classes=record["classes"],
        made=made,
        names=names,
    )
    clean_up(dest)
    return manifest


def restart_markers(index: np.ndarray, found: dict[str, int]) -> dict[str, object]:
    """What a manifest says of them: in how many images they are, how often they were added, and
    why other images stay as they are."""
    left = {reason: n for reason, n in sorted(found.items()) if reason != "added"}
    return {
        "images": int(np.count_nonzero(index["interval"])),
        "added": found.get("added", 0),
        "left": left,
    }


def clean_up(dest: Path) -> None:
    """Take away what a finished job no longer needs."""
    remove_leftovers(dest)
    shutil.rmtree(dest / PARTS, ignore_errors=True)


def remove_unpacked(dest: Path) -> None:
    """Take away the plain tars of compressed archives from which `dest`/train and val were made."""
    shutil.rmtree(dest / PARTS / UNPACKED, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds a job, or is not there
        (dest / PARTS).rmdir()


def remove_leftovers(dest: Path) -> None:
    """Temporary tars of processes that were killed."""
    for leftover in dest.glob(".*.tar.*.tmp"):
        leftover.unlink(missing_ok=True)


def report_lines(remarks: list[tuple[str, str, str]]) -> bytes:
    """report.jsonl: one line per image that was not taken as it is; bytes of a name that are no
    UTF-8 become escapes of JSON."""
    lines = [
        json.dumps({"name": name, "what": what, "reason": reason}, ensure_ascii=False) + "\n"
        for name, what, reason in remarks
    ]
    return "".join(lines).encode("utf-8", "backslashreplace")

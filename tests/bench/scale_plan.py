"""A part of bench_scale.py in a process without torch: the memory of planning."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from shard_tools.sharding.items import Item, Items
from shard_tools.sharding.layout import PARTS, Settings, make_plan
from shard_tools.sharding.plan_file import write_plan
from shard_tools.sharding.sources import Source


def plan_bytes(files: int) -> float:
    """Peak memory of planning `files` images, whose listing is made up, and of writing the plan."""
    names = (f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(files))
    items = Items(Item(n, i % 1000, n, 0, 100_000 + i % 7919) for i, n in enumerate(names))
    classes = tuple(f"n{c:08d}" for c in range(1000))
    plan = make_plan(Source("/", items, classes), Settings())
    with tempfile.TemporaryDirectory() as dest:
        (Path(dest) / PARTS).mkdir()
        write_plan(Path(dest), plan)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's too
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    print(json.dumps({"bytes": plan_bytes(int(sys.argv[1]))}))

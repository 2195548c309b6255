"""Shards of CIFAR-10, made by the shard tools where they are not there yet."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from eval.shared.processes import call
from pipeline.errors import UserError, naming, not_there
from pipeline.runtime.run_lock import RunLock
from shard_tools.atomic import write_json
from shard_tools.cifar_images import is_wanted, members

ROOT = Path(__file__).resolve().parents[2]
DONE = "shards/done.json"  # what the shards were made of, written last
HELD_OUT = 0.1  # of the training images, for choosing learning rates
SEED = 1000  # of which ones
BUILDING = ".cifar10-building"  # folder of what is not finished, of this command alone


def make_cifar_shards(source: Path | None, data: Path) -> None:
    """DATA/shards/{train, val, tune-train, tune-val}; nothing to do where they are there already.

    tune-val is a tenth of the training images, tune-train the others. UserError where there is no
    source to make them of, or where they were made of another one.
    """
    done, building = data / DONE, data / BUILDING
    with naming(done, "cannot be read"):
        found = done.read_bytes() if done.is_file() else b""
        others = not found and done.parent.exists() and any(done.parent.iterdir())
    if found:
        check_source(found, source, done)
        return
    if others:
        raise UserError(
            f"{done.parent}: holds no finished shards of CIFAR-10, and was not left by this "
            "command; remove it, or choose another --data"
        )
    if source is None:
        raise UserError(
            f"{data / 'shards'}: has no shards of CIFAR-10 yet; name your copy: --cifar10 PATH "
            "(make paper-cifar CIFAR10=PATH), an ImageFolder of train and test, or the official "
            "python or binary archive"
        )
    if not source.exists():
        raise UserError(not_there(source))
    lock = RunLock(building, needed=False, advice="wait for it, or choose another --data")
    try:
        with naming(building, "cannot be removed"):
            for left in (building / "images", building / "shards"):  # of a call that was cut off
                if left.exists():
                    shutil.rmtree(left)
        build(source, building)
        with naming(done.parent, "cannot be written"):
            write_json(building / DONE, record_of(source))
            os.replace(building / done.parent.name, done.parent)
        with naming(building, "cannot be removed"):
            shutil.rmtree(building)
    finally:
        lock.release()


def build(source: Path, data: Path) -> None:
    """Run the shard tools: DATA/images, then DATA/shards of them."""
    tool, shards = ROOT / "shard_tools", data / "shards"

    def step(what: str, name: str, *words: object) -> None:
        call(what, [sys.executable, tool / name, *map(str, words)], 1)

    step(f"images of {source}", "cifar_images.py", source, data / "images")
    order: list[object] = []
    for part in ("train", "val"):
        words = [data / "images" / f"{part}.tar", shards / part, "--shard-size", "1MiB", *order]
        step(f"shards of {part}", "make_shards.py", *words)
        order = ["--classes-from", shards / "train"]
    choice = ["--fraction", f"{HELD_OUT:g}", "--seed", SEED]
    step("held-out images", "subset.py", shards / "train", shards / "tune-val", *choice)
    step("the others", "subset.py", shards / "train", shards / "tune-train", *choice, "--rest")


def record_of(source: Path) -> dict[str, Any]:
    """What distinguishes one source from another, in whatever folder it is."""
    return {"source": source.resolve().name, "bytes": size_of(source)}


def size_of(source: Path) -> int:
    """Bytes of an archive, or of a folder's images and batches; 0 where there is nothing."""
    if not source.is_dir():
        return source.stat().st_size if source.is_file() else 0
    with members(source) as found:
        return sum(member.size for member in found if is_wanted(member.name))


def check_source(found: bytes, source: Path | None, done: Path) -> None:
    """UserError where the shards are not CIFAR-10's, or of another source than is named."""
    try:
        known = json.loads(found)
    except ValueError as error:
        raise UserError(f"{done}: is damaged; remove {done.parent} to build it again") from error
    if not isinstance(known, dict) or "train" in known:  # as demo_shards.py writes it
        raise UserError(f"{done.parent}: are no shards of CIFAR-10; choose another --data")
    if source is None:
        return
    here, name = record_of(source), known.get("source")
    if source.is_dir() and known == here | {"bytes": 0}:
        return  # made before those of folders were counted
    if here != known and (source.exists() or here["source"] != name):
        other = f"another {name}" if here["source"] == name else name
        raise UserError(
            f"{done.parent}: was made of {other}, not of {source}; choose another --data, or leave "
            "CIFAR10 out to use them"
        )

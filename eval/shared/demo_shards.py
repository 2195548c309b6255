"""Shards of the demo's photographs, built by the shard tools where they are not there yet."""

import json
import shutil
import sys
from pathlib import Path

from eval.shared.processes import call
from pipeline.errors import UserError, naming
from shard_tools.atomic import write_json
from shard_tools.demo_images import RECORD, SIZE

ROOT = Path(__file__).resolve().parents[2]
DONE = "shards/done.json"  # how many crops the shards have, and of which size; written last
EARLIER_SIZE = 80  # where it has none


def make_demo_shards(data: Path, train: int, val: int, size: int = SIZE) -> None:
    """DATA/shards of `train` and `val` crops of `size` pixels; nothing to do where they are there.

    UserError names a file that cannot be written, or the tool that failed.
    """
    done = data / DONE
    wanted = {"train": train, "val": val, "size": size}
    with naming(done, "cannot be read"):
        found = done.read_text(encoding="utf-8") if done.is_file() else ""
    if found and _same(found, wanted):
        print(f"demo shards are there: {data / 'shards'}")
        return
    shards = data / "shards"
    if shards.exists() and not _of_a_demo(data, found):
        raise UserError(
            f"{shards}: no demo wrote it, and the demo would replace it; choose another "
            "folder for its data"
        )
    tool, python = ROOT / "shard_tools", sys.executable
    options = ["--train", str(train), "--val", str(val), "--size", str(size)]
    call(
        "photographs from scikit-image and scikit-learn",
        [python, tool / "demo_images.py", data / "images", *options],
        1,
    )
    if shards.exists():
        with naming(shards, "cannot be removed"):
            shutil.rmtree(shards)
    for part in ("train", "val"):
        source = data / "images" / part
        command: list[str | Path] = [python, tool / "make_shards.py", source, shards / part]
        call(f"shards of {part}", [*command, "--shard-size", "1MiB"], 1)
    with naming(done, "cannot be written"):
        write_json(done, wanted)


def _of_a_demo(data: Path, found: str) -> bool:
    """Whether DATA/shards are a demo's: by their done.json (CIFAR-10's shards have one, too), or,
    where they were cut off, by the images."""
    begun = '"source"' not in found and (data / "images" / RECORD).is_file()
    return begun or '"train"' in found


def _same(text: str, wanted: dict[str, int]) -> bool:
    try:
        return bool({"size": EARLIER_SIZE} | json.loads(text) == wanted)
    except (ValueError, TypeError):  # damaged: build them again
        return False

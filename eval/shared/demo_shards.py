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
    if (data / "shards").exists() and not (found or (data / "images" / RECORD).is_file()):
        raise UserError(
            f"{data / 'shards'}: no demo wrote it, and the demo would replace it; choose another "
            "folder for its data"
        )
    for folder in ("images", "shards"):
        if (data / folder).exists():
            with naming(data / folder, "cannot be removed"):
                shutil.rmtree(data / folder)
    tool, python = ROOT / "shard_tools", sys.executable
    options = ["--train", str(train), "--val", str(val), "--size", str(size)]
    call(
        "photographs from scikit-image and scikit-learn",
        [python, tool / "demo_images.py", data / "images", *options],
        1,
    )
    for part in ("train", "val"):
        source, shards = data / "images" / part, data / "shards" / part
        command: list[str | Path] = [python, tool / "make_shards.py", source, shards]
        call(f"shards of {part}", [*command, "--shard-size", "1MiB"], 1)
    with naming(done, "cannot be written"):
        write_json(done, wanted)


def _same(text: str, wanted: dict[str, int]) -> bool:
    try:
        return bool({"size": EARLIER_SIZE} | json.loads(text) == wanted)
    except (ValueError, TypeError):  # cut off: build them again
        return False

"""The formats of the peers, each written from the same JPEG files by its own writer. Runs inside
the environment of the peer.

    python peer_formats.py NAME --corpus FOLDER --out FOLDER [--images N]

Writes the first N files (more than there are: again from the first one on), and before that, with
--warm, a few of them elsewhere. The last line is one JSON object with the CPU seconds of this
process and those that it started.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

WARM = 40  # files
ABOUT = {"name": "n01440764/n01440764_10026.JPEG", "width": 500, "height": 375}


def files_of(folder: Path) -> list[str]:
    return sorted(str(path) for path in (folder / "images").glob("*/*.jpg"))


def label_of(path: str) -> int:
    return int(Path(path).parent.name[1:])


def open_pil(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def sample_of(path: str) -> dict[str, Any]:
    return {"jpg": Path(path).read_bytes(), "cls": label_of(path)}


# ---------------------------------------------------------------- writers: (files, empty folder)


def shardwriter(samples: Iterable[dict[str, Any]], out: Path) -> None:
    from webdataset import ShardWriter

    with ShardWriter(str(out / "%06d.tar"), maxcount=10**9, maxsize=10**9, verbose=0) as sink:
        for number, sample in enumerate(samples):
            sink.write({"__key__": f"{number:09d}", "json": ABOUT, **sample})


def our_writer(samples: Iterable[dict[str, Any]], out: Path) -> None:
    from shard_tools.tar import ShardWriter

    about = json.dumps(ABOUT).encode()
    handle = os.open(out / "s.tar", os.O_WRONLY | os.O_CREAT)
    sink = ShardWriter(handle, checksum=False)
    for number, sample in enumerate(samples):
        fields = {"jpg": sample["jpg"], "cls": b"%d" % sample["cls"], "json": about}
        sink.write(f"{number:09d}", fields)
    sink.close()
    os.close(handle)


def streaming(paths: Sequence[str], out: Path) -> None:
    from streaming import MDSWriter

    columns = {"jpg": "bytes", "cls": "int"}
    with MDSWriter(out=str(out), columns=columns, size_limit="8mb") as sink:
        for path in paths:
            sink.write(sample_of(path))


def litdata(paths: Sequence[str], out: Path) -> None:
    from litdata import optimize

    optimize(sample_of, list(paths), str(out), chunk_bytes="8MB", num_workers=1)


def energon(paths: Sequence[str], out: Path) -> None:
    """Reads our tars, of all files."""
    for tar in (out.parent / "shards").glob("*.tar"):
        os.symlink(tar, out / tar.name)
    fields = json.dumps({"image": "jpg", "label": "cls"})
    command = [Path(sys.executable).with_name("energon"), "prepare", "--non-interactive",
               "--no-progress", "--split-ratio", "1,0,0", "--field-map", fields,
               "--sample-type", "ImageClassificationSample", out]  # fmt: skip
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


class Pixels:
    """Pixels and label, as FFCV's writer wants them; it encodes them again, at 4:2:0."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        import numpy as np

        sample = sample_of(self.paths[number])
        return np.asarray(open_pil(sample["jpg"])), sample["cls"]


def ffcv(paths: Sequence[str], out: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField("jpg", jpeg_quality=96), "label": IntField()}
    DatasetWriter(str(out / "data.beton"), fields, num_workers=1).from_indexed_dataset(
        Pixels(paths)
    )


def tar(paths: Sequence[str], out: Path) -> None:
    """GNU tar: a copy of the files, without labels, shards or index."""
    names = "\n".join(paths)
    command = ["tar", "--dereference", "--absolute-names", "-cf", out / "all.tar", "-T", "-"]
    subprocess.run(command, input=names, text=True, check=True)


def make_shards(check: str) -> Callable[[Sequence[str], Path], None]:
    """What a process of make_shards does for a shard, from files to the fsynced tar."""

    def write(paths: Sequence[str], out: Path) -> None:
        from shard_tools.sharding.images import ImageSettings
        from shard_tools.sharding.items import Item
        from shard_tools.sharding.writer import ShardJob, write_shard

        sizes = [os.path.getsize(path) for path in paths]
        items = [
            Item(path[-20:], label_of(path), path, 0, size)
            for path, size in zip(paths, sizes, strict=True)
        ]
        classes = tuple(f"n{number:08d}" for number in range(max(i.label for i in items) + 1))
        job = ShardJob(0, "s.tar", 0, items, "/", classes, ImageSettings(check=check), "skip",
                       out, "", 1_281_167)  # fmt: skip
        write_shard(job)

    return write


WRITERS: dict[str, Callable[[Sequence[str], Path], None]] = {
    "make_shards": make_shards("decode"),
    "make_shards, headers": make_shards("headers"),
    "shardwriter": lambda paths, out: shardwriter(map(sample_of, paths), out),
    "streaming": streaming,
    "litdata": litdata,
    "energon": energon,
    "ffcv": ffcv,
    "tar": tar,
}
# The same with samples in memory: (samples, empty folder).
ALONE: dict[str, Callable[[Iterable[dict[str, Any]], Path], None]] = {
    "our writer alone": our_writer,
    "shardwriter alone": shardwriter,
}


def tree_seconds() -> float:
    """CPU seconds of this process and of all its descendants, living or awaited."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    tick, seen = os.sysconf("SC_CLK_TCK"), {os.getpid()}
    waiting = [os.getpid()]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            for child in {int(word) for word in task.read_text().split()} - seen:
                seen.add(child)
                waiting.append(child)
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / tick
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=(*WRITERS, *ALONE))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int)
    parser.add_argument("--warm", action="store_true", help="write a few first, which do not count")
    args = parser.parse_args()
    files = files_of(args.corpus)
    items: list[Any] = list(itertools.islice(itertools.cycle(files), args.images or len(files)))
    write: Callable[[Any, Path], None] = (WRITERS | ALONE)[args.name]
    if args.name in ALONE:
        items = [sample_of(path) for path in items]
    if args.warm:
        few = args.out.with_name(args.out.name + ".warm")
        few.mkdir()
        write(items[:WARM], few)
        shutil.rmtree(few)
    args.out.mkdir()
    cpu, wall = tree_seconds(), time.perf_counter()
    write(items, args.out)
    spent = {"cpu": tree_seconds() - cpu, "wall": time.perf_counter() - wall}
    print("\n" + json.dumps({"images": len(items), **spent}), flush=True)


if __name__ == "__main__":
    main()

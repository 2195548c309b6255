"""Tiny shards that webdataset itself wrote, for the tests of the loader."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pipeline.data.batch import LoaderConfig
from pipeline.data.loader import Loader, train_loader
from shard_tools.manifest import SAMPLE, Shard, write_manifest


def jpeg(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A smooth random picture, (width, height), as JPEG bytes."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_shards(folder: Path, images: list[list[bytes]]) -> Path:
    """Shards written by webdataset, and their manifest. Labels count from 0 modulo 5."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, shards = [], []
    for number, content in enumerate(images):
        path = folder / f"t-{number:06d}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for place, data in enumerate(content):
                key = f"{number}-{place}"
                writer.write({"__key__": key, "cls": (number + place) % 5, "jpg": data})
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".cls"):
                    label = int(tar.extractfile(member).read())
                else:
                    rows.append((member.offset_data, member.size, label, 48, 40, 1, 0, 0))
        data = path.read_bytes()
        shards.append(Shard(path.name, len(content), len(data), hashlib.sha256(data).hexdigest()))
    write_manifest(folder, shards=shards, index=np.array(rows, SAMPLE), classes=list("abcde"))
    return folder


def open_loader(
    folder: object, *, rank: int = 0, world: int = 1, start_step: int = 0, total_steps: int,
    **config: object,
) -> Loader:  # fmt: skip
    """A training loader whose options are given flat."""
    steps = range(start_step, total_steps)
    return train_loader(LoaderConfig(folder, **config), rank, world, steps)

"""Small image trees for the tests of the shard tools."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 18), mode: str = "RGB") -> Image.Image:
    """A smooth random picture: width, height in pixels."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int, size: tuple[int, int] = (24, 18)) -> bytes:
    return encode(picture(seed, size), quality=90)


def image_tree(folder: Path, counts: dict[str, int]) -> Path:
    """An ImageFolder tree of small JPEGs; counts: images per class."""
    seed = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            seed += 1
            data = jpeg(seed, (16 + seed % 9, 12 + seed % 7))
            (folder / name / f"{name}_{number:03d}.JPEG").write_bytes(data)
    return folder


def flipped(data: bytes, bit: int) -> bytes:
    """`data` with one bit turned."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def tars_of(folder: Path) -> dict[str, bytes]:
    """Name → bytes of every file in a shard folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}

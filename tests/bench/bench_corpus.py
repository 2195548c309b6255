"""The files that the data benches run on: the user's, or made ones that are like ImageNet's.

What ImageNet-1k's training files are like was measured on 500 of them, one of each second class:
110 KB on average, none progressive, all with the tables of the standard's annex K scaled to a
quality, 6 % with restart markers, Huffman tables of their own. The made files follow these
figures; their content is cut from photographs inside installed packages.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from shard_tools.demo_images import PHOTOGRAPHS, photograph

CLASSES = 10
MADE = 500
# (width, height): share in a thousand. The rest of the files have one of 200 other sizes.
SIZES = {
    (500, 375): 320, (500, 333): 190, (375, 500): 100, (333, 500): 70, (500, 334): 40,
    (500, 400): 60, (640, 480): 40, (600, 450): 20, (400, 300): 40, (500, 500): 30,
    (300, 225): 40, (150, 113): 30, (1200, 900): 15, (1600, 1200): 2,
}  # fmt: skip
# (Pillow's subsampling, None = grey), qualities, bits per pixel at the 5, 25, 50, 75 and 95 %
# points: share in a thousand
KINDS = {
    (0, (96,) * 9 + (91,), (2.6, 4.0, 5.4, 6.7, 8.9)): 764,
    (2, (60, 70, 75, 75, 80, 80, 85, 90, 94), (0.8, 1.3, 1.8, 2.5, 3.9)): 206,
    (None, (96, 96, 75), (1.2, 2.0, 3.0, 3.9, 5.0)): 18,
    (1, (85, 90), (1.2, 1.8, 2.4, 3.0, 3.8)): 12,
}
_POINTS = (0.05, 0.25, 0.5, 0.75, 0.95)
_RESTARTS = 0.06  # of the files
_MOST_NOISE = 40.0  # grey values


@dataclass(frozen=True)
class Corpus:
    """images/<class>/*.jpg and, once `shard` ran, shards/ below `folder`."""

    folder: Path
    files: int
    mean_bytes: float
    made: bool

    def __str__(self) -> str:
        what = "made files like ImageNet's" if self.made else "files"
        return f"{self.files} {what}, {self.mean_bytes / 1000:.0f} KB on average"


def read_corpus(source: Path | None, folder: Path, most: int = 5000) -> Corpus:
    """The JPEGs below `source` (at most `most`, spread evenly) or made ones, in class folders."""
    paths = jpegs(source) if source else make_files(folder / "made", MADE)
    if not paths:
        raise SystemExit(f"error: no JPEG below {source}")
    paths = paths[:: -(-len(paths) // most)]
    for number, path in enumerate(paths):
        home = folder / "images" / f"n{number % CLASSES:08d}"
        home.mkdir(parents=True, exist_ok=True)
        os.symlink(path.resolve(), home / f"{number:06d}.jpg")
    sizes = [path.stat().st_size for path in paths]
    return Corpus(folder, len(paths), sum(sizes) / len(sizes), source is None)


def jpegs(folder: Path) -> list[Path]:
    """Baseline and other colour or grey JPEGs below a folder, by content."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            if file.read(3) == b"\xff\xd8\xff":
                found.append(path)
    return found


def shard(corpus: Corpus, name: str = "shards", *options: str) -> Path:
    """Write the corpus into shards by make_shards; the folder."""
    command = [sys.executable, "-m", "shard_tools.make_shards", corpus.folder / "images",
               corpus.folder / name, "--shard-size", "8MiB", "--on-error", "skip"]  # fmt: skip
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: make_shards failed: {done.stderr.strip()[-1000:]}")
    return corpus.folder / name


# ---------------------------------------------------------------- made files


def make_files(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs with the sizes, samplings, qualities and bits per pixel of KINDS and SIZES."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    pictures = [photograph(*place) for place in PHOTOGRAPHS.values()]
    sizes, kinds = list(SIZES), list(KINDS)
    size_of = draw.choice(len(sizes), count, p=shares(SIZES.values()))
    kind_of = draw.choice(len(kinds), count, p=shares(KINDS.values()))
    paths = []
    for number in range(count):
        sampling, qualities, points = kinds[kind_of[number]]
        goal = float(np.interp(draw.random(), _POINTS, points))
        piece = cut(pictures[number % len(pictures)], sizes[size_of[number]], draw)
        options = {
            "quality": int(draw.choice(qualities)),
            "subsampling": sampling or 0,
            "optimize": True,
            "restart_marker_rows": int(draw.random() < _RESTARTS),
        }
        data = encode(piece if sampling is not None else piece.convert("L"), goal, options, draw)
        paths.append(folder / f"{number:06d}.jpg")
        paths[-1].write_bytes(data)
    return paths


def shares(counts: object) -> np.ndarray:
    values = np.array(list(counts), float)  # type: ignore[call-overload]
    return values / values.sum()


def cut(picture: Image.Image, size: tuple[int, int], draw: np.random.Generator) -> Image.Image:
    """A rectangle of the picture with the aspect ratio of `size`, resized to it."""
    wide, high = size
    scale = min(picture.width / wide, picture.height / high) * draw.uniform(0.6, 1.0)
    left = draw.uniform(0, picture.width - wide * scale)
    top = draw.uniform(0, picture.height - high * scale)
    box = (left, top, left + wide * scale, top + high * scale)
    return picture.resize(size, Image.Resampling.BICUBIC, box)


def encode(
    piece: Image.Image, goal: float, options: dict[str, int | bool], draw: np.random.Generator
) -> bytes:
    """The picture as a JPEG of about `goal` bits per pixel, by noise as a sensor adds it, or by a
    blur (of a smaller picture enlarged) where it has more detail than that."""
    shape = np.asarray(piece).shape
    grain = draw.normal(0, 1, shape[:2])[(..., *[None] * (len(shape) - 2))]

    def made(noise: float) -> bytes:
        if noise < 0:
            small = [max(8, round(side * (1 + noise))) for side in piece.size]
            image = piece.resize(small, Image.Resampling.BICUBIC).resize(piece.size, 3)
        else:
            pixels = np.asarray(piece, np.float32) + grain * noise
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        return buffer.getvalue()

    wanted = goal * piece.width * piece.height / 8
    low, high = (0.0, _MOST_NOISE) if len(made(0.0)) < wanted else (-0.9, 0.0)
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (middle, high) if len(made(middle)) < wanted else (low, middle)
    return made((low + high) / 2)

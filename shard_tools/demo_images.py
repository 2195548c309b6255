"""Write the demo data: an ImageFolder tree of crops of real photographs, without any download.

    python shard_tools/demo_images.py data/demo

The photographs ship inside the wheels of scikit-image and scikit-learn. One photograph is one
class. Training crops and validation crops come from strips of the picture that share no pixel.
Every crop is moved to a mean colour and a contrast drawn independently of its class, so the
classes differ by texture and shape only. Equal options give equal bytes.

docs/data.md lists the origin and licence of each photograph.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import check_range, naming
from pipeline.help_text import HelpFormatter
from shard_tools.atomic import check_writable, write_atomic
from shard_tools.cli import ToolError, parse, progress, run, seed_number
from shard_tools.cores import cores

# (package, file inside it). Drawings, charts and near-duplicates of the same folders are left out.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "page": ("skimage", "data/page.png"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
# Strips across the longer side, as shares of it: interleaved, so that both splits see most of the
# picture, and disjoint, so that no pixel is in both.
STRIPS = {"train": ((0.0, 0.35), (0.52, 0.83)), "val": ((0.35, 0.52), (0.83, 1.0))}
SHORTER_SIDE = 400  # photographs are brought to this size, in pixels, before cropping
CROP_SIDE = (40, 110)  # of a crop in the photograph, in pixels
SIZE = 120  # of a crop as it is stored, in pixels
FLATTEST = 0.03  # crops with a smaller deviation (0..1 units) show nothing and are drawn again
RECORD = "demo.json"

Box = tuple[float, float, float, float]


def photograph(package: str, name: str) -> Image.Image:
    """One RGB photograph from an installed package, its shorter side SHORTER_SIDE pixels."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ToolError(f"package {package} is not installed; the demo crops its photographs")
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise ToolError(f"{path}: this version of {package} does not ship the photograph")
    image = Image.open(path).convert("RGB")
    scale = SHORTER_SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def draw_box(size: tuple[int, int], split: str, draw: np.random.Generator) -> Box:
    """A square (left, top, right, bottom) in pixels inside one strip of `split`."""
    along = max(size)
    strips = [(int(np.ceil(a * along)), int(b * along)) for a, b in STRIPS[split]]
    low, high = strips[draw.integers(len(strips))]
    side = int(draw.integers(CROP_SIDE[0], min(CROP_SIDE[1], high - low, min(size)) + 1))
    first = int(draw.integers(low, high - side + 1))
    second = int(draw.integers(0, min(size) - side + 1))
    left, top = (first, second) if size[0] >= size[1] else (second, first)
    return left, top, left + side, top + side


def recolour(pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Give a crop (float [H, W, 3], 0..1) a mean colour and contrast that know no class."""
    centred = pixels - pixels.mean((0, 1))
    contrast = draw.uniform(0.12, 0.2) / max(float(centred.std()), FLATTEST)
    mean = draw.uniform(0.4, 0.6) + draw.uniform(-0.08, 0.08, size=3)
    moved = centred * contrast + mean
    for _ in range(4):  # clipping moves the mean: move it back
        moved = np.clip(moved, 0, 1)
        moved += mean - moved.mean((0, 1))
    return np.clip(moved, 0, 1)


def crop(image: Image.Image, split: str, size: int, draw: np.random.Generator) -> Image.Image:
    """One crop of `size` x `size` pixels, mirrored half of the time and recoloured."""
    for _ in range(50):
        box = draw_box(image.size, split, draw)
        piece = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(piece, np.float32) / 255
        if pixels.std() >= FLATTEST:
            break
    if draw.random() < 0.5:
        pixels = pixels[:, ::-1]
    return Image.fromarray((recolour(pixels, draw) * 255 + 0.5).astype(np.uint8))


@dataclass(frozen=True)
class _Job:
    """One crop to write: of photograph `number`, the `index`-th of its split."""

    image: Image.Image
    target: Path
    number: int
    split: str
    index: int

    def write(self, size: int, seed: int) -> None:
        # One stream per crop: a crop does not depend on how many others there are.
        draw = np.random.default_rng([seed, self.number, self.split == "val", self.index])
        crop(self.image, self.split, size, draw).save(self.target, quality=95)


def _jobs(dest: Path, train: int, val: int) -> Iterator[_Job]:
    """Every crop of a tree, whose folders are made."""
    for number, (name, source) in enumerate(PHOTOGRAPHS.items()):
        image = photograph(*source)
        for split, count in (("train", train), ("val", val)):
            folder = dest / split / name
            folder.mkdir(parents=True)
            for index in range(number, count, len(PHOTOGRAPHS)):
                yield _Job(image, folder / f"{name}_{index:06d}.jpg", number, split, index)


def build(dest: Path, *, train: int, val: int, size: int, seed: int) -> None:
    """Write dest/train and dest/val, `train` and `val` crops spread evenly over the classes.

    Built in a temporary folder that is renamed at the end; a finished tree of the same options is
    left as it is, another demo tree is replaced, anything else is refused (ToolError).
    """
    options = {"train": train, "val": val, "size": size, "seed": seed}
    if (dest / RECORD).is_file() and json.loads((dest / RECORD).read_text()) == options:
        print(f"{dest}: already there, with the same options")
        return
    if dest.exists() and any(dest.iterdir()) and not (dest / RECORD).is_file():
        raise ToolError(f"{dest}: is not empty and not a demo tree; choose another folder")
    check_writable(dest, folder=True)
    dest = Path(os.path.realpath(dest))  # a name of its own, also of `.` and of a link
    partial = dest.with_name(f".{dest.name}.{os.getpid()}.tmp")
    pool = ThreadPoolExecutor(cores())  # Pillow works outside Python's lock
    try:
        jobs = list(_jobs(partial, train, val))
        with progress(len(jobs), "demo images") as bar:
            for _ in pool.map(lambda job: job.write(size, seed), jobs):
                bar.update()
        write_atomic(partial / RECORD, json.dumps(options).encode())
        if dest.exists():
            shutil.rmtree(dest)
        partial.rename(dest)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write an ImageFolder tree (train/, val/) of crops of real photographs.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to write")
    parser.add_argument("--train", type=int, default=4096, help="number of training crops")
    parser.add_argument("--val", type=int, default=1024, help="number of validation crops")
    parser.add_argument("--size", type=int, default=SIZE, help="side of a crop in pixels")
    parser.add_argument(
        "--seed", type=seed_number, metavar="N", default=0, help="seed of all random draws"
    )
    return run(_command, parse(parser, arguments))


def check_counts(train: int, val: int) -> None:
    """UserError for fewer crops than photographs, each of which is a class."""
    check_range("--train", train, at_least=len(PHOTOGRAPHS))
    check_range("--val", val, at_least=len(PHOTOGRAPHS))


def _command(options: argparse.Namespace) -> int:
    check_counts(options.train, options.val)
    check_range("--size", options.size, at_least=8, at_most=4096)
    with naming(options.dest, "cannot be written"):
        build(
            options.dest, train=options.train, val=options.val, size=options.size, seed=options.seed
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

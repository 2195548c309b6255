"""How far a crop moves if libjpeg's scaled inverse DCT makes a smaller picture first.

    python tests/bench/bench_scaled_idct.py [--images FOLDER]

The decoder always makes all pixels of a crop before it resizes them. A picture of half the size
costs less, but is not what an antialiased resize of all pixels gives: the table has the PSNR
between the two, by how much larger than the target the crop is. The last line is one JSON object:
{"1/2": {"2": median dB, ...}, "1/4": ..., "files": N}.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from bench_corpus import read_corpus
from peer_formats import files_of
from PIL import Image

RATIOS = (2, 3, 4, 6, 8, 16)  # side of the crop by side of the target
BLOCK = 16  # pixels: crops begin where pixels of both pictures do


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between two uint8 pictures; inf for equal ones."""
    error = np.mean((a.astype(float) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def decoded(data: bytes, factor: int) -> Image.Image:
    """The picture by 1 / factor: libjpeg's scaled inverse DCT."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (-(-image.width // factor), -(-image.height // factor)))
    return image.convert("RGB")


def difference(data: bytes, factor: int, ratio: int) -> float | None:
    """dB between the square crop made from all pixels and from the smaller picture. None: too
    small, or libjpeg has no such picture of it."""
    full, small = decoded(data, 1), decoded(data, factor)
    side = min(full.size) // BLOCK * BLOCK
    if side < 8 * ratio or small.width != -(-full.width // factor):
        return None
    left, top = ((length - side) // 2 // BLOCK * BLOCK for length in full.size)
    box = (left, top, left + side, top + side)
    made = []
    for image, by in ((full, 1), (small, factor)):
        part = tuple(edge / by for edge in box)
        target = (side // ratio, side // ratio)
        made.append(np.asarray(image.resize(target, Image.Resampling.BICUBIC, box=part)))
    return psnr(*made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="JPEGs (default: made ones)")
    parser.add_argument("--files", type=int, default=200)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {"1/2": {}, "1/4": {}}
    with tempfile.TemporaryDirectory() as folder:
        corpus = read_corpus(args.images, Path(folder), args.files)
        files = [Path(path).read_bytes() for path in files_of(corpus.folder)][: args.files]
        print(f"{corpus}\ncrop / target   scale   median dB   5 % below   share from 50 dB")
        for name, values in found.items():
            factor = int(name[2:])
            for ratio in (ratio for ratio in RATIOS if ratio >= factor):
                each = [difference(data, factor, ratio) for data in files]
                dbs = np.array([value for value in each if value is not None])
                low, middle = np.percentile(dbs, [5, 50])
                values[str(ratio)] = round(float(middle), 1)
                print(f"{ratio:13} {name:>7} {middle:11.1f} {low:11.1f} {np.mean(dbs >= 50):18.2f}")
    print(json.dumps({**found, "files": len(files)}))


if __name__ == "__main__":
    main()

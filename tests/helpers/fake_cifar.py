"""CIFAR-10's binary archive in small: coloured shapes on noise, a class per shape and colour."""

import io
import tarfile
from pathlib import Path

import numpy as np

CLASSES = ("disc", "square", "stripes", "cross")


def picture(label: int, draw: np.random.Generator) -> np.ndarray:
    """uint8 [32, 32, 3]: the shape of a class, in its colour, somewhere."""
    y, x = np.mgrid[:32, :32] - draw.integers(10, 22, 2)[:, None, None]
    shape = (x**2 + y**2 < 64, np.maximum(abs(x), abs(y)) < 7, (x + y) % 8 < 3,
             np.minimum(abs(x), abs(y)) < 3)[label]  # fmt: skip
    image = draw.normal(110, 25, (32, 32, 3))
    image[shape, label % 3] += 90
    return image.clip(0, 255).astype(np.uint8)


def write_archive(path: Path, train: int, test: int, batches: int = 2) -> Path:
    """cifar-10-binary.tar.gz with `train` images in so many batches and `test` others."""
    draw = np.random.default_rng(0)
    sizes = {f"data_batch_{n + 1}": train // batches for n in range(batches)}
    files = {"batches.meta.txt": "\n".join(CLASSES).encode()}
    for name, size in {**sizes, "test_batch": test}.items():
        rows = []
        for number in range(size):
            label = number % len(CLASSES)
            rows.append(bytes([label]) + picture(label, draw).transpose(2, 0, 1).tobytes())
        files[f"{name}.bin"] = b"".join(rows)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path

"""Facts about a set of images that are gathered while it is written: equal images, pixel values."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shard_tools.image_file import ImageFault, decode, read_header
from shard_tools.sharding.items import Item, Items, read_item
from shard_tools.sharding.sources import Source
from shard_tools.workers import map_in_workers, report, working_on

SAMPLED = 2048  # images whose pixels are measured, spread evenly over the shuffled order
NO_PIXELS = np.zeros(7)
_CHUNK = 1024  # items that a worker reads in one piece


def fingerprint(data: bytes) -> int:
    """64 bits from two checksums of the bytes, CRC-32 and the sum of the words: equal files have
    equal ones, and among n different ones about n² / 2^65 pairs do."""
    words = len(data) // 8
    total = int(np.frombuffer(data, "<u8", words).sum()) + int.from_bytes(data[8 * words :])
    return zlib.crc32(data, len(data) & 0xFFFFFFFF) << 32 | (total ^ total >> 32) & 0xFFFFFFFF


def is_sampled(index: int, images: int) -> bool:
    """True for the images of the shuffled order whose pixels are measured."""
    return index % max(1, -(-images // SAMPLED)) == 0


def pixel_sums(data: bytes) -> np.ndarray:
    """float64 [7] of one image: 1, the mean of R, G and B and of their squares, in 0 … 1; zeros for
    an image that cannot be decoded (`--check headers` keeps it)."""
    try:
        picture = decode(data, read_header(data)).convert("RGB")
    except ImageFault:
        return NO_PIXELS
    counts = np.reshape(picture.histogram(), (3, 256)) / (picture.width * picture.height)
    levels = np.arange(256) / 255
    return np.concatenate([[1.0], counts @ levels, counts @ levels**2])


def mean_and_std(sums: np.ndarray) -> dict[str, object]:
    """Mean and standard deviation of R, G and B in 0 … 1 over the summed images, which all count
    alike, as `data.mean` and `data.std` want them."""
    images, mean, square = sums[0], sums[1:4] / sums[0], sums[4:] / sums[0]
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return {
        "mean": [round(float(value), 4) for value in mean],
        "std": [round(float(value), 4) for value in std],
        "images": int(images),
    }


def duplicates(
    prints: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> list[tuple[int, str]]:
    """(row, reason) of each image whose bytes an earlier one has; prints: fingerprints."""
    _, first, inverse = np.unique(prints, return_index=True, return_inverse=True)
    original = first[inverse]
    found = []
    for row in np.flatnonzero(original != np.arange(len(prints))):
        reason = f"has the same bytes as {names[original[row]]}"
        if labels[original[row]] != labels[row]:
            reason += ", which has another label"
        found.append((int(row), reason))
    return found


def drop_duplicates(source: Source, workers: int) -> Source:
    """The source without the images whose bytes one earlier in name order has; they are listed in
    `Source.duplicates`. Only images of equal size are read."""
    items = source.items
    order = sorted(range(len(items)), key=items.names.__getitem__)
    sizes = np.array(items.images.sizes)[order]
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[inverse] > 1)
    prints = np.zeros(len(items), np.uint64)
    chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    jobs = [(n, source.root, [items[order[i]] for i in chunk]) for n, chunk in enumerate(chunks)]
    for number, found in map_in_workers(
        _fingerprints, jobs, workers=workers, description="equal images", total=len(rows)
    ):
        prints[chunks[number]] = found
    labels = np.array(items.labels)[order]
    names = [items.names[order[row]] for row in rows]
    among = duplicates(prints[rows], labels[rows], names)
    dropped = {order[rows[i]] for i, _ in among}
    return replace(
        source,
        items=Items(item for row, item in enumerate(items) if row not in dropped),
        duplicates=[(names[i], reason) for i, reason in among],
    )


def _fingerprints(job: tuple[int, str, list[Item]]) -> tuple[int, np.ndarray]:
    number, root, items = job
    found = np.zeros(len(items), np.uint64)
    for i, item in enumerate(items):
        working_on(f"{root}/{item.name}")
        report(item.size)
        found[i] = fingerprint(read_item(root, item))
    return number, found

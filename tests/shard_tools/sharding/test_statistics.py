"""Equal images and pixel values, gathered while shards are written."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_samples import encode, image_tree, images_of, jpeg, make, picture, report

from shard_tools.manifest import read_manifest
from shard_tools.sharding.statistics import SAMPLED, duplicates, fingerprint, is_sampled


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Five images, of which three are equal; one of these is in another class."""
    tree = image_tree(tmp_path / "tree", {"a": 2, "b": 1})
    data = (tree / "a" / "a_001.JPEG").read_bytes()
    (tree / "a" / "z.jpg").write_bytes(data)
    (tree / "b" / "again.jpg").write_bytes(data)
    # As long, but other bytes.
    other = bytearray(data)
    other[15] ^= 1  # the density in the JFIF header
    (tree / "b" / "same_length.jpg").write_bytes(bytes(other))
    return tree


SAID = {
    "a/z.jpg": "has the same bytes as a/a_001.JPEG",
    "b/again.jpg": "has the same bytes as a/a_001.JPEG, which has another label",
}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_equal_images_are_dropped_where_asked(tree: Path, tmp_path: Path, workers: str) -> None:
    dest = make(tree, tmp_path / "d", "--drop-duplicates", "--workers", workers)
    assert report(dest) == {name: ("dropped", reason) for name, reason in SAID.items()}
    assert set(images_of(dest)) == {"a_000.JPEG", "a_001.JPEG", "b_000.JPEG", "same_length.jpg"}
    assert read_manifest(dest).made["report"]["dropped"] == 2


def test_equal_images_are_counted_in_the_report(tree: Path, tmp_path: Path) -> None:
    dest = make(tree, tmp_path / "d", "--workers", "2", "--shard-size", "1KiB")
    manifest = read_manifest(dest)
    assert len(manifest.shards) > 1
    assert manifest.samples == 6
    assert manifest.made["report"]["duplicate"] == 2
    group = {"a/a_001.JPEG", "a/z.jpg", "b/again.jpg"}
    assert report(dest).keys() < group
    for name, (what, reason) in report(dest).items():
        original = reason.removeprefix("has the same bytes as ").split(",")[0]
        assert what == "duplicate"
        assert {name, original} < group
        assert ("another label" in reason) == (name[0] != original[0])


def test_fingerprints_differ_where_bytes_do() -> None:
    data = [jpeg(seed) for seed in range(20)] + [b"", b"\0", b"\0\0"]
    assert len({fingerprint(d) for d in data}) == len(data)
    assert duplicates(np.array([5, 7, 5], np.uint64), np.array([1, 1, 1]), ["x", "y", "z"]) == [
        (2, "has the same bytes as x")
    ]


def test_mean_and_std_of_the_pixels(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(6):
        (folder / f"{seed}.png").write_bytes(encode(picture(seed, (20 + seed, 16)), "PNG"))
    dest = make(folder, tmp_path / "d")
    pixels = [
        np.asarray(Image.open(io.BytesIO(data)), np.float64) / 255
        for data in images_of(dest).values()
    ]
    found = read_manifest(dest).made["pixels"]
    mean = np.mean([p.mean((0, 1)) for p in pixels], 0)
    std = np.sqrt(np.mean([(p**2).mean((0, 1)) for p in pixels], 0) - mean**2)
    assert found["images"] == 6
    np.testing.assert_allclose(found["mean"], mean, atol=6e-5)
    np.testing.assert_allclose(found["std"], std, atol=6e-5)


def test_a_sample_of_a_large_set_is_spread_over_it() -> None:
    for images in (1, SAMPLED, SAMPLED + 1, 100_000):
        chosen = [index for index in range(images) if is_sampled(index, images)]
        assert min(images, SAMPLED // 2) <= len(chosen) <= SAMPLED
        assert chosen[0] == 0
        assert images - chosen[-1] <= images / len(chosen) + SAMPLED

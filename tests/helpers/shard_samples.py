"""Small image trees for the tests of the shard tools."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest

SMALL = ["--shard-size", "60KiB", "--workers", "1"]


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


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence with which make_shards refuses its arguments."""
    capsys.readouterr()
    assert main([*map(str, arguments), *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def flipped(data: bytes, bit: int) -> bytes:
    """`data` with one bit turned."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def tars_of(folder: Path) -> dict[str, bytes]:
    """Name → bytes of every file in a shard folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def read_samples(folder: Path) -> list[dict]:
    """All samples through webdataset's own reader, in order."""
    manifest = read_manifest(folder)
    urls = [manifest.path(number) for number in range(len(manifest.shards))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def make(source: Path, dest: Path, *options: str) -> Path:
    assert main([str(source), str(dest), *SMALL, *options]) == 0
    return dest


def report(folder: Path) -> dict[str, tuple[str, str]]:
    lines = map(json.loads, (folder / "report.jsonl").read_text().splitlines())
    return {line["name"]: (line["what"], line["reason"]) for line in lines}


def psnr(a: Image.Image, b: Image.Image) -> float:
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-12))


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def images_of(folder: Path) -> dict[str, bytes]:
    """Original file name → image bytes, as stored."""
    samples = read_samples(folder)
    return {os.path.basename(json.loads(s["json"])["name"]): s["jpg"] for s in samples}


def labels_of(folder: Path) -> dict[str, str]:
    """Original file name → class name, by cls and the manifest."""
    manifest = read_manifest(folder)
    return {
        os.path.basename(json.loads(s["json"])["name"]): manifest.classes[int(s["cls"])]
        for s in read_samples(folder)
    }

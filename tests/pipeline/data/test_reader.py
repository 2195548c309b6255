"""Many samples in one call are what each of them is alone."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from loader_helpers import jpeg, write_shards
from shard_samples import encode, picture

from pipeline.data.crops import CentreCrop, Crop
from pipeline.data.jpeg import CAN_READ_MANY
from pipeline.data.reader import Reader
from shard_tools.manifest import read_manifest

pytestmark = pytest.mark.skipif(not CAN_READ_MANY, reason="the extension is not built")
ODD = {
    "progressive": encode(picture(3, (48, 40)), progressive=True),
    "cmyk": encode(picture(4, (48, 40)).convert("CMYK")),
    "png": encode(picture(5, (48, 40)), "PNG"),
    "cut": jpeg(6)[:-9],
    "end marker missing": jpeg(7)[:-2] + b"\xff\xd0",
    "not 8 bits": jpeg(8).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "no height": jpeg(9).replace(b"\x08\0\x28\0\x30", b"\x08\0\0\0\x30"),
}


def test_batches_are_what_each_sample_gives(tmp_path: Path) -> None:
    images = [jpeg(n, (48 + n, 40)) for n in range(20)]
    folder = write_shards(tmp_path, [images[:7], images[7:], list(ODD.values())])
    reader = Reader(read_manifest(folder), 32, "bicubic", "jpegcrop", None)
    samples = np.random.default_rng(0).permutation(len(images) + len(ODD))
    rng = np.random.default_rng(1)
    chosen = [[Crop(32).choose(rng.random(23).tolist()), CentreCrop(32, 40)] for _ in samples]
    outs = [np.zeros((len(samples), 32, 32, 3), np.uint8) for _ in range(2)]
    done = reader.decode_all(samples, chosen, outs)
    assert sorted(samples[~done]) == list(range(len(images), len(samples)))
    for place in np.flatnonzero(done):
        for view, out in enumerate(outs):
            alone = np.zeros((32, 32, 3), np.uint8)
            reader.decode(int(samples[place]), chosen[place][view], alone)
            assert np.array_equal(out[place], alone)


def test_shards_beyond_the_limit_of_open_files(tmp_path: Path) -> None:
    manifest = read_manifest(write_shards(tmp_path, [[jpeg(n)] for n in range(60)]))
    manifest.lazy_index.open()  # which stays open
    samples, out = np.arange(60), np.zeros((2, 60, 32, 32, 3), np.uint8)
    limits, before = resource.getrlimit(resource.RLIMIT_NOFILE), os.listdir("/proc/self/fd")
    for number, files in enumerate((limits[0], max(map(int, before)) + 20)):
        reader = Reader(manifest, 32, "bicubic", "jpegcrop", None)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, limits[1]))
        try:
            assert reader.decode_all(samples, [[CentreCrop(32, 40)]] * 60, [out[number]]).all()
            reader.close()
            assert os.listdir("/proc/self/fd") == before
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.array_equal(out[0], out[1])

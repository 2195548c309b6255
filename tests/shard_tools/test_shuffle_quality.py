"""The measure of the shuffle against the loader's own batches, and what a run says of it."""

import logging

import numpy as np
import pytest

from pipeline.data.batch import LoaderConfig
from pipeline.data.crops import Crop
from pipeline.data.loader import train_loader
from pipeline.data.order import Order
from shard_tools import shuffle_quality
from shard_tools.manifest import SAMPLE, Shard, read_manifest, write_manifest

CLASSES, SHARDS, EACH = 64, 256, 50


def folder_of(path, labels):
    """SHARDS empty shards of EACH samples with these labels."""
    path.mkdir()
    index = np.zeros(SHARDS * EACH, SAMPLE)
    index["label"] = labels
    shards = [Shard(f"{n}.tar", EACH, 0, f"{n:064x}") for n in range(SHARDS)]
    for shard in shards:
        (path / shard.name).touch()
    write_manifest(path, shards=shards, index=index, classes=[str(c) for c in range(CLASSES)])
    return path


@pytest.fixture
def sorted_folder(tmp_path):
    return folder_of(tmp_path / "sorted", np.arange(SHARDS * EACH) * CLASSES // (SHARDS * EACH))


@pytest.fixture
def mixed_folder(tmp_path):
    labels = np.random.default_rng(0).integers(0, CLASSES, SHARDS * EACH)
    return folder_of(tmp_path / "mixed", labels)


def served(manifest, batch, partitions, window):
    """Equal labels in the loader's batches over those of any two samples."""
    order = Order(manifest.table.samples, 0, batch, partitions, window)
    labels, equal, pairs = manifest.index["label"], 0, 0
    for epoch in range(6):
        for step in range(order.steps):
            counts = np.bincount(labels[order.samples(epoch, step, 0, batch)[0]])
            equal += (counts * (counts - 1)).sum()
            pairs += batch * (batch - 1)
    counts = np.bincount(labels).astype(float)
    return equal / pairs / ((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


@pytest.mark.parametrize(
    ("partitions", "window"), [(8, 1), (8, 4), (8, 8), (8, 32), (32, 2), (32, 8), (1, 2)]
)
def test_the_ratio_is_that_of_the_batches(sorted_folder, mixed_folder, partitions, window):
    for folder in (sorted_folder, mixed_folder):
        manifest = read_manifest(folder)
        mixture = shuffle_quality.measure(manifest)
        expected = served(manifest, 128, partitions, window)
        assert mixture.ratio(128, partitions, window) == pytest.approx(expected, rel=0.12)
    assert mixture.ratio(128, partitions, window) == pytest.approx(1, abs=0.08)


def test_a_run_warns_and_names_the_window_that_cures_it(sorted_folder, mixed_folder, caplog):
    def said(folder, **change):
        caplog.clear()
        numbers = {"batch_size": 128, "partitions": 8, "window": 2} | change
        config = LoaderConfig(folder, micro_batch=16, crop=Crop(16), **numbers)
        with caplog.at_level(logging.WARNING):
            for rank in range(2):
                train_loader(config, rank, 2, range(1))
        return [record.getMessage() for record in caplog.records]

    (text,) = said(sorted_folder)
    cure = shuffle_quality.measure(read_manifest(sorted_folder)).cure(128, 8)
    assert f"data.window: {cure} cures it" in text
    assert str(sorted_folder) in text
    assert said(sorted_folder, window=cure) == []
    assert len(said(sorted_folder, window=cure // 2)) == 1
    assert said(sorted_folder, samples_per_epoch=1280) == []  # drawn from all samples
    assert said(mixed_folder) == []
    assert said(mixed_folder, window=1, partitions=2, batch_size=32) == []


def test_without_labels_or_with_few_samples_nothing_is_said(tmp_path, sorted_folder):
    unlabelled = folder_of(tmp_path / "none", -1)
    assert shuffle_quality.warning(read_manifest(unlabelled), 128, 8, 1) == ""
    assert shuffle_quality.main([str(unlabelled)]) == 2
    one = tmp_path / "one"
    one.mkdir()
    (one / "a.tar").touch()
    write_manifest(one, shards=[Shard("a.tar", 1, 0, "0")], index=np.zeros(1, SAMPLE), classes="a")
    assert shuffle_quality.warning(read_manifest(one), 1, 1, 1) == ""


def test_the_command(sorted_folder, capsys):
    assert shuffle_quality.main([str(sorted_folder), "--batch-size", "128", "--window", "3"]) == 0
    out = capsys.readouterr().out
    ratios = [float(line.split()[2]) for line in out.splitlines() if line.startswith("window")]
    assert ratios == sorted(ratios, reverse=True)
    assert len(ratios) == 8
    for wrong in (["--window", "0"], ["--batch-size", "100"], ["--batch-size", "64000"]):
        assert shuffle_quality.main([str(sorted_folder), *wrong]) == 2
    assert "has 12800 images, less than one batch" in capsys.readouterr().err

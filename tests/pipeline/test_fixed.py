"""The images of pictures and probes, also where some will not decode."""

import shutil

import pytest
from tiny import tiny_overrides

from pipeline import pretrain
from pipeline.data.fixed import fixed_images
from pipeline.data.reader import SampleError
from pipeline.runtime.probes import share_of
from shard_tools.manifest import read_manifest


def spoiled(folder, copy, numbers):
    """A copy of shards in which these samples will not decode."""
    shutil.copytree(folder, copy)
    manifest = read_manifest(copy)
    for number in numbers:
        shard, row = manifest.locate(number)
        with open(manifest.path(int(shard)), "r+b") as file:
            file.seek(int(row["offset"]))
            file.write(bytes(int(row["length"])))
    return copy


def test_a_bad_sample_is_replaced_by_the_next_that_is_not_wanted(shards, tmp_path):
    bad = spoiled(shards / "train", tmp_path / "bad", [0, 3, 8, 95])
    good = fixed_images(shards / "train", range(96), 16)
    found = fixed_images(bad, range(8), 16, "skip")
    assert found.sample.tolist() == [9, 1, 2, 10, 4, 5, 6, 7]  # 8 is bad too
    assert (found.image == good.image[found.sample]).all()
    assert (found.label == good.label[found.sample]).all()
    assert fixed_images(bad, [95], 16, "skip").sample.tolist() == [1]  # counted round
    with pytest.raises(SampleError, match=r"sample 0 of .* will not decode"):
        fixed_images(bad, range(8), 16)
    assert share_of(bad, 96, 16, 0, 2, "skip").sample.tolist()[:5] == [48, 1, 2, 49, 4]


def test_too_many_bad_samples_in_a_row_end_it(shards, tmp_path):
    bad = spoiled(shards / "train", tmp_path / "bad", range(17))
    with pytest.raises(SampleError, match=r"sample 0 of .*, nor will the samples after it"):
        fixed_images(bad, [0], 16, "skip")
    assert fixed_images(bad, [1], 16, "skip").sample.tolist() == [17]


def test_a_run_starts_and_probes_with_bad_samples_under_skip(shards, tmp_path, capsys):
    train = spoiled(shards / "train", tmp_path / "train", [0, 5, 95])
    val = spoiled(shards / "val", tmp_path / "val", [0, 47])
    words = ["--recipe", "mae", "--data", str(train), "--output", str(tmp_path / "run")]
    words += ["--ds_config", "zero0", "--max-steps", "2"]
    probes = ("monitor.knn_steps=2", "monitor.images=8", f"monitor.held_out={val}")
    for override in (*tiny_overrides("mae"), "monitor.picture_steps=1", *probes):
        words += ["--set", override]
    assert pretrain.main(words) == 2
    assert "will not decode" in capsys.readouterr().err
    assert pretrain.main([*words, "--set", "data.on_error=skip"]) == 0
    assert (tmp_path / "run/pictures/step-00000002.png").exists()
    assert "probe/knn_top1" in capsys.readouterr().out

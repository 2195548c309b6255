"""The images of pictures and probes, also where some will not decode."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_overrides

from pipeline import pretrain
from pipeline.data.fixed import fixed_images
from pipeline.data.reader import SampleError
from pipeline.runtime.probes import share_of
from pipeline.runtime.train_state import TrainState
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
    good = fixed_images(read_manifest(shards / "train"), range(96), 16)
    manifest = read_manifest(bad)
    found = fixed_images(manifest, range(8), 16, "skip")
    assert found.sample.tolist() == [9, 1, 2, 10, 4, 5, 6, 7]  # 8 is bad too
    assert (found.image == good.image[found.sample]).all()
    assert (found.label == good.label[found.sample]).all()
    assert fixed_images(manifest, [95], 16, "skip").sample.tolist() == [1]  # counted round
    with pytest.raises(SampleError, match=r"sample 0 of .* will not decode"):
        fixed_images(manifest, range(8), 16)
    assert share_of(bad, 96, 16, 0, 2, "skip").sample.tolist()[:5] == [48, 1, 2, 49, 4]


def test_too_many_bad_samples_in_a_row_end_it(shards, tmp_path):
    bad = spoiled(shards / "train", tmp_path / "bad", range(17))
    manifest = read_manifest(bad)
    with pytest.raises(SampleError, match=r"sample 0 of .*, nor will the samples after it"):
        fixed_images(manifest, [0], 16, "skip")
    assert fixed_images(manifest, [1], 16, "skip").sample.tolist() == [17]


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


def test_what_a_run_left_out_is_counted_over_ranks_and_starts(shards, tmp_path):
    train = spoiled(shards / "train", tmp_path / "train", range(0, 96, 2))
    words = ["--recipe", "mae", "--data", str(train), "--output", str(tmp_path / "run")]
    more = ("data.on_error=skip", "monitor.log_steps=1", "optimizer.warmup_epochs=0")
    # After the first step no weight is finite.
    more += ("optimizer.base_lr=1e15", "optimizer.weight_decay.value=1e25")
    for override in (*tiny_overrides("mae"), *more):
        words += ["--set", override]
    for last in ("2", "4"):
        assert pretrain.main([*words, "--ds_config", "zero0", "--max-steps", last]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 2, 3]
    bad = [row["bad_samples"] for row in rows]
    assert 0 < bad[0] < bad[1] < bad[2] < bad[3]
    two = SimpleNamespace(sum=lambda mine: mine + 4)  # the other's
    run: Any = SimpleNamespace(ranks=two, loader=SimpleNamespace(bad_samples=3))
    assert TrainState.bad_samples(run) == 7

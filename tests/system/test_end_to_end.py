"""The main job through the real launcher: two ranks, one rank, another number of workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_overrides

from pipeline.distributed import free_port
from pipeline.export import main as export
from pipeline.weights.run import read_encoder

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def launch(shards, output, *words, ranks=2, name="rmae", config="zero2"):
    """`deepspeed pipeline/pretrain.py` as a user runs it; returns its output."""
    command = [
        BIN / "deepspeed", "-q", "--num_accelerators", str(ranks),
        "--master_port", str(free_port()),
        "pipeline/pretrain.py", "--ds_config", f"ds_configs/{config}.json",
        "--recipe", f"pipeline/recipes/{name}.yaml",
        "--data", shards / "train", "--output", output,
    ]  # fmt: skip
    for override in (
        *tiny_overrides(name), "optimizer.epochs=1", "optimizer.warmup_epochs=0.5",
        "optimizer.base_lr=0.01", "monitor.log_steps=1", "data.sizes=[[0.5, 8], [1, 16]]",
    ):  # fmt: skip
        command += ["--set", override]
    return subprocess.run(
        [*map(str, command), *words], capture_output=True, text=True, timeout=200, cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},  # as launch.sh sets it where no GPU is
    )  # fmt: skip


def losses(output):
    rows = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """An undisturbed run of one epoch, 12 steps, on two ranks; half of it on smaller images."""
    output = tmp_path_factory.mktemp("runs") / "reference"
    done = launch(shards, output)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def test_the_folder_of_a_run(reference):
    output, done = reference
    assert f"done: step 12; encoder in {output}" in done.stdout
    for name in (
        "recipe.yaml", "ds_config.json", "versions.json", "log.txt", "metrics.jsonl",
        "model.safetensors", "encoder/encoder.json", "encoder/encoder.safetensors",
        "pictures/step-00000012.png", "checkpoints/latest", "checkpoints/step-00000012/state.json",
    ):  # fmt: skip
        assert (output / name).is_file(), name
    assert len(losses(output)) == 12
    rows = [json.loads(r) for r in (output / "metrics.jsonl").read_text().splitlines()]
    for key in ("lr", "grad_norm", "images_per_second", "data_wait", "memory_gb",
                "similarity", "constraint"):  # fmt: skip
        assert all(key in row for row in rows), key
    vit, info = read_encoder(output)
    assert info["recipe"] == "rmae"
    assert vit.num_classes == 0


def test_little_noise(reference):
    """What a log shows beside our own lines: nothing of the libraries."""
    _, done = reference
    foreign = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("[20")]
    assert not foreign, foreign
    assert "Warning" not in done.stdout + done.stderr


def test_one_rank_and_other_workers_follow_the_same_curve(reference, shards, tmp_path):
    """The same global batches, masks and crops: only the order of sums may differ."""
    output, _ = reference
    done = launch(shards, tmp_path / "one", "--set", "data.workers=2", ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "one") == pytest.approx(losses(output), rel=1e-4)


def test_zero_3_goes_on_alone_under_zero_1(reference, shards, tmp_path):
    """Two ranks under stage 3, then one rank under stage 1: the undisturbed run's curve."""
    output, _ = reference
    for last, config, ranks in (("6", "zero3", 2), ("12", "zero1", 1)):
        done = launch(shards, tmp_path / "three", "--max-steps", last, config=config, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "at step 6 of 12 (saved by 2 ranks under ZeRO stage 3)" in done.stdout
    for step in ("06", "12"):  # consolidated in one command, whatever the stage
        place = tmp_path / f"three/checkpoints/step-000000{step}"
        assert export([str(place), "--format", "timm", str(tmp_path / f"{step}.safetensors")]) == 0
    whole = load_file(tmp_path / "three/encoder/encoder.safetensors")
    last, first = (load_file(tmp_path / f"{step}.safetensors") for step in ("12", "06"))
    assert all(torch.equal(whole[name], last[name]) for name in whole)
    assert not torch.equal(whole["cls_token"], first["cls_token"])
    assert losses(tmp_path / "three") == pytest.approx(losses(output), rel=1e-4)


def test_bad_input_ends_the_launcher_with_one_line(shards, tmp_path):
    done = launch(shards, tmp_path / "bad", "--set", "optimiser.epochs=3")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "optimiser" in errors[0]

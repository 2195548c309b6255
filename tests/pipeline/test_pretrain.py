"""The command line: help, defaults, and bad input refused with exit code 2."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from signals import interruptible
from tiny import tiny_overrides

from pipeline import kernels, pretrain
from pipeline.config.recipe import RECIPES
from pipeline.distributed import cannot_build
from pipeline.kernels import backend


def arguments(shards, tmp_path, name="mae", *overrides):
    words = ["--recipe", str(RECIPES / f"{name}.yaml"), "--data", str(shards / "train")]
    words += ["--output", str(tmp_path / "run"), "--ds_config", "ds_configs/zero0.json"]
    for override in (*tiny_overrides(name), *overrides):
        words += ["--set", override]
    return words


def losses(folder):
    """The logged losses of a run."""
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(pretrain.ROOT)


def refused(capsys, *words):
    """Run main; the one line that it prints on stderr."""
    assert pretrain.main(list(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("--ds_config", "default: zero2", "--recipe", "default: rmae", "--set", "--data",
                 "data/shards/train", "--output", "runs/<recipe>-<date>", "--resume", "auto",
                 "--max-steps", "--resume-changed", "--no-lock"):  # fmt: skip
        assert word in text, word


def test_unknown_recipe_key(shards, tmp_path, capsys):
    line = refused(capsys, *arguments(shards, tmp_path, "mae", "optimizer.learning_rate=1"))
    assert "optimizer.learning_rate" in line
    assert "base_lr" in line


def test_config_with_a_key_of_the_recipe(shards, tmp_path, capsys):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"gradient_clipping": 1.0}))
    words = arguments(shards, tmp_path)
    words[words.index("ds_configs/zero0.json")] = str(config)
    assert "optimizer.gradient_clipping" in refused(capsys, *words)


def test_config_that_deepspeed_refuses_as_it_starts(shards, tmp_path, capsys):
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 1, "allgather_bucket_size": 1}}')
    words = arguments(shards, tmp_path)
    words[words.index("ds_configs/zero0.json")] = str(config)
    line = refused(capsys, *words)
    assert "DeepSpeed refuses the ds_config: allgather_bucket_size must be a multiple" in line


def test_data_folder_without_a_manifest(shards, tmp_path, capsys):
    words = arguments(shards, tmp_path)
    words[words.index(str(shards / "train"))] = str(tmp_path)
    assert "manifest" in refused(capsys, *words)


def test_a_missing_shard(shards, tmp_path, capsys):
    broken = tmp_path / "shards"
    broken.mkdir()
    for path in (shards / "train").iterdir():
        if not path.name.endswith("000000.tar"):
            (broken / path.name).write_bytes(path.read_bytes())
    words = arguments(shards, tmp_path)
    words[words.index(str(shards / "train"))] = str(broken)
    assert "000000.tar" in refused(capsys, *words)


def test_image_size_that_the_patch_does_not_divide(shards, tmp_path, capsys):
    line = refused(capsys, *arguments(shards, tmp_path, "mae", "encoder.image_size=18"))
    assert "18 is not divisible by the patch size 4" in line


def test_more_images_in_a_batch_than_there_are(shards, tmp_path, capsys):
    line = refused(capsys, *arguments(shards, tmp_path, "mae", "batch_size=4096"))
    assert "4096" in line


def test_run_resume_and_refusals(shards, tmp_path, capsys):
    """A run in two parts equals a run in one; another recipe, other data and a second run are
    refused."""
    words = arguments(
        shards,
        tmp_path,
        "cmae",
        "monitor.log_steps=1",
        "optimizer.epochs=1",
        "optimizer.warmup_epochs=0",
    )
    assert pretrain.main([*words, "--max-steps", "2"]) == 0
    assert pretrain.main([*words, "--max-steps", "4"]) == 0
    assert "resumes from " in capsys.readouterr().out
    other = [tmp_path / "other" if w == str(tmp_path / "run") else w for w in words]
    assert pretrain.main([*map(str, other), "--max-steps", "4"]) == 0
    capsys.readouterr()

    assert pretrain.main([*words, "--max-steps", "3"]) == 0
    assert "done: step 4; encoder in" in capsys.readouterr().out

    assert losses(tmp_path / "run") == losses(tmp_path / "other")
    assert len(losses(tmp_path / "run")) == 4
    for name in ("encoder/encoder.safetensors", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()

    began = [tmp_path / "began" if w == str(tmp_path / "run") else w for w in words]
    began = [*map(str, began), "--resume", str(tmp_path / "run")]
    for steps in ("5", "6"):  # the same command, as after a preemption
        assert pretrain.main([*began, "--max-steps", steps]) == 0
    said = capsys.readouterr().out
    assert f"resumes from {tmp_path}/run/checkpoints/step-00000004, at step 4" in said
    assert f"resumes from {tmp_path}/began/checkpoints/step-00000005, at step 5" in said

    assert "another recipe (optimizer.base_lr" in refused(
        capsys, *words, "--set", "optimizer.base_lr=1"
    )
    assert "already holds a run" in refused(capsys, *words, "--resume", "none")
    elsewhere = [str(tmp_path / "third") if w == str(tmp_path / "run") else w for w in words]
    assert "no valid checkpoint" in refused(capsys, *elsewhere, "--resume", str(tmp_path / "none"))
    words[words.index(str(shards / "train"))] = str(shards / "val")
    assert "other data (96 images, now 48)" in refused(capsys, *words)
    assert pretrain.main([*words, "--max-steps", "4", "--resume-changed"]) == 0
    printed = capsys.readouterr().out
    assert "step 4 was epoch 0.33 at lr" in printed
    assert "now epoch 0.67 at lr" in printed
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["latest", "step-00000002", "step-00000004"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000004\n"


FEW_IMAGES = [
    "data.samples_per_epoch=32", "data.randaugment=rand-m9-mstd0.5-inc1", "views.cutmix=0.5",
    "views.jitter.where=whole", "views.jitter.grayscale=0.2",
]  # fmt: skip
PROBES = ["monitor.occlusion_steps=2", "monitor.knn_steps=2", "monitor.images=8"]
HEADS = "measure.heads={hidden: 24, out: 12, batch_norm: true, projector_layers: 3}"


@pytest.mark.parametrize(
    ("name", "overrides"), [("mocov3", [HEADS]), ("mae", FEW_IMAGES), ("rmae_ddagger", PROBES)]
)
def test_other_methods_and_switches_from_end_to_end(name, overrides, shards, tmp_path, capsys):
    overrides = [*overrides, f"monitor.held_out={shards / 'val'}", "monitor.log_steps=1"]
    words = arguments(shards, tmp_path, name, *overrides)
    assert pretrain.main([*words, "--max-steps", "2"]) == 0
    values = losses(tmp_path / "run")
    assert len(values) == 2
    assert all(0 < value < 100 for value in values)
    encoder = load_file(tmp_path / "run/encoder/encoder.safetensors")
    assert all(weight.isfinite().all() for weight in encoder.values())
    printed = capsys.readouterr().out
    assert ("occlusion/cka_0.75" in printed) == ("probe/knn_top1" in printed) == (name[0] == "r")


def test_a_crafted_checkpoint_runs_no_code(shards, tmp_path, capsys):
    words = arguments(shards, tmp_path, "mae", "optimizer.epochs=1", "optimizer.warmup_epochs=0")
    assert pretrain.main([*words, "--max-steps", "1"]) == 0
    place = tmp_path / "run/checkpoints/step-00000001"
    proof = tmp_path / "proof"

    class Crafted:
        def __reduce__(self):
            return (open, (str(proof), "w"))

    state = place / "model.safetensors"
    torch.save({"module": Crafted()}, state)
    from shard_tools.atomic import FILES, file_sha256

    files = json.loads((place / FILES).read_text())
    files[state.name] = [state.stat().st_size, file_sha256(state)]
    (place / FILES).write_text(json.dumps(files))
    capsys.readouterr()
    line = refused(capsys, *words, "--max-steps", "2")
    assert state.name in line
    assert not proof.exists()


@pytest.mark.skipif(
    cannot_build() != "", reason="needs a C++ compiler and Python.h, to compare with"
)
def test_without_a_compiler_torchs_fused_adamw_trains_the_same(
    shards, tmp_path, capsys, monkeypatch
):
    words = arguments(shards, tmp_path, "mae", "optimizer.epochs=1", "optimizer.warmup_epochs=0")
    words += ["--set", "optimizer.base_lr=0.02", "--set", "monitor.log_steps=1", "--max-steps", "4"]
    other = [str(tmp_path / "torch") if w == str(tmp_path / "run") else w for w in words]
    assert pretrain.main(words) == 0
    assert "optimizer: DeepSpeed's fused AdamW" in capsys.readouterr().out
    monkeypatch.setenv("CXX", "/no/compiler")
    assert pretrain.main(other) == 0
    assert "optimizer: torch's fused AdamW" in capsys.readouterr().out

    assert losses(tmp_path / "torch") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


@pytest.mark.parametrize("name", ["rmae", "cmae"])
@pytest.mark.parametrize(
    ("config", "section", "way"),
    [("zero2-bf16", "bf16", "bf16"), ("zero2", "torch_autocast", "autocast")],
)
def test_bf16_follows_fp32(name, config, section, way, shards, tmp_path, capsys):
    """bf16 asked for, native or emulated; the teacher and the losses stay fp32."""
    words = arguments(shards, tmp_path, name, "optimizer.epochs=1", "optimizer.warmup_epochs=0")
    words += ["--set", "optimizer.base_lr=0.01", "--set", "monitor.log_steps=1", "--max-steps", "3"]
    words[words.index("ds_configs/zero0.json")] = config
    assert pretrain.main(words) == 0
    assert "precision: fp32 (auto" in capsys.readouterr().out
    values = json.loads((pretrain.ROOT / f"ds_configs/{config}.json").read_text())
    values[section] = {"enabled": True}
    (tmp_path / "bf16.json").write_text(json.dumps(values))
    other = [str(tmp_path / "bf16") if w == str(tmp_path / "run") else w for w in words]
    other[other.index(config)] = str(tmp_path / "bf16.json")
    assert pretrain.main(other) == 0
    assert f"precision: {way}" in capsys.readouterr().out
    for folder, precision in (("run", "fp32"), ("bf16", way)):
        assert (
            json.loads((tmp_path / folder / "versions.json").read_text())["precision"] == precision
        )

    assert losses(tmp_path / "bf16") != losses(tmp_path / "run")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "run"), rel=0.02)
    weights = load_file(tmp_path / "bf16/encoder/encoder.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    other[other.index(str(tmp_path / "bf16.json"))] = config
    assert f"written with precision {way}, this run has fp32" in refused(capsys, *other)


def alone():
    """This process's environment without its rank."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in ranks}


def test_a_checkpoint_within_a_log_interval_loses_no_step_of_the_means(shards, tmp_path):
    words = arguments(shards, tmp_path, "mae", "optimizer.epochs=1", "optimizer.warmup_epochs=0")
    words += ["--set", "monitor.log_to=[]", "--set"]
    single = [*words, "monitor.log_steps=1", "--output", str(tmp_path / "single")]
    assert pretrain.main([*single, "--max-steps", "9"]) == 0
    words += ["monitor.log_steps=5", "--set", "monitor.save_steps=3"]
    assert pretrain.main([*words, "--max-steps", "8"]) == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")  # as a kill before it
    assert pretrain.main([*words, "--max-steps", "9"]) == 0
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [0, *(json.loads(row)["step"] for row in rows)]
    sums = [
        (b - a) * loss
        for (a, b), loss in zip(pairwise(steps), losses(tmp_path / "run"), strict=True)
    ]
    assert steps == [0, 1, 3, 5, 6, 7, 9]
    assert sum(sums) == pytest.approx(sum(losses(tmp_path / "single")), rel=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_85(number, shards, tmp_path):
    command = [sys.executable, "pipeline/pretrain.py", *arguments(shards, tmp_path, "mae")]
    command += ["--set", "monitor.log_steps=1"]
    with open(tmp_path / "out", "w") as out:
        with interruptible():
            run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=alone())
        try:
            wait_for(lambda: "step 2/" in (tmp_path / "out").read_text(), run)
            run.send_signal(number)
            assert run.wait(timeout=240) == pretrain.PREEMPTED
        finally:
            run.kill()
            run.wait()
    text = (tmp_path / "out").read_text()
    assert f"stopped by {number.name}: saved at step" in text
    latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    assert (tmp_path / "run/checkpoints" / latest / "state.json").is_file()
    assert "Traceback" not in text


def test_a_terminal_that_goes_away_saves_the_run(shards, tmp_path):
    command = [sys.executable, "pipeline/pretrain.py", *arguments(shards, tmp_path, "mae")]
    here, terminal = os.openpty()
    with interruptible():
        run = subprocess.Popen(
            command, env=alone(), stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
    os.close(terminal)
    try:
        shown = b""
        while b"step 2/" not in shown:
            shown += os.read(here, 4096)
        os.close(here)
        assert run.wait(timeout=240) == pretrain.PREEMPTED
    finally:
        run.kill()
        run.wait()
    assert "stopped by SIGHUP: saved at step" in (tmp_path / "run/log.txt").read_text()
    assert not (tmp_path / "run/failure.txt").exists()


def two_hosts(words, *second):
    """The trainer on two hosts of one rank each, started; the second has further words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        env |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "pipeline/pretrain.py", *words, *(second if rank else ())]
        runs.append(
            subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
    return runs


def test_a_host_that_lacks_its_shards_says_so_itself(shards, tmp_path):
    """Two hosts of one rank each: the other sees only that a rank is gone."""
    runs = two_hosts(arguments(shards, tmp_path, "mae"), "--data", str(tmp_path / "nowhere"))
    texts = [run.communicate(timeout=240)[1].decode() for run in runs]
    lines = [line for line in texts[1].splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error (rank 1 on {socket.gethostname()}): ")
    assert "nowhere" in lines[0]
    assert [run.returncode for run in runs] == [1, 2]


def test_a_host_with_other_shards_than_the_first_is_refused(shards, tmp_path):
    runs = two_hosts(arguments(shards, tmp_path, "mae"), "--data", str(shards / "val"))
    texts = [run.communicate(timeout=240)[1].decode() for run in runs]
    lines = [line for line in texts[1].splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "48 images" in lines[0]
    assert "rank 0 has 96 images" in lines[0]
    assert lines[0].removeprefix(f"error (rank 1 on {socket.gethostname()}): ") in texts[0]
    assert [run.returncode for run in runs] == [2, 2]


def wait_for(condition, process, seconds=240):
    """Poll until the condition holds; fails where the process ends before."""
    for _ in range(seconds * 10):
        if condition():
            return
        assert process.poll() is None, "ended too early"
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize("name", ["mae", "rmae", "cmae"])
def test_triton_kernels_train_as_the_reference(name, shards, tmp_path):
    """Three steps of the whole trainer, Triton under its interpreter against PyTorch."""
    if not torch.cuda.is_available() and (said := backend._interpreter_problem()):
        pytest.skip(said)
    words = arguments(shards, tmp_path, name, "optimizer.epochs=1", "optimizer.warmup_epochs=0")
    words += ["--set", "optimizer.base_lr=0.01", "--set", "monitor.log_steps=1", "--max-steps", "3"]
    other = [str(tmp_path / "triton") if w == str(tmp_path / "run") else w for w in words]
    try:
        assert pretrain.main([*words, "--set", "kernels=reference"]) == 0
        assert pretrain.main([*other, "--set", "kernels=triton"]) == 0
    finally:
        kernels.use("reference")
    ours = json.loads((tmp_path / "triton/versions.json").read_text())
    assert ours["kernels"] == "triton"
    assert losses(tmp_path / "triton") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)


@pytest.mark.parametrize("slip", [ValueError("not enough values to unpack"), KeyError("z1")])
def test_a_slip_in_a_measure_keeps_its_traceback(slip, shards, tmp_path, capsys, monkeypatch):
    """Exit code 1, file and line: it is ours to mend, not the user's."""

    def broken(*_):
        raise slip

    monkeypatch.setattr("pipeline.method.measures.reconstruction.Reconstruction.compare", broken)
    assert pretrain.main(arguments(shards, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "in broken" in error
    assert type(slip).__name__ in error


def test_a_fresh_run_starts_from_weights_and_is_resumed_without_them(shards, tmp_path, capsys):
    """--init: step 0, another recipe's schedule; the refusal of --resume names this way."""
    first = arguments(shards, tmp_path / "a", "mae")
    assert pretrain.main([*first, "--max-steps", "2"]) == 0
    weights = load_file(tmp_path / "a/run/model.safetensors")
    words = arguments(shards, tmp_path / "b", "mae", "optimizer.base_lr=1e-12", "seed=7")
    checkpoint = next((tmp_path / "a/run/checkpoints").glob("step-*"))
    line = refused(capsys, *words, "--resume", str(checkpoint))
    assert f"--init {checkpoint} with another --output" in line
    assert pretrain.main([*words, "--init", str(tmp_path / "a/run"), "--max-steps", "1"]) == 0
    out = capsys.readouterr().out
    assert f"starts from {tmp_path / 'a/run'}: {len(weights)} tensors taken, 0 resized" in out
    started = load_file(tmp_path / "b/run/model.safetensors")
    assert all(torch.allclose(started[k], weights[k], atol=1e-6) for k in weights)
    assert pretrain.main([*words, "--max-steps", "2"]) == 0  # without --init: resumed
    out = capsys.readouterr().out
    assert "starts from" not in out
    assert "at step 1 of 2" in out
    again = pretrain.main([*words, "--init", str(tmp_path / "a/run"), "--max-steps", "3"])
    assert again == 0
    line = refused(capsys, *words, "--init", str(shards), "--max-steps", "4")
    assert "init.weights" in line


def test_weights_that_do_not_fit_are_refused_before_the_first_step(shards, tmp_path, capsys):
    assert pretrain.main([*arguments(shards, tmp_path / "a"), "--max-steps", "1"]) == 0
    capsys.readouterr()
    deeper = arguments(shards, tmp_path / "b", "mae", "encoder.options.depth=3")
    line = refused(capsys, *deeper, "--init", str(tmp_path / "a/run"))
    assert "another architecture, without encoder.blocks.2" in line

"""What is imported before the command line, the recipe and the manifest have been read."""

import json
import os
import re
import subprocess
import sys

import pytest
from eval_helpers import coloured_images, write_shards
from launching import ROOT
from tiny import tiny_overrides

from eval.shared.processes import LAUNCHER
from pipeline.runtime import startup

HEAVY = {
    "PIL", "deepspeed", "jinja2", "matplotlib", "scipy", "sklearn", "tensorboard", "timm", "torch",
    "torchvision", "triton", "webdataset",
}  # fmt: skip
# Of other packages, imported by those that a training needs.
UNUSED = {
    "boto3", "matplotlib", "scipy", "sklearn", "sympy", "torch._dynamo", "torch._inductor",
    "torchvision.models", "torchvision.ops",
}  # fmt: skip
MOST = 550  # modules that a help text may import; torch alone is 1200
DECODERS = {"PIL"}  # quick, and what the shard tools are for
CHILD = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(list(sys.modules))))
sys.argv = json.loads(sys.argv[1])
"""
SHARDS = ["--train", "{shards}", "--val", "{shards}"]
SMALL = ["--set", "batch_size=8", "--set", "data.partitions=4"]
PRETRAIN = CHILD + "from pipeline import pretrain; sys.exit(pretrain.main())"


def run(code, *arguments, names=HEAVY):
    """(exit code, output, which of these modules were imported, how many in all) of a fresh
    process."""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(["command", *map(str, arguments)])],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name not in LAUNCHER},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    output = "\n".join(lines[:-1]) + done.stderr
    modules = set(json.loads(lines[-1]))
    return done.returncode, output, names & modules, len(modules)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight images of two classes."""
    folder = tmp_path_factory.mktemp("startup") / "shards"
    return write_shards(folder, *coloured_images(8, 2, seed=0))


def test_the_package_is_a_door_that_imports_nothing():
    code, output, heavy, _ = run(CHILD + "import pipeline, shard_tools, eval; dir(pipeline)")
    assert (code, output, heavy) == (0, "", set())
    assert run(CHILD + "import torch.version")[2] == {"torch"}  # the test sees what there is


def test_the_help_is_there_at_once():
    code, output, heavy, modules = run(PRETRAIN, "--help")
    assert code == 0
    assert "--ds_config" in output
    assert not heavy
    assert modules < MOST


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "/none"], "error: /none: no such folder"),
        (["--data", "{shards}"], "8 samples are fewer than one batch of"),
        (["--data", "{shards}", *SMALL, "--ds_config", "zero9"], "zero9"),
        (["--recipe", "mae", "--set", "optimizer.epochs=x"], "optimizer.epochs"),
        (["--recipe", "/none.yaml"], "/none.yaml"),
        (["--max-steps", "0"], "--max-steps 0: must be at least 1"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_input_is_refused_before_torch_is_imported(arguments, words, shards):
    code, output, heavy, _ = run(PRETRAIN, *(word.format(shards=shards) for word in arguments))
    assert code == 2
    assert words in output
    assert "Traceback" not in output
    assert not heavy


# Of each command a word of its help.
COMMANDS = {
    "eval": "attentive cka embed finetune knn linprobe psnr reconstruct retrieve shape_bias "
    "visualise report reproduce mini_paper cifar_paper demo sweep",
    "pipeline": "pretrain export estimate",
    "shard_tools": "make_shards subset verify_shards index_shards shuffle_quality demo_images "
    "cifar_images",
}
FILES = [f"{room}/{name}.py" for room, names in COMMANDS.items() for name in names.split()]


def command(file):
    """The code of a process that runs a command as `python FILE` does."""
    return CHILD + f"import runpy; runpy.run_path({file!r}, run_name='__main__')"


@pytest.mark.parametrize("file", FILES)
def test_the_help_of_every_command_needs_no_torch(file):
    code, output, heavy, modules = run(command(file), "--help", names=HEAVY - DECODERS)
    assert code == 0, output
    assert output.startswith("usage: ")
    assert not heavy
    assert modules < MOST


def test_no_command_is_forgotten():
    found = [
        str(path.relative_to(ROOT))
        for room in COMMANDS
        for path in (ROOT / room).glob("*.py")
        if "argparse.ArgumentParser" in (text := path.read_text()) or "build_parser" in text
    ]
    helpers = {"pipeline/command.py", "shard_tools/cli.py", "pipeline/doctor.py"}
    assert {*found} - {*FILES} <= helpers


def test_a_training_imports_only_what_it_uses_and_says_where_its_start_went(shards, tmp_path):
    words = ["-v", "--recipe", "mae", "--data", shards, "--output", tmp_path / "run"]
    words += [word for value in tiny_overrides("mae") for word in ("--set", value)]
    code, output, unused, _ = run(PRETRAIN, *words, "--max-steps", "1", names=UNUSED)
    assert code == 0, output
    assert not unused
    phases = ["input", "imports", "ranks and fused ops", "model and data", "first step"]
    pattern = "start: " + ", ".join(rf"{name} (\d+\.\d) s" for name in phases)
    found = re.search(pattern + r"; (\d+\.\d) s in all", output)
    assert found, output
    *parts, total = map(float, found.groups())
    assert sum(parts) == pytest.approx(total, abs=0.3)
    assert (tmp_path / "run/log.txt").read_text().count("start: ") == 1


def test_the_phases_begin_with_launch_sh(monkeypatch):
    clock = iter([110.0, 112.5, 113.0])
    monkeypatch.setattr(startup.time, "time", lambda: next(clock))
    monkeypatch.setattr(startup.time, "process_time", lambda: 1.0)
    monkeypatch.setenv(startup.LAUNCHED, "100.25")
    startup.begin()
    assert startup.LAUNCHED not in os.environ
    startup.done("input")
    startup.done("imports")
    text = "start: launch.sh 8.8 s, input 3.5 s, imports 0.5 s; 12.8 s in all"
    assert startup.report() == text

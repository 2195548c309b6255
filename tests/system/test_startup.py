"""What is imported before the command line, the recipe and the manifest have been read."""

import json
import resource
import subprocess
import sys

import pytest
from launching import ROOT

HEAVY = {
    "PIL", "deepspeed", "jinja2", "matplotlib", "scipy", "sklearn", "tensorboard", "timm", "torch",
    "torchvision", "triton", "webdataset",
}  # fmt: skip
CHILD = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps([m for m in sys.modules if "." not in m])))
sys.argv = json.loads(sys.argv[1])
"""
PRETRAIN = CHILD + "from pipeline import pretrain; sys.exit(pretrain.main())"


def run(code, *arguments):
    """(exit code, output, heavy modules that were imported, CPU seconds) of a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(["command", *map(str, arguments)])],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    lines = done.stdout.splitlines()
    output = "\n".join(lines[:-1]) + done.stderr
    return done.returncode, output, HEAVY & set(json.loads(lines[-1])), seconds


def test_the_package_is_a_door_that_imports_nothing():
    code, output, heavy, _ = run(CHILD + "import pipeline, shard_tools, eval; dir(pipeline)")
    assert (code, output, heavy) == (0, "", set())
    assert run(CHILD + "import torch.version")[2] == {"torch"}  # the test sees what there is


def test_the_help_is_there_at_once():
    runs = [run(PRETRAIN, "--help") for _ in range(3)]
    for code, output, heavy, _ in runs:
        assert code == 0
        assert "--ds_config" in output
        assert not heavy
    assert min(seconds for *_, seconds in runs) < 0.6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "/none"], "error: /none: no such folder"),
        (["--recipe", "mae", "--set", "optimizer.epochs=x"], "optimizer.epochs"),
        (["--recipe", "/none.yaml"], "/none.yaml"),
        (["--max-steps", "0"], "--max-steps 0: must be at least 1"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_input_is_refused_before_torch_is_imported(arguments, words):
    code, output, heavy, _ = run(PRETRAIN, *arguments)
    assert code == 2
    assert words in output
    assert "Traceback" not in output
    assert not heavy

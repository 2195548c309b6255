"""The bundle for a node without a network: what is in it, and what its install script refuses.

Building and installing one needs a package index and minutes: docs/cluster.md says what was tried.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle():
    spec = importlib.util.spec_from_file_location("bundle", ROOT / ".ci/bundle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(lines):
    return {line.split("==")[0] for line in lines}


def test_the_wheels_are_what_a_run_needs_without_torch(bundle):
    found = names(bundle.needed("3.12", keep_torch=True))
    assert {"deepspeed", "timm", "webdataset", "pyyaml", "pydantic-core", "simplejpeg",
            "tensorboard", "matplotlib", "ninja"} <= found  # fmt: skip
    assert not found & {"torch", "torchvision", "triton", "sympy", "numpy", "pillow", "scipy"}
    assert not any(name.startswith(("nvidia", "cuda")) for name in found)
    assert not found & {"pytest", "ruff", "boto3", "moto"}  # what development needs stays here
    full = names(bundle.needed("3.12", keep_torch=False))
    assert full > found
    assert {"torch", "torchvision", "numpy", "pillow"} <= full


def test_every_version_is_the_locked_one(bundle):
    locked = set((ROOT / "requirements.lock").read_text().lower().replace("_", "-").split())
    assert set(bundle.needed("3.11", keep_torch=True)) <= locked


def test_all_that_a_wheel_requires_is_there_or_came_with_torch(bundle):
    found = names(bundle.needed("3.12", keep_torch=True))
    there = bundle.closure(bundle.TORCH, "3.12") | set(bundle.LARGE)
    assert bundle.closure(found, "3.12") <= found | there


@pytest.mark.parametrize("version", ["3", "2.7", "3.10", "3.x", "12"])
def test_a_python_that_cannot_be_is_refused(version):
    command = [sys.executable, ROOT / ".ci/bundle.py", "--python", version]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: PYTHON_VERSION={version}: must be 3.11 or newer, as 3.12\n"


def install(folder, python, wanted):
    (folder / "wheels").mkdir(exist_ok=True)
    (folder / "wheels/python").write_text(f"{wanted}\n")
    shutil.copy(ROOT / ".ci/install.sh", folder)
    command = [folder / "install.sh", python]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_install_refuses_another_python_and_one_without_torch(tmp_path):
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    done = install(tmp_path, sys.executable, "3.99")
    assert done.returncode == 2
    assert (
        f"is Python {here}, the bundle is for 3.99: make bundle PYTHON_VERSION={here}"
        in done.stderr
    )
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages
    os.chmod(bare, 0o755)
    done = install(tmp_path, bare, here)
    assert done.returncode == 2
    assert "has no torch that can be imported" in done.stderr
    assert install(tmp_path, tmp_path / "nothing", here).returncode == 2
    assert not (tmp_path / ".venv").exists()

"""Shared fixtures."""

import os
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks or workers share two cores
if os.environ.get("RELAXMIM_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import pytest
import torch

torch.set_num_threads(1)
try:
    from hypothesis import settings
except ModuleNotFoundError:  # a GPU node that runs the kernel tests alone
    pass
else:
    # The same examples in every run; HYPOTHESIS_PROFILE=default draws new ones.
    settings.register_profile("fixed", derandomize=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# Files of few and long tests. They start first: no worker is left with one of them at the end.
LONG = (
    "test_gpu_check", "test_demo", "test_cifar_paper", "test_contributing", "test_mini_paper",
    "test_engine", "test_end_to_end", "test_sanitize", "test_estimate", "test_sweep",
    "test_output_errors", "test_rendezvous", "test_kernels_compile", "test_faults",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a file the order stays."""
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """train/ and val/ shards of 96 and 48 small real photographs, made by the real tools."""
    folder = tmp_path_factory.mktemp("photographs")
    demo = ["--train", "96", "--val", "48", "--size", "24"]
    run_tool("demo_images.py", folder / "images", *demo)
    for part in ("train", "val"):
        run_tool("make_shards.py", folder / "images" / part, folder / part, "--shard-size", "20KiB")
    return folder


def run_tool(name, *arguments):
    """Run a command of shard_tools/ as a user would; fails with what it printed."""
    tool = Path(__file__).parent.parent / "shard_tools" / name
    done = subprocess.run(
        [sys.executable, tool, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr

"""Shared fixtures."""

import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks or workers share two cores

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

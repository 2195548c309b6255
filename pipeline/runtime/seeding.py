"""Seeds of the global generators, which timm and dropout draw from, as functions of numbers."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(*numbers: int) -> None:
    """Seed `random`, numpy's and torch's global generators by a tuple of numbers from 0 up."""
    state = np.random.SeedSequence(numbers).generate_state(3, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002 - timm draws from the global generator
    torch.manual_seed(int(state[2]))

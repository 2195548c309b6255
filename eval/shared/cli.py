"""What all evaluations need while they run: ranks, seeds, progress.

Every evaluation runs alone (`python eval/linprobe.py …`) or on several ranks
(`deepspeed eval/linprobe.py …`, `torchrun eval/linprobe.py …`); the ranks are read from RANK,
WORLD_SIZE and LOCAL_RANK.
"""

import os
import random
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pipeline import progress as status
from pipeline.command import check_environment
from pipeline.distributed import Ranks, device_of, untried_device
from pipeline.rendezvous import MEET, joining

T = TypeVar("T")


def join_ranks() -> Ranks:
    """Join the ranks named by the environment (nccl on CUDA, gloo on CPU), or run alone.

    UserError where the environment is no rank's, or the ranks do not meet.
    """
    check_environment()
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world, local_rank = (int(os.environ.get(k, v)) for k, v in names.items())
    device = device_of(local_rank)
    if rank == 0 and (line := untried_device()):
        print(line, flush=True)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        with joining():
            dist.init_process_group(backend, MEET)
    return Ranks(rank, world, local_rank, device)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random, alike on every rank."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's augmentations draw from the global generator
    torch.manual_seed(seed)


def progress(
    items: Iterable[T], ranks: Ranks, text: str, total: int | None = None, images: int = 0
) -> Iterable[T]:
    """The items, followed by a line with speed and time left, on the first rank's terminal only.

    total: their number, where they do not have a length. images: of one item, on one rank.
    """
    return status.progress(items, text, total, images * ranks.world, shown=ranks.first)

"""How the ranks of a run meet, and what is said where they do not."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from pipeline.distributed import lost_contact
from pipeline.errors import UserError
from pipeline.gpu_errors import cuda_fault, nccl_fault

_TIMEOUT = torch.distributed.constants.default_pg_timeout
_ANOTHER_PORT = (
    "give another one (deepspeed --master_port, or MASTER_PORT=…); launch.sh on one node finds a "
    "free one itself where MASTER_PORT is not set"
)


@contextlib.contextmanager
def joining(timeout: timedelta = _TIMEOUT) -> Iterator[None]:
    """Join as the only process of this rank, then make the process group in the body. What goes
    wrong is a UserError."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized()
    try:
        # Kept until the group is made: on rank 0 it listens.
        store = _take_place(address, timeout) if several else None
        yield
        del store
    except RuntimeError as error:  # torch's DistError is one
        text = str(error)
        if "EADDRINUSE" in text:
            port = os.environ["MASTER_PORT"]
            raise UserError(
                f"MASTER_PORT {port} is taken, perhaps by another run on this host: {_ANOTHER_PORT}"
            ) from None
        if fault := nccl_fault(error) or cuda_fault(error):
            raise UserError(fault) from error
        if "Too many open files" in text:  # gloo's words, which name gloo
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise UserError(
                f"a process may open only {most} files here, too few for the ranks to meet: raise "
                "the limit (ulimit -n 1024)"
            ) from None
        if lost_contact(error):
            raise UserError("lost contact with another rank while the ranks met") from None
        if not isinstance(error, torch.distributed.DistError):
            raise
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at "
            f"{address} ({text.split('. ')[0].splitlines()[0]})"
        ) from None


def _take_place(address: str, timeout: timedelta) -> Any:
    """The store of the ranks, in which this process is the first of its rank, else UserError.

    Of two runs on one port the second's rank 0 finds it taken, but its other ranks would meet the
    first run's: come before that run's own they would train with it, later they would wait.
    """
    store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timeout))
    # torchrun can keep its store when it starts the ranks again.
    start = f"relaxmim/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        store.set(f"{start}/ranks", str(world))
    theirs = int(store.get(f"{start}/ranks"))
    if theirs != world or store.add(f"{start}/rank {rank}", 1) > 1:
        found = f"another rank {rank}" if theirs == world else f"a run of {theirs} ranks"
        raise UserError(
            f"rank {rank} of {world} found {found} at {address}, perhaps of another run with the "
            f"same MASTER_PORT: {_ANOTHER_PORT}"
        )
    return store

"""How the ranks of a run meet, and what is said where they do not."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store

from pipeline.distributed import lost_contact
from pipeline.errors import UserError
from pipeline.gpu_errors import cuda_fault, nccl_fault

_TIMEOUT = torch.distributed.constants.default_pg_timeout
_ANOTHER_PORT = (
    "give another one (deepspeed --master_port, or MASTER_PORT=…); launch.sh on one node finds a "
    "free one itself where MASTER_PORT is not set"
)


# The init_method of every process group of ranks.
MEET = "relaxmim://"


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """Make the process group by MEET in the body. What goes wrong is a UserError."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        yield
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


def _meet(url: str, timeout: timedelta = _TIMEOUT, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """The store of the ranks, this one's number and how many there are, for torch."""
    store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = torch.distributed.PrefixStore(_agree_on_start(store, rank, world, timeout), store)
    if world > 1:
        _take_place(store, rank, world)
    yield store, rank, world


torch.distributed.register_rendezvous_handler("relaxmim", _meet)


def _agree_on_start(store: Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name for this start of the ranks, which no other has.

    The store of torchrun outlives its ranks: started again, they would read where the ranks before
    them could be reached. Agents do not agree on TORCHELASTIC_RESTART_COUNT. So rank 0 gives the
    name, and counts a rank only when it has taken it, since one that came may be of a start before.
    """
    if rank > 0:
        arrival = store.add(f"relaxmim/arrivals of {rank}", 1)
        start = store.get(f"relaxmim/start of {rank}, {arrival}").decode()
        store.set(f"{start}/{rank}", "")
        return start
    start = f"relaxmim/start {store.add('relaxmim/starts', 1)}"
    told, missing = [0] * world, [*range(1, world)]
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            arrival = store.add(f"relaxmim/arrivals of {other}", 0)
            if arrival > told[other]:
                store.set(f"relaxmim/start of {other}, {arrival}", start)
                told[other] = arrival
        missing = [other for other in missing if not store.check([f"{start}/{other}"])]
        if time.monotonic() > end:
            ranks = ", ".join(map(str, missing))
            raise torch.distributed.DistStoreError(f"timed out waiting for ranks {ranks}")
        time.sleep(0.05 * bool(missing))
    return start


def _take_place(store: Store, rank: int, world: int) -> None:
    """UserError unless this process is the first of its rank in the store.

    Of two runs on one port the second's rank 0 finds it taken, but its other ranks would meet the
    first run's: come before that run's own they would train with it, later they would wait.
    """
    if rank == 0:
        store.set("relaxmim/ranks", str(world))
    theirs = int(store.get("relaxmim/ranks"))
    if theirs != world or store.add(f"relaxmim/rank {rank}", 1) > 1:
        found = f"another rank {rank}" if theirs == world else f"a run of {theirs} ranks"
        raise UserError(
            f"rank {rank} of {world} found {found} at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}, perhaps of another run with the same MASTER_PORT: "
            f"{_ANOTHER_PORT}"
        )

"""The table of shards goes to worker processes as a handle on shared memory.

Under fork a worker inherits it; under forkserver and spawn all that a worker needs is pickled, and
there this saves a copy per worker.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import torch

from shard_tools.shard_table import ShardTable


def share(table: ShardTable) -> ShardTable:
    """A copy of the table in shared memory, to be handed to any number of processes."""
    buffer = torch.from_numpy(table.buffer.copy()).share_memory_()
    return _rebuild(buffer, len(table))


def _rebuild(buffer: torch.Tensor, count: int) -> ShardTable:
    table = ShardTable(buffer.numpy(), count)
    table.shared = buffer
    return table


def _reduce(table: ShardTable) -> tuple[Callable[..., ShardTable], tuple[object, int]]:
    if table.shared is None:
        return ShardTable, (table.buffer, len(table))
    return _rebuild, (table.shared, len(table))


ForkingPickler.register(ShardTable, _reduce)  # only what is handed to a process goes this way

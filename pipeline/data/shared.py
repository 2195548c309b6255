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
    arrays = (table.buffer, table.starts)
    return _rebuild(*(torch.from_numpy(array.copy()).share_memory_() for array in arrays))


def _rebuild(buffer: torch.Tensor, starts: torch.Tensor) -> ShardTable:
    table = ShardTable(buffer.numpy(), len(starts) - 1)
    table.starts = starts.numpy()
    table.shared = buffer, starts
    return table


def _reduce(table: ShardTable) -> tuple[Callable[..., ShardTable], tuple[object, ...]]:
    if table.shared is None:
        return ShardTable, (table.buffer, len(table))
    return _rebuild, table.shared


ForkingPickler.register(ShardTable, _reduce)  # only what is handed to a process goes this way

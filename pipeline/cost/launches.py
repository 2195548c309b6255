"""What a step launches, and what the host takes for a launch."""

from __future__ import annotations

import time
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch.utils._python_dispatch import TorchDispatchMode

# Of an optimizer step on one rank (make bench-launches), and of each further group of parameters,
# where layers have learning rates of their own.
OPTIMIZER_LAUNCHES, GROUP_LAUNCHES = 10, 2
# Of a micro-batch that is a CUDA graph: the graph, copies of its inputs and results, the gradients'
# copy (tests/pipeline/runtime/test_graphs.py).
GRAPH_LAUNCHES = 20


class LaunchCounter(TorchDispatchMode):
    """Counts the ops that would launch something on a device."""

    FREE = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = func.is_view or func.overloadpacket.__name__ in self.FREE
        self.count += func.namespace == "aten" and not free
        return func(*args, **(kwargs or {}))


def measured_launch_ms(rounds: int = 20) -> float:
    """Host milliseconds per launch on this machine: forward and backward of a ViT block so narrow
    that its arithmetic is next to nothing, on one thread; the least of the rounds.

    A lower bound for CUDA, whose launches take some microseconds themselves.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    block, x = Block(8, 2), torch.zeros(1, 4, 8, requires_grad=True)
    with LaunchCounter() as launches:
        block(x).sum().backward()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        block(x).sum().backward()
        taken.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 1e3 * min(taken) / launches.count

"""Bytes moved: by chains of PyTorch ops (counted as they run) and by the kernels (from the index
ranges that their cases state, which the tests check against what a kernel does: kernels_traced.py).

Two figures per kernel. `requested`: what all programs ask for, a tile that two programs read
counted twice, bytes that several lanes of one instruction read counted once. `moved`: what must
cross the memory bus if the L2 cache keeps what programs share: distinct 32-byte sectors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import kernels
from pipeline.kernels import backend
from pipeline.kernels.cases import Sizes, Traffic, all_bytes, bytes_of


class CountBytes(TorchDispatchMode):
    """Sum of input and output bytes of every aten op that is not a view.

    A gather is charged for what it picks, not for the whole of what it picks from.
    """

    PICKS = ("gather", "index", "index_select", "embedding")
    FREE = ("detach", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "lift")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or func.is_view or name in self.FREE:
            return out  # outside aten: questions about fake tensors, such as their device
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        read = [bytes_of(x) for x in inputs]
        if name in self.PICKS:
            read[0] = min(read[0], bytes_of(outputs[0]))
        if name in ("fill_", "zero_", "normal_", "uniform_"):
            read = []
        self.total += sum(read) + sum(map(bytes_of, outputs))
        return out


def count_bytes(run: Callable[[], Any]) -> int:
    """Bytes that the aten ops of run() move, backward included."""
    with CountBytes() as counter:
        run()
    return counter.total


# ---- the table -----------------------------------------------------------------------------------


@contextmanager
def references() -> Iterator[None]:
    """Run the PyTorch references, whatever is chosen."""
    before = backend._implementation
    kernels.use("reference")
    try:
        yield
    finally:
        backend._implementation = before


@references()
def measured(sizes: Sizes) -> dict[str, tuple[int, int, list[Traffic]]]:
    """Per call: bytes of MAE's chain, of our reference, and the traffic of its launches."""
    s = sizes
    masks = kernels.sample_masks(torch.arange(s.batch), seed=0, epoch=0, length=s.length,
                                 visible=(s.keep, 0), policy="complement")  # fmt: skip
    image = torch.empty(s.batch, s.side, s.side, 3, dtype=torch.uint8)
    return {
        name: (
            count_bytes(lambda b=b: b.chain(s)),
            count_bytes(lambda b=b: b.reference(s)),
            b.launches(s, image, masks),
        )
        for name, b in all_bytes().items()
    }


def ratios(sizes: Sizes) -> tuple[dict[str, float], dict[str, float]]:
    """(all bytes an op asks for / MAE's chain, bytes each launch moves / its minimum)."""
    ratio, of_minimum = {}, {}
    for name, (chain, _, launches) in measured(sizes).items():
        ratio[name] = sum(t.requested + t.around for t in launches) / chain
        of_minimum[name] = max(t.moved / t.minimum for t in launches)
    return ratio, of_minimum

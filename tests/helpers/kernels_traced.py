"""What a kernel reads and writes, seen by Triton's interpreter as it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.kernels.cases import SECTOR


@dataclass
class Trace:
    """Bytes asked for, and the addresses of all sectors touched."""

    requested: int = 0
    sectors: set[int] | None = None

    def add(self, pointers: Any, mask: Any) -> None:
        """Count one load or store instruction of one program."""
        size = np.dtype(_numpy_type(pointers)).itemsize
        addresses = np.unique(
            np.broadcast_to(pointers.data, np.shape(mask))[np.asarray(mask, bool)]
        )
        self.requested += int(addresses.size) * size
        if self.sectors is None:
            self.sectors = set()
        self.sectors.update(np.unique(addresses // SECTOR).tolist())

    @property
    def moved(self) -> int:
        return SECTOR * len(self.sectors or ())


def _numpy_type(pointers: Any) -> Any:
    from triton.runtime.interpreter import _get_np_dtype

    return _get_np_dtype(pointers.get_element_ty())


@contextmanager
def traced() -> Iterator[Trace]:
    """Record the loads and stores of kernels run under Triton's interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    trace = Trace()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def traced_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        trace.add(pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def traced_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        trace.add(pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = traced_load
    InterpreterBuilder.create_masked_store = traced_store
    try:
        yield trace
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store

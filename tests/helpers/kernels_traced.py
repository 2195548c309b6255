"""What a kernel reads and writes, seen by Triton's interpreter as it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

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


@dataclass
class Guard:
    """Launched kernels, and what they did that they may not."""

    launched: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    kernel: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    stored: list[Any] = field(default_factory=list)

    def start(self, kernel: str, arguments: Any) -> None:
        """A launch begins: only the bytes of its arguments may be touched."""
        self.kernel, self.stored = kernel, []
        self.launched.add(kernel)
        given = [t for t in arguments if isinstance(t, torch.Tensor) and t.numel()]
        self.spans = [(t.data_ptr(), t.data_ptr() + _span(t)) for t in given]

    def touch(self, what: str, pointers: Any, mask: Any) -> Any:
        """Addresses of a load or store of one program."""
        size = np.dtype(_numpy_type(pointers)).itemsize
        mask = np.asarray(mask, bool)
        at = np.broadcast_to(pointers.data, mask.shape)[mask].astype(np.int64)
        allowed = np.zeros(at.shape, bool)
        for first, end in self.spans:
            allowed |= (at >= first) & (at + size <= end)
        if not allowed.all():
            self.faults.append(f"{self.kernel}: {what} outside of every argument")
        return at

    def end(self) -> None:
        """A launch ends: no address was stored to twice, whatever the order of programs."""
        stored = np.concatenate(self.stored) if self.stored else np.zeros(0)
        if len(np.unique(stored)) != len(stored):
            self.faults.append(f"{self.kernel}: two stores to one address")


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((n - 1) * stride for n, stride in steps)) * tensor.element_size()


@contextmanager
def guarded() -> Iterator[Guard]:
    """Note accesses outside of arguments and races of kernels run under Triton's interpreter.

    Where a masked load names no `other`, what is masked is NaN or the largest integer, as it may be
    on a GPU; the interpreter's own zeros would hide it.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    guard = Guard()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    call = GridExecutor.__call__

    def guarded_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        guard.touch("load", pointers, mask.data)
        if other is None:
            kind = np.dtype(_numpy_type(pointers))
            worst = np.nan if kind.kind == "f" else np.iinfo(kind).max
            filled = np.full(np.shape(pointers.data), worst, kind)
            other = TensorHandle(filled, pointers.get_element_ty())
        return load(self, pointers, mask, other, *rest)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.stored.append(guard.touch("store", pointers, mask.data))
        return store(self, pointers, value, mask, *rest)

    def guarded_call(self: Any, *args: Any, **kwargs: Any) -> None:
        guard.start(self.fn.__name__, [*args, *kwargs.values()])
        call(self, *args, **kwargs)
        guard.end()

    InterpreterBuilder.create_masked_load = guarded_load
    InterpreterBuilder.create_masked_store = guarded_store
    GridExecutor.__call__ = guarded_call
    try:
        yield guard
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
        GridExecutor.__call__ = call

"""Reusable shared memory: worker processes fill it with images, the main process reads them.

The first touch of a page of shared memory costs a page fault and zeroing: 0.1 ms per image of 224
pixels, more than a tenth of the time of decoding it. So slots are used again, each as soon as the
last tensor on it is gone. The memory has no name and takes nothing from /dev/shm.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch

_keys = itertools.count()
_here: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


class Slots:
    """`each` slots of `size` bytes for each of `owners` processes; a process takes only its own."""

    def __init__(self, owners: int, each: int, size: int) -> None:
        self.key, self.owners, self.each = next(_keys), owners, each
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.file = os.memfd_create("relaxmim batches")
        os.ftruncate(self.file, self._bytes)  # takes no memory before it is written
        self._open()

    @property
    def _bytes(self) -> int:
        return mmap.PAGESIZE * -(-self.owners * self.each // mmap.PAGESIZE) + (
            self.owners * self.each * self.size
        )

    def _open(self) -> None:
        memory = np.frombuffer(mmap.mmap(self.file, self._bytes), np.uint8)
        self._slots = memory[-self.owners * self.each * self.size :].reshape(-1, self.size)
        self._taken = memory[: self.owners * self.each]
        _here[self.key] = self
        weakref.finalize(self, os.close, self.file)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("key", "owners", "each", "size")}
        return kept | {"file": reduction.DupFd(self.file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"file": state["file"].detach()}
        self._open()

    def take(self, owner: int) -> int | None:
        """A free slot of process number `owner`, or None."""
        mine = range(owner * self.each, (owner + 1) * self.each)
        slot = next((slot for slot in mine if not self._taken[slot]), None)
        if slot is not None:
            self._taken[slot] = 1
        return slot

    def tensor(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The slot as a uint8 tensor."""
        return torch.from_numpy(self._array(slot, shape))

    def _array(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        return self._slots[slot, : int(np.prod(shape))].reshape(shape)

    def lend(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """As `tensor`; the slot is free again when nothing refers to that memory any more."""
        array = self._array(slot, shape)  # the tensor and all its views hold this very object
        weakref.finalize(array, self._taken.__setitem__, slot, 0).atexit = False
        return torch.from_numpy(array)


def lent(key: int, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What another process put into a slot of the Slots with this key, on loan."""
    return _here[key].lend(slot, shape)

"""A batch, and what training batches are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.data.crops import Crop
from pipeline.data.shard_cache import GIB
from pipeline.data.slots import lent
from shard_tools.manifest import Manifest

# Changes a crop, uint8 [S, S, 3], in place: (pixels, epoch, key, number of the view).
Augment = Callable[[np.ndarray, int, int, int], None]

StartMethod = Literal["fork", "forkserver", "spawn"]

_NUMBERS = ("label", "sample", "key")  # the small tensors of a batch


@dataclass
class Batch:
    """One micro-batch of one rank.

    image uint8 [b, H, W, 3]; label int64 [b] (-1 = none); sample int64 [b], numbers in the
    manifest; key int64 [b], what keys each sample's randomness within the epoch (= sample, but
    the number of the draw where an epoch is drawn with replacement); epoch and step, the
    optimizer step counted from 0 over the whole run; bad_samples: how many samples of this
    micro-batch would not decode and were replaced; faults: a sentence for each of them; second
    uint8 [b, H, W, 3], another crop of each image, where it was asked for.
    """

    image: torch.Tensor
    label: torch.Tensor
    sample: torch.Tensor
    key: torch.Tensor
    epoch: int = 0
    step: int = 0
    bad_samples: int = 0
    faults: tuple[str, ...] = ()
    second: torch.Tensor | None = None
    slot: tuple[int, int] | None = None  # between processes: where the images are

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the DataLoader's pinning thread)."""
        names = ("image", *_NUMBERS) + (() if self.second is None else ("second",))
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})

    def __getstate__(self) -> dict[str, Any]:
        # From worker to main process: only the image is worth a piece of shared memory.
        state = self.__dict__ | {name: getattr(self, name).numpy() for name in _NUMBERS}
        if self.slot is not None:
            state |= {"image": tuple(self.image.shape), "second": self.second is not None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {name: torch.from_numpy(state[name]) for name in _NUMBERS}
        if self.slot is not None:
            shape = 1 + state["second"], *state["image"]
            self.image, *others = lent(*self.slot, shape)
            self.second, self.slot = (others or [None])[0], None


@dataclass(frozen=True)
class LoaderConfig:
    """What training batches are made of, the same on every rank.

    folder: shards (a path, URL, or their manifest). batch_size is global; a step has
    batch_size / (world · micro_batch) micro-batches per rank. window: shards that are shuffled
    together. on_error: `skip` replaces a sample that will not decode by the next one of its
    partition, counts and logs it. samples_per_epoch: > 0 makes an epoch of that many draws with
    replacement. sizes: (step before which a phase ends, side of its crops) of a run whose crops
    change their size; none: all have the crop's, which no phase exceeds. second_crop: fill
    Batch.second. augment: applied to each crop in the worker. workers: processes per rank. cache,
    cache_bytes: where remote shards are kept on this node (default $RELAXMIM_CACHE) and how many
    bytes of them. start_method: of the workers, by default Python's own; the batches and the memory
    are the same (spawn: see `_context`).
    """

    folder: str | Path | Manifest
    batch_size: int
    micro_batch: int
    crop: Crop
    seed: int = 0
    partitions: int = 64
    window: int = 8
    on_error: Literal["fail", "skip"] = "fail"
    samples_per_epoch: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    second_crop: bool = False
    augment: Augment | None = None
    workers: int = 0
    decode: str = "auto"
    cache: str | Path | None = None
    cache_bytes: int = 100 * GIB
    pin_memory: bool = False
    start_method: StartMethod | None = None

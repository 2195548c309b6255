"""From the number of a sample to its pixels: read at an offset, decode, crop."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from pipeline.data.jpeg import Choose, DecodeError, decoder
from pipeline.data.shard_cache import ShardCache
from pipeline.errors import UserError
from shard_tools.manifest import Manifest, ManifestError

_OPEN_SHARDS = 256  # file handles that one worker keeps


class SampleError(UserError):
    """A sample that will not decode; the message names it, its shard and the reason."""


class Reader:
    """Samples of a manifest as uint8 crops; a copy of it lives in each worker process.

    interpolation and `how`: see pipeline/data/jpeg.py; cache: for remote shards.
    """

    def __init__(
        self, manifest: Manifest, image_size: int, interpolation: str, how: str,
        cache: ShardCache | None,
    ) -> None:  # fmt: skip
        self.manifest, self.interpolation, self.cache = manifest, interpolation, cache
        self.image_size = image_size
        self.decoder, _ = decoder(how)  # by name: a worker may be a fresh process
        self.handles: OrderedDict[int, int] = OrderedDict()
        manifest.lazy_index.open()  # what can be found wrong at once is, before the workers start

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"handles": OrderedDict()}  # they are numbers of this process only

    def read(self, sample: int) -> bytes:
        """The image bytes of a sample."""
        shard, row = self.shard(sample), self.manifest.lazy_index.row(sample)
        offset, length = int(row["offset"]), int(row["length"])
        if self.cache is not None:
            data = self.cache.read(shard, offset, length)
        else:
            data = os.pread(self._handle(shard), length, offset)
        if len(data) != length:
            raise ManifestError(
                f"{self.manifest.path(shard)}: sample {sample} ends after {len(data)} of "
                f"{length} bytes; the shard changed since its manifest was written"
            )
        return data

    def shard(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return int(self.manifest.starts.searchsorted(sample, "right")) - 1

    def decode(self, sample: int, choose: Choose, out: np.ndarray) -> None:
        """Write the chosen crop of a sample into `out`; SampleError if it will not decode."""
        try:
            decoder(self.decoder)[1](self.read(sample), choose, out, self.interpolation)
        except DecodeError as error:
            where = self.manifest.path(self.shard(sample))
            raise SampleError(f"sample {sample} of {where} will not decode: {error}") from error

    def close(self) -> None:
        """Stop this process's background threads."""
        if self.cache is not None:
            self.cache.close()

    def empty(self, count: int) -> torch.Tensor:
        """An uninitialised uint8 batch [count, S, S, 3]; in a worker, memory that the main
        process can map, which saves a copy."""
        shape = (count, self.image_size, self.image_size, 3)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)

    def labels(self, samples: np.ndarray) -> torch.Tensor:
        """Class indices, int64, of sample numbers."""
        return torch.from_numpy(self.manifest.lazy_index.rows(samples)["label"].astype(np.int64))

    def _handle(self, shard: int) -> int:
        if shard in self.handles:
            self.handles.move_to_end(shard)
            return self.handles[shard]
        path = self.manifest.path(shard)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ManifestError(f"{path}: this shard cannot be read ({error.strerror})") from error
        if len(self.handles) >= _OPEN_SHARDS:
            os.close(self.handles.popitem(last=False)[1])
        self.handles[shard] = handle
        return handle

"""From the number of a sample to its pixels: read at an offset, decode, crop."""

from __future__ import annotations

import errno
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from pipeline.data.jpeg import CAN_READ_MANY, Choose, DecodeError, decode_many, decoder, read_many
from pipeline.data.shard_cache import ShardCache
from pipeline.data.slots import Slots
from pipeline.errors import UserError
from shard_tools.manifest import Manifest, ManifestError
from shard_tools.tar import read_up_to

_OPEN_SHARDS = 256  # file handles that one worker keeps
_TOGETHER = 16  # files that are read before they are decoded: they fit a core's own cache


class SampleError(UserError):
    """A sample that will not decode; the message names it, its shard and the reason."""


class Reader:
    """Samples of a manifest as uint8 crops; a copy of it lives in each worker process.

    image_size: side of the largest crop; interpolation and `how`: see pipeline/data/jpeg.py; cache:
    for remote shards.
    """

    def __init__(
        self, manifest: Manifest, image_size: int, interpolation: str, how: str,
        cache: ShardCache | None,
    ) -> None:  # fmt: skip
        self.manifest, self.interpolation, self.cache = manifest, interpolation, cache
        self.image_size = image_size
        self.decoder, _ = decoder(how)  # by name: a worker may be a fresh process
        self.handles: OrderedDict[int, int] = OrderedDict()
        self.slots: Slots | None = None  # of the workers of a loader
        self.buffer = bytearray()  # of files that are decoded together
        manifest.lazy_index.open()  # what can be found wrong at once is, before the workers start

    def __getstate__(self) -> dict[str, Any]:
        # They are numbers of this process only.
        return self.__dict__ | {"handles": OrderedDict(), "buffer": bytearray()}

    def read(self, sample: int) -> bytes:
        """The image bytes of a sample."""
        shard, row = self.shard(sample), self.manifest.lazy_index.row(sample)
        offset, length = int(row["offset"]), int(row["length"])
        if self.cache is not None:
            data = self.cache.read(shard, offset, length)
        else:
            data = self._read(shard, offset, length)
        if len(data) != length:
            raise ManifestError(
                f"{self.manifest.path(shard)}: sample {sample} ends after {len(data)} of "
                f"{length} bytes; the shard changed since its manifest was written"
            )
        return data

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        try:
            return read_up_to(self._handle(shard), offset, length)
        except OSError as error:  # a disk that fails, a file that was replaced on NFS
            path = self.manifest.path(shard)
            raise ManifestError(f"{path}: cannot be read any more ({error.strerror})") from error

    def shard(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return int(self.manifest.starts.searchsorted(sample, "right")) - 1

    def decode(self, sample: int, choose: Choose, out: np.ndarray) -> None:
        """Write the chosen crop of a sample into `out`; SampleError if it will not decode."""
        try:
            decoder(self.decoder)[1](self.read(sample), choose, out, self.interpolation)
        except DecodeError as error:
            where = self.manifest.describe(sample)
            raise SampleError(f"{where} will not decode: {error}") from error

    def decode_all(
        self, samples: np.ndarray, chosen: Sequence[Sequence[Choose]], outs: Sequence[np.ndarray]
    ) -> np.ndarray:
        """As `decode` for whole batches; bool [b], false where that has to be asked.

        chosen: for each of b samples the crops to take, one per output; outs: uint8
        [b, S, S, 3] each.
        """
        done = np.zeros(len(samples), np.bool_)
        if self.cache is None and self.decoder == "jpegcrop" and CAN_READ_MANY:
            for first in range(0, len(samples), _TOGETHER):
                part = slice(first, first + _TOGETHER)
                views = [out[part] for out in outs]
                done[part] = self._decode_some(samples[part], chosen[part], views)
        return done

    def _decode_some(
        self, samples: np.ndarray, chosen: Sequence[Sequence[Choose]], outs: Sequence[np.ndarray]
    ) -> np.ndarray:
        rows = self.manifest.lazy_index.rows(samples)
        lengths = rows["length"].astype(np.int64)
        ends = np.cumsum(lengths)
        files = np.zeros((len(samples), 6), np.int64)
        shards = self.manifest.starts.searchsorted(samples, "right") - 1
        files[:, 0] = [self._handle(shard) for shard in shards.tolist()]
        files[:, 1], files[:, 2], files[:, 3] = rows["offset"], lengths, ends - lengths
        if len(self.buffer) < ends[-1]:
            self.buffer = bytearray(int(ends[-1]) * 5 // 4)
        read_many(files, self.buffer)
        done, sizes = files[:, 4] > 0, files[:, 4:].tolist()
        for view, out in enumerate(outs):
            boxes = [_box(place[view], *size) for place, size in zip(chosen, sizes, strict=True)]
            done &= decode_many(files, self.buffer, np.array(boxes, float), out, self.interpolation)
        return done

    def close(self) -> None:
        """Stop this process's background threads and close its shards."""
        if self.cache is not None:
            self.cache.close()
        while self.handles:
            os.close(self.handles.popitem()[1])

    def empty(self, count: int, side: int | None = None) -> torch.Tensor:
        """An uninitialised uint8 batch [count, side, side, 3], of the image size where no side is
        given; in a worker, memory that the main process can map, which saves a copy."""
        shape = (count, *[side or self.image_size] * 2, 3)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)

    def room(self, *shape: int, side: int) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """Memory for images, uint8 [*shape, side, side, 3], and in a worker where there is a free
        slot, which one: (key of its Slots, slot)."""
        worker = get_worker_info()
        slot = self.slots.take(worker.id) if worker is not None and self.slots else None
        if slot is None or self.slots is None:
            return self.empty(math.prod(shape), side).view(*shape, side, side, 3), None
        return self.slots.tensor(slot, (*shape, side, side, 3)), (self.slots.key, slot)

    def labels(self, samples: np.ndarray) -> torch.Tensor:
        """Class indices, int64, of sample numbers."""
        return torch.from_numpy(self.manifest.lazy_index.rows(samples)["label"].astype(np.int64))

    def _handle(self, shard: int) -> int:
        if shard in self.handles:
            self.handles.move_to_end(shard)
            return self.handles[shard]
        if len(self.handles) >= _OPEN_SHARDS:
            os.close(self.handles.popitem(last=False)[1])
        path = self.manifest.path(shard)
        self.handles[shard] = self._open(path)
        size, listed = os.fstat(self.handles[shard]).st_size, int(self.manifest.table.bytes[shard])
        if size != listed:  # other bytes are at the offsets, perhaps whole images
            raise ManifestError(
                f"{path}: {size} bytes long where the manifest says {listed}; the shard changed "
                "since its manifest was written"
            )
        return self.handles[shard]

    def _open(self, path: str) -> int:
        """Open a shard; where the process may open no more files (ulimit -n), instead of the one
        that was not used for longest, but none of those that are read together."""
        while True:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EMFILE or len(self.handles) < _TOGETHER:
                    what = f"this shard cannot be read ({error.strerror})"
                    raise ManifestError(f"{path}: {what}") from error
            os.close(self.handles.popitem(last=False)[1])


def _box(choose: Choose, width: int, height: int) -> tuple[float, ...]:
    """A row of the boxes of decode_many; zeros for a file that it is not to decode."""
    if not width:
        return (0.0,) * 6
    box, flip = choose(width, height)
    return box.left, box.top, box.right, box.bottom, box.inside, flip

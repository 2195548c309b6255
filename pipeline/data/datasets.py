"""The batches of a rank by their number, as a worker process makes them: it reads the bytes of a
sample at its offset, decodes, crops and flips them into a uint8 batch."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.data.batch import Batch, LoaderConfig
from pipeline.data.crops import CentreCrop, Crop, side_at
from pipeline.data.jpeg import Choose
from pipeline.data.order import CROPS, SECOND_CROPS, Order, random_bits
from pipeline.data.reader import Reader, SampleError
from shard_tools.manifest import Manifest, ManifestError

_REPLACEMENTS = 16  # samples tried in place of one that will not decode
_AHEAD = 32  # steps ahead of which a remote shard is fetched at least


class TrainBatches(Dataset):
    """Micro-batch number t of a rank: step t // micro-batches per step."""

    def __init__(
        self, reader: Reader, order: Order, config: LoaderConfig, rank: int, world: int, until: int
    ) -> None:
        self.until, self.ahead = until, steps_ahead(order, reader.manifest, config, world)
        self.begun = False
        self.reader, self.order, self.crop = reader, order, config.crop
        self.sizes = config.sizes or ((until, config.crop.image_size),)
        self.micro_batch, self.first = config.micro_batch, rank * order.batch_size // world
        self.per_step = order.batch_size // (world * config.micro_batch)
        self.on_error, self.augment = config.on_error, config.augment
        self.streams = (CROPS, SECOND_CROPS) if config.second_crop else (CROPS,)
        self.images = config.micro_batch * len(self.streams)  # in a batch

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"order": self.order.numbers}  # its sizes are in the manifest

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.order = Order.of(self.reader.manifest.table, *state["order"])

    def __getitem__(self, task: int) -> Batch | Exception:
        try:
            return self._batch(task)
        except (SampleError, ManifestError) as error:
            return error  # raised again by the Loader, so that it stays one sentence

    def _batch(self, task: int) -> Batch:
        step, micro = divmod(task, self.per_step)
        epoch, within = divmod(step, self.order.steps)
        first = self.first + micro * self.micro_batch
        samples, keys = self.order.samples(epoch, within, first, first + self.micro_batch)
        self._fetch_ahead(step, first, samples)
        shape = len(self.streams), self.micro_batch
        room, slot = self.reader.room(*shape, side=side_at(self.sizes, step))
        images, faults = list(room), []
        pixels = [image.numpy() for image in images]
        chosen = [[self._choose(epoch, s, key) for s in self.streams] for key in keys.tolist()]
        for place in np.flatnonzero(~self.reader.decode_all(samples, chosen, pixels)).tolist():
            try:
                self._decode(epoch, samples[place], keys[place], [p[place] for p in pixels])
            except SampleError as error:
                if self.on_error == "fail":
                    raise
                faults.append(str(error))
                samples[place], keys[place] = self._replace(
                    epoch, within, first + place, [p[place] for p in pixels], error
                )
        if self.augment is not None:
            for place, key in enumerate(keys.tolist()):
                for view in range(len(self.streams)):
                    self.augment(pixels[view][place], epoch, key, view)
        return Batch(
            images[0], self.reader.labels(samples), torch.from_numpy(samples),
            torch.from_numpy(keys), epoch, step, len(faults), tuple(faults),
            images[1] if len(images) > 1 else None, slot,
        )  # fmt: skip

    def _fetch_ahead(self, step: int, first: int, samples: np.ndarray) -> None:
        """Begin to fetch the remote shards of a later step; a process that starts first fetches
        those of `samples`, its first batch."""
        cache = self.reader.cache
        if cache is None:
            return
        later = divmod(min(step + self.ahead, self.until - 1), self.order.steps)
        soon, _ = self.order.samples(*later, first, first + self.micro_batch)
        for batch in (soon,) if self.begun else (samples, soon):
            for shard in dict.fromkeys(self.reader.shard(sample) for sample in batch.tolist()):
                cache.fetch_ahead(shard)
        self.begun = True

    def _decode(self, epoch: int, sample: int, key: int, outs: list[np.ndarray]) -> None:
        """Write the crops of a sample, one per stream of random numbers."""
        for stream, out in zip(self.streams, outs, strict=True):
            self.reader.decode(int(sample), self._choose(epoch, stream, int(key)), out)

    def _choose(self, epoch: int, stream: int, key: int) -> Choose:
        bits = random_bits(self.order.seed, epoch, stream, key, Crop.UNIFORMS)
        return self.crop.choose(((bits >> np.uint64(11)) * 2.0**-53).tolist())

    def _replace(
        self, epoch: int, step: int, place: int, outs: list[np.ndarray], error: SampleError
    ) -> tuple[int, int]:
        """Decode the next good sample of the same partition instead: the same one for any world
        size, and one whose shard this rank reads anyway."""
        number, inside = divmod(place, self.order.batch_size // self.order.partitions)
        inside += step * (self.order.batch_size // self.order.partitions)
        for offset in range(1, _REPLACEMENTS + 1):
            sample, key = self.order.places(epoch, number, np.array([inside + offset]))
            try:
                self._decode(epoch, sample[0], key[0], outs)
                return sample[0], key[0]
            except SampleError:
                continue
        raise SampleError(f"{error}, nor will the {_REPLACEMENTS} samples after it") from error


class EvalBatches(Dataset):
    """Batch number t of a rank's contiguous share of the samples."""

    def __init__(
        self, reader: Reader, crop: CentreCrop, batch_size: int, low: int, high: int
    ) -> None:
        self.reader, self.crop, self.batch_size = reader, crop, batch_size
        self.low, self.high, self.images = low, high, batch_size

    def __getitem__(self, task: int) -> Batch | Exception:
        first = self.low + task * self.batch_size
        samples = np.arange(first, min(first + self.batch_size, self.high))
        image, slot = self.reader.room(len(samples), side=self.crop.image_size)
        pixels = image.numpy()
        try:
            chosen = [[self.crop]] * len(samples)
            for place in np.flatnonzero(~self.reader.decode_all(samples, chosen, [pixels])):
                self.reader.decode(int(samples[place]), self.crop, pixels[place])
        except (SampleError, ManifestError) as error:
            return error
        numbers = torch.from_numpy(samples)
        return Batch(image, self.reader.labels(samples), numbers, numbers, slot=slot)


def steps_ahead(order: Order, manifest: Manifest, config: LoaderConfig, world: int) -> int:
    """How many steps before they are read remote shards are fetched: a window of them, if the cache
    holds two windows of each partition that this node's ranks serve. All shards of a window are
    needed as it begins; so the store can send them evenly over the window before."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    partitions = -(-order.partitions * min(local, world) // world)
    sizes = manifest.table.bytes
    shards = min(partitions * (2 * order.window + 1), len(sizes))
    if order.draws or shards * int(sizes.max()) > config.cache_bytes:
        return _AHEAD
    in_window = order.window * order.total / len(sizes)
    return max(_AHEAD, math.ceil(in_window / (order.batch_size // order.partitions)))

"""The images of pictures and probes: the same ones, centre-cropped, in every look at a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.crops import CentreCrop, shorter_side
from pipeline.data.reader import Reader, SampleError
from pipeline.data.shard_cache import ShardCache
from shard_tools.manifest import Manifest, is_remote

log = logging.getLogger(__name__)
_REPLACEMENTS = 16  # samples tried in place of one that will not decode


@dataclass(frozen=True)
class Fixed:
    """Images uint8 [n, H, W, 3], their numbers in the manifest and labels, both int64 [n]."""

    image: Tensor
    sample: Tensor
    label: Tensor


def fixed_images(
    manifest: Manifest, wanted: Sequence[int], size: int, on_error: str = "fail"
) -> Fixed:
    """The samples `wanted` of a shard folder, centre-cropped to `size` pixels.

    on_error: `skip` takes for one that will not decode the next one that does and is not wanted
    itself, as long as there is one; `fail` raises its SampleError.
    """
    cache = ShardCache(manifest) if is_remote(manifest.folder) else None
    reader = Reader(manifest, size, "bicubic", "auto", cache)
    crop, image = CentreCrop(size, shorter_side(size)), reader.empty(len(wanted))
    numbers, taken = [], set(wanted)
    for place, number in enumerate(wanted):
        out = image[place].numpy()
        try:
            reader.decode(number, crop, out)
        except SampleError as error:
            if on_error == "fail":
                raise
            log.warning("skipped: %s", error)
            number = _next(reader, crop, number, taken, out, error)
            taken.add(number)
        numbers.append(number)
    reader.close()
    samples = np.array(numbers, np.int64)
    return Fixed(image, torch.from_numpy(samples), reader.labels(samples))


def _next(
    reader: Reader, crop: CentreCrop, number: int, taken: set[int], out: np.ndarray,
    error: SampleError,
) -> int:  # fmt: skip
    """Decode the first good sample after `number` that is not taken; its number."""
    total = reader.manifest.samples
    after = [(number + step) % total for step in range(1, total)]
    for other in [n for n in after if n not in taken][:_REPLACEMENTS]:
        try:
            reader.decode(other, crop, out)
        except SampleError:
            continue
        return other
    raise SampleError(f"{error}, nor will the samples after it")

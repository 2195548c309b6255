"""timm's RandAugment after the crop: for finetuning, and for pretraining on few images."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment

from pipeline.errors import UserError


class RandAugment:
    """timm's RandAugment on one uint8 picture, keyed by (seed, epoch, sample, view).

    policy: as in `rand-m9-mstd0.5-inc1`. mean: in 0 … 1, the colour of what moves in from
    outside. Raises UserError for a policy that timm does not read.
    """

    def __init__(self, policy: str, size: int, mean: tuple[float, ...], seed: int) -> None:
        settings = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(min(255, round(255 * m)) for m in mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            self.transform = auto_augment.rand_augment_transform(policy, settings)
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"randaugment {policy!r} is not a policy of timm such as "
                f"rand-m9-mstd0.5-inc1 ({type(error).__name__})"
            ) from None
        for op in self.transform.ops:
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
        self.seed = seed

    def __call__(self, pixels: np.ndarray, epoch: int, key: int, view: int) -> None:
        """Augment uint8 [S, S, 3] in place; the global generators are left as they were."""
        states = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from them
        numbers = (self.seed, epoch, key, view)
        seeds = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))  # noqa: NPY002
        try:
            pixels[:] = np.asarray(self.transform(Image.fromarray(pixels)))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _posterize(image: Image.Image, bits: int, **given: Any) -> Image.Image:
    """timm's, which asks for 0 bits at magnitude 10: black, an error since Pillow 13."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits, **given)

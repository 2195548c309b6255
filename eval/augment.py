"""Finetuning's augmentations, all of them timm's: RandAugment, random erasing, mixup and cutmix."""

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor


def seed_all(*numbers: int) -> None:
    """Seed `random`, numpy's and torch's global generators, which timm draws from, by a tuple."""
    state = np.random.SeedSequence(numbers).generate_state(3, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002 - timm draws from the global generator
    torch.manual_seed(int(state[2]))


class RandAugment:
    """timm's RandAugment on uint8 images, keyed by (seed, epoch, sample): the same on any rank."""

    def __init__(self, policy: str, size: int, mean: list[float], seed: int) -> None:
        fill = tuple(min(255, round(255 * m)) for m in mean)
        settings: dict[str, Any] = {"translate_const": int(size * 0.45), "img_mean": fill}
        settings["interpolation"] = Image.Resampling.BICUBIC
        self.transform = rand_augment_transform(policy, settings) if policy else None
        self.seed = seed

    def __call__(self, image: Tensor, sample: Tensor, epoch: int) -> Tensor:
        """uint8 [b, H, W, 3] and the samples' numbers int64 [b] → uint8 [b, H, W, 3]."""
        if self.transform is None:
            return image
        result = torch.empty_like(image)
        for place, number in enumerate(sample.tolist()):
            seed_all(self.seed, epoch, number)
            picture = self.transform(Image.fromarray(image[place].numpy()))
            result[place] = torch.from_numpy(np.array(picture))
        return result


def make_erasing(probability: float, device: torch.device) -> RandomErasing | None:
    """Random erasing of normalised pixels: one rectangle, filled with normal noise per pixel."""
    if not probability:
        return None
    return RandomErasing(probability, mode="pixel", max_count=1, device=str(device))


def make_mixup(*, mixup: float, cutmix: float, smoothing: float, classes: int) -> Mixup:
    """Mixup and cutmix of whole batches: always one of the two, each with probability 1/2.

    Where only one is on, that one; where none is, it only smooths the labels (probability 0).
    """
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=1.0 if mixup or cutmix else 0.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=smoothing,
        num_classes=classes,
    )

"""Finetuning's augmentations of batches, all of them timm's: random erasing, mixup and cutmix."""

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing


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

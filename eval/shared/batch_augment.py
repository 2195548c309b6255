"""Finetuning's augmentations of batches, all of them timm's: random erasing, mixup and cutmix."""

from collections.abc import Callable
from functools import partial

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

# Pixels [b, 3, H, W] and labels [b] → pixels, soft targets fp32 [b, classes].
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_erasing(probability: float, device: torch.device) -> RandomErasing | None:
    """Random erasing of normalised pixels: one rectangle, filled with normal noise per pixel."""
    if not probability:
        return None
    return RandomErasing(probability, mode="pixel", max_count=1, device=str(device))


def smooth(
    pixels: Tensor, label: Tensor, *, classes: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The pixels as they are and smoothed labels."""
    return pixels, mixup_target(label, classes, smoothing=smoothing)


def make_mixup(*, mixup: float, cutmix: float, smoothing: float, classes: int) -> Mix:
    """Mixup and cutmix of full batches, which must be even: always one of the two, each with
    probability 1/2.

    Where only one is on, that one; where none is, labels are smoothed, at any batch.
    """
    if not mixup and not cutmix:
        return partial(smooth, classes=classes, smoothing=smoothing)
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=smoothing,
        num_classes=classes,
    )

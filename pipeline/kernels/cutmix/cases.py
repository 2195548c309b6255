"""Calls of `cutmix` for the report, the benches and the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.kernels.cases import Book, Case, Sizes

PHASE = "cutmix"


def _inputs(s: Sizes) -> Callable[[], Any]:
    image, sample = s.image(), s.sample()
    return lambda: kernels.cutmix(image, sample, 1.0, seed=0, epoch=0, view=0)


CASES = (Case("cutmix", _inputs, kernels=("cutmix",), wide=("cutmix",), typed=False),)


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch that reads and writes an image."""

    def run(image: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        book.add(0, 2 * image.numel())
        return torch.empty_like(image, memory_format=torch.contiguous_format)

    return run

"""Calls of `select_visible` for the report, the benches and the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline import kernels
from pipeline.kernels.cases import Book, Case, Sizes, Traffic, size, uncounted

PHASE = "masks"


def _inputs(s: Sizes) -> Callable[[], Any]:
    priority = torch.randint(0, 2**32, (s.batch, s.length), device=s.device)
    return lambda: kernels.select_visible(priority, s.keep)


CASES = (Case("select_visible", _inputs, kernels=("select_visible",), typed=False),)


def traffic(s: Sizes) -> Traffic:
    """The int64 priorities in, two int32 tables out."""
    total = s.batch * s.length * (8 + 4 + 4)
    return Traffic(total, total, total)


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch that reads priorities and writes its tables."""

    def run(priority: torch.Tensor, visible: int) -> Any:
        tables = uncounted(book, op)(priority, visible)
        book.add(0, size(priority, *tables))
        return tables

    return run

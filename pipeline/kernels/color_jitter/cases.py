"""Calls of `color_jitter` for the report, the benches and the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.kernels.cases import Book, Case, Sizes

PHASE = "jitter"


def _inputs(visible: bool) -> Callable[[Sizes], Callable[[], Any]]:
    def build(s: Sizes) -> Callable[[], Any]:
        image = s.image()
        parameters = kernels.jitter_parameters(s.sample(), seed=0, epoch=0, view=0)
        where: dict[str, Any] = (
            {"visible": s.positions(0, s.keep), "patch": s.patch} if visible else {}
        )
        return lambda: kernels.color_jitter(image, *parameters, **where)

    return build


def _parameters(s: Sizes) -> Callable[[], Any]:
    sample = s.sample()
    return lambda: kernels.jitter_parameters(sample, seed=0, epoch=0, view=0)


CASES = (
    *(
        Case(
            f"color_jitter {where}",
            _inputs(where == "visible"),
            kernels=("color_jitter_sum", "color_jitter"),
            typed=False,
        )
        for where in ("whole", "visible")
    ),
    Case("jitter_parameters", _parameters, kernels=("jitter_parameters",), typed=False),
)


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch that reads what is shown and writes an image."""

    def run(image: Tensor, *parameters: Any, **keywords: Any) -> Tensor:
        visible, patch = keywords.get("visible"), keywords.get("patch")
        seen = image.numel() if visible is None else visible.numel() * patch * patch * 3
        book.add(0, seen + image.numel())
        return torch.empty_like(image)

    return run

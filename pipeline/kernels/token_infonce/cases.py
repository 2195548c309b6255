"""Calls of `token_infonce` for the report, the benches and the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.kernels.cases import Book, Case, Sizes, launch, size

PHASE = "loss"


def _inputs(s: Sizes) -> Callable[[], Any]:
    query, key = s.leaf(s.batch, s.length, s.width), s.leaf(s.batch, s.length, s.width)
    return lambda: kernels.token_infonce(
        query, key, temperature=0.2, negatives="position", offset=0
    )[0]


CASES = (
    Case(
        "token_infonce position",
        _inputs,
        kernels=("inverse_norm", "token_infonce", "token_infonce_backward"),
        gradient=True,
    ),
)


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch forward and one backward, of two matrix products."""

    def run(query: Tensor, key: Tensor, *, negatives: str, **_: Any) -> tuple[Tensor, Tensor]:
        batch, tokens, width = query.shape
        against = {"position": len(key), "image": tokens, "all": len(key) * tokens}[negatives]
        flops = 2 * batch * tokens * against * width
        cost, back = (flops, size(query, key)), (2 * flops, size(query, key, query))
        return launch(book, torch.empty(()), [query], cost, back), torch.empty(2)

    return run

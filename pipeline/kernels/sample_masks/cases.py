"""Calls of `sample_masks` for the report, the benches and the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline import kernels
from pipeline.kernels.cases import Book, Case, Sizes, Traffic, size, uncounted

PHASE = "masks"


def _inputs(policy: str, second: Callable[[Sizes], int]) -> Callable[[Sizes], Callable[[], Any]]:
    def build(s: Sizes) -> Callable[[], Any]:
        sample, visible = s.sample(), (s.keep, second(s))
        return lambda: kernels.sample_masks(
            sample, seed=5, epoch=3, length=s.length, visible=visible, policy=policy
        )

    return build


CASES = (
    Case(
        "sample_masks complement",
        _inputs("complement", lambda s: 0),
        kernels=("sample_masks",),
        typed=False,
    ),
    Case(
        "sample_masks independent",
        _inputs("independent", lambda s: s.length - s.keep),
        kernels=("sample_masks",),
        typed=False,
    ),
)


def traffic(s: Sizes) -> Traffic:
    """Under `complement`: the sample numbers in, four int32 tables out; the epoch, which every
    program reads, is in the cache."""
    total = s.batch * (8 + 4 * (s.length + s.length + s.length))
    return Traffic(total + 8 * s.batch, total, total)


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch that writes its tables."""

    def run(*args: Any, **keywords: Any) -> Any:
        masks = uncounted(book, op)(*args, **keywords)
        book.add(0, size(*masks))
        return masks

    return run

"""Calls of `token_infonce` for the report, the benches and the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import kernels
from pipeline.kernels.cases import Book, Bytes, Case, Sizes, Traffic, launch, size

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


def materialised(s: Sizes) -> None:
    """The usual writing, keys without a gradient: all cosines of a position, cross-entropy."""
    query, key = s.empty(s.batch, s.length, s.width, grad=True), s.empty(s.batch, s.length, s.width)
    q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = torch.einsum("btc,gtc->tbg", q, k).float() / 0.2
    own = torch.empty(s.length * s.batch, dtype=torch.int64, device="meta")
    F.cross_entropy(logits.flatten(0, 1), own).backward()


def reference(s: Sizes) -> None:
    """Ours in blocks of cosines; backward for the queries."""
    query, key = s.empty(s.batch, s.length, s.width, grad=True), s.empty(s.batch, s.length, s.width)
    kernels.token_infonce(query, key, temperature=0.2, negatives="position", offset=0)[0].backward()


def traffic(s: Sizes) -> dict[str, Traffic]:
    """The launches of `negatives: position`, keys without a gradient: norms, forward, dq."""
    from pipeline.kernels.token_infonce.triton import _backward_tile, _tile

    vectors, floats = s.batch * s.length * s.width * s.element, s.batch * s.length * 4
    norms = Traffic(*[vectors + floats] * 3)

    def tiles(tile: dict[str, int]) -> tuple[int, int]:
        return -(-s.batch // tile["M"]), -(-s.batch // tile["N"])

    rows, columns = tiles(_tile(s.dtype, s.width))
    least = 2 * (vectors + floats) + 3 * floats
    # Queries in every tile of a row of tiles, keys in every one of a column.
    forward = (rows + columns) * vectors + floats + rows * floats + 3 * floats
    tile = _backward_tile(s.dtype, s.width)
    rows, columns = tiles(tile)
    programs = -(-s.width // (tile["OUT"] * tile["PARTS"]))
    scores = programs * ((rows + columns) * vectors + (2 + rows) * floats + 4 * rows * s.length)
    sums = (rows + 2) * vectors  # keys again, the queries' own direction, the gradient
    once = 3 * (vectors + floats) + 4
    return {
        "norms": norms,
        "forward": Traffic(forward, least, least),
        "backward": Traffic(scores + sums, once, once),
    }


def _launches(s: Sizes, *_: Any) -> list[Traffic]:
    made = traffic(s)
    return [made["norms"], *made.values()]  # of queries and of keys


BYTES = {"token_infonce": Bytes(materialised, reference, _launches)}


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch forward and one backward, of two matrix products."""

    def run(query: Tensor, key: Tensor, *, negatives: str, **_: Any) -> tuple[Tensor, Tensor]:
        batch, tokens, width = query.shape
        against = {"position": len(key), "image": tokens, "all": len(key) * tokens}[negatives]
        flops = 2 * batch * tokens * against * width
        cost, back = (flops, size(query, key)), (2 * flops, size(query, key, query))
        return launch(book, torch.empty(()), [query], cost, back), torch.empty(2)

    return run

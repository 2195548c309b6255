"""Calls of `place_tokens` for the report, the benches and the tests; bytes from index ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.kernels.cases import Book, Bytes, Case, Sizes, Traffic, launch, size

PHASE = "place"


def _inputs(s: Sizes) -> Callable[[], Any]:
    tokens, mask_token = s.leaf(s.batch, s.keep + 1, s.decoder), s.leaf(s.decoder)
    inverse, position = s.positions(0, s.length), s.leaf(s.length + 1, s.decoder).detach()
    return lambda: kernels.place_tokens(tokens, inverse, mask_token, position, prefix=1)


_WIDE = ("place_tokens", "place_tokens_backward")
_KERNELS = (*_WIDE, "sum_partials")
CASES = (Case("place_tokens", _inputs, kernels=_KERNELS, gradient=True, wide=_WIDE),)


def mae_place(s: Sizes, backward: bool = False) -> None:
    """Repeat the mask token, append, unshuffle, put the cls token back, add positions."""
    tokens = s.empty(s.batch, s.keep + 1, s.decoder, grad=backward)
    mask_token = s.empty(1, 1, s.decoder, grad=backward)
    position = s.empty(1, s.length + 1, s.decoder)
    restore = torch.empty(s.batch, s.length, dtype=torch.int64, device="meta")
    masks = mask_token.repeat(s.batch, s.length - s.keep, 1)
    body = torch.cat([tokens[:, 1:], masks], dim=1)
    body = torch.gather(body, 1, restore.unsqueeze(-1).repeat(1, 1, s.decoder))
    out = torch.cat([tokens[:, :1], body], dim=1) + position
    if backward:
        out.backward(torch.empty_like(out))


def reference_place(s: Sizes, backward: bool = False) -> None:
    """Place the tokens once."""
    tokens = s.empty(s.batch, s.keep + 1, s.decoder, grad=backward)
    mask_token = s.empty(s.decoder, grad=backward)
    inverse = torch.empty(s.batch, s.length, dtype=torch.int32, device="meta")
    position = s.empty(s.length + 1, s.decoder)
    out = kernels.place_tokens(tokens, inverse, mask_token, position, prefix=1)
    if backward:
        out.backward(torch.empty_like(out))


def traffic(s: Sizes, prefix: int = 1) -> dict[str, Traffic]:
    """Forward and backward of place_tokens, and the sum of backward's partial sums."""
    from pipeline.kernels.place_tokens.triton import GRAD_ROWS, ROWS, launch_of

    rows = prefix + s.length
    (in_rows, in_d, in_batch), (in_grad, _, grad_batch) = (
        launch_of(s.batch, s.length, prefix, s.decoder, of)[0] for of in (ROWS, GRAD_ROWS)
    )
    tiles, grad_tiles = in_rows * in_batch, in_grad * grad_batch
    tokens = s.batch * (prefix + s.keep) * s.decoder * s.element
    sequence = s.batch * rows * s.decoder * s.element
    inverse, row = s.batch * s.length * 4, s.decoder * s.element
    forward = tokens + sequence + inverse
    backward = tokens + sequence + inverse
    partial = grad_tiles * s.decoder * 4
    again = inverse * (in_d - 1)
    table = rows * row
    return {
        "forward": Traffic(
            forward + again + table * in_batch + row * tiles,
            forward + table + row,
            forward + table + row,
        ),
        "backward": Traffic(
            backward + again + partial,
            backward + partial,
            backward + row,
        ),
        "sum": Traffic(partial + row, partial + row, partial + row),
    }


BYTES = {
    "place_tokens": Bytes(mae_place, reference_place, lambda s, *_: [traffic(s)["forward"]]),
    "place_tokens with backward": Bytes(
        lambda s: mae_place(s, True),
        lambda s: reference_place(s, True),
        lambda s, *_: list(traffic(s).values()),
    ),
}


def as_launch(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op as one launch forward and one backward."""

    def run(
        tokens: Tensor, inverse: Tensor, mask_token: Tensor, position: Tensor, **_: Any
    ) -> Tensor:
        out = torch.empty(len(tokens), *position.shape, dtype=tokens.dtype)
        moved = size(tokens, inverse, out)
        return launch(book, out, [tokens, mask_token], (0, moved + size(position)), (0, moved))

    return run

"""Triton kernels of `place_tokens`.

Program (n, d, c) owns rows n and channels d of the sequence for the samples of chunk c: position
and mask token are read once and serve every sample of the chunk. Prefix rows are treated as
visible tokens. Backward walks the same tiles: rows of visible tokens are copied to their slot,
rows of hidden places are added up to one partial sum per program. A second kernel adds up the
partial sums, always in the same order.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16  # samples per program, at most
# Fewer samples each where programs would be fewer than six for each of an H100's 132
# multiprocessors, which have then too few loads under way to hide how long a load takes.
PROGRAMS = 6 * 132
ROWS = 2  # of the sequence
GRAD_ROWS = 4  # of backward's, which leaves a partial sum per program
SUM_ROWS = 1024  # partial sums that a program has under way at the most
SUM_WIDTH = 8  # channels of it: 32 bytes, a sector


@triton.jit
def _slot(inverse_ptr, b, n, LENGTH: tl.constexpr, PREFIX: tl.constexpr):
    """Row of tokens that belongs in row n of sample b; at least the number of tokens if hidden."""
    read = (n >= PREFIX) & (n < PREFIX + LENGTH)
    inverse = tl.load(inverse_ptr + b * LENGTH + n - PREFIX, mask=read, other=0)
    return tl.where(n < PREFIX, n, inverse + PREFIX)


@triton.jit
def place_tokens_kernel(
    tokens_ptr, inverse_ptr, mask_token_ptr, position_ptr, out_ptr, batch, tokens,
    LENGTH: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * D + tl.arange(0, D)
    tile = (n < PREFIX + LENGTH)[:, None] & (d < WIDTH)[None, :]
    inside = n[:, None] * WIDTH + d[None, :]
    position = tl.load(position_ptr + inside, mask=tile, other=0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + d, mask=d < WIDTH, other=0).to(tl.float32)
    hidden = position + mask_token[None, :]
    first = tl.program_id(2) * CHUNK
    for b in range(first, tl.minimum(first + CHUNK, batch)):
        slot = _slot(inverse_ptr, b, n, LENGTH, PREFIX)
        shown = (slot < tokens)[:, None]
        row = (tl.cast(b, tl.int64) * tokens + slot)[:, None] * WIDTH + d[None, :]
        token = tl.load(tokens_ptr + row, mask=tile & shown, other=0).to(tl.float32)
        out = tl.where(shown, token + position, hidden).to(out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + tl.cast(b, tl.int64) * ((PREFIX + LENGTH) * WIDTH) + inside, out, mask=tile
        )


@triton.jit
def place_tokens_backward_kernel(
    grad_ptr, inverse_ptr, tokens_grad_ptr, mask_grad_ptr, batch, tokens,
    LENGTH: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * D + tl.arange(0, D)
    tile = (n < PREFIX + LENGTH)[:, None] & (d < WIDTH)[None, :]
    inside = n[:, None] * WIDTH + d[None, :]
    total = tl.zeros((ROWS, D), tl.float32)
    first = tl.program_id(2) * CHUNK
    for b in range(first, tl.minimum(first + CHUNK, batch)):
        slot = _slot(inverse_ptr, b, n, LENGTH, PREFIX)
        shown = (slot < tokens)[:, None]
        start = tl.cast(b, tl.int64) * ((PREFIX + LENGTH) * WIDTH)
        grad = tl.load(grad_ptr + start + inside, mask=tile, other=0)
        row = (tl.cast(b, tl.int64) * tokens + slot)[:, None] * WIDTH + d[None, :]
        tl.store(tokens_grad_ptr + row, grad, mask=tile & shown)
        total += tl.where(shown, 0.0, grad.to(tl.float32))
    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tl.store(mask_grad_ptr + program * WIDTH + d, tl.sum(total, 0), mask=d < WIDTH)


@triton.jit
def sum_partials_kernel(
    partial_ptr, out_ptr, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    d = tl.program_id(0) * D + tl.arange(0, D)
    total = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (d < WIDTH)[None, :]
        total += tl.load(partial_ptr + row[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=d < WIDTH)


def launch_of(
    batch: int, length: int, prefix: int, width: int, rows: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid, tiles of rows × of channels × chunks of samples, and the kernels' constants."""
    block = min(512, triton.next_power_of_2(width))
    tiles = triton.cdiv(prefix + length, rows), triton.cdiv(width, block)
    chunk = CHUNK
    while chunk > 1 and tiles[0] * tiles[1] * triton.cdiv(batch, chunk) < PROGRAMS:
        chunk //= 2
    sizes = {"LENGTH": length, "PREFIX": prefix, "WIDTH": width}
    settings = {**sizes, "CHUNK": chunk, "ROWS": rows, "D": block, "num_warps": 4}
    return (*tiles, triton.cdiv(batch, chunk)), settings


@torch.library.custom_op("relaxmim::place_tokens", mutates_args=())
def _place_tokens(
    tokens: Tensor, inverse: Tensor, mask_token: Tensor, position: Tensor, prefix: int
) -> Tensor:
    batch, count, width = tokens.shape
    length = inverse.shape[1]
    out = tokens.new_empty(batch, prefix + length, width)
    grid, settings = launch_of(batch, length, prefix, width, ROWS)
    place_tokens_kernel[grid](
        tokens.contiguous(), inverse.contiguous(), mask_token.contiguous(), position.contiguous(),
        out, batch, count, **settings,
    )  # fmt: skip
    return out


@_place_tokens.register_fake
def _(tokens: Tensor, inverse: Tensor, mask_token: Tensor, position: Tensor, prefix: int) -> Tensor:
    return tokens.new_empty(tokens.shape[0], prefix + inverse.shape[1], tokens.shape[2])


@torch.library.custom_op("relaxmim::place_tokens_backward", mutates_args=())
def _place_tokens_backward(
    grad: Tensor, inverse: Tensor, prefix: int, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(d tokens, d mask_token in `dtype`)."""
    batch, _, width = grad.shape
    grid, settings = launch_of(batch, inverse.shape[1], prefix, width, GRAD_ROWS)
    tokens_grad = grad.new_empty(batch, count, width)
    partial = grad.new_empty(grid[0] * grid[2], width, dtype=torch.float32)
    place_tokens_backward_kernel[grid](
        grad.contiguous(), inverse.contiguous(), tokens_grad, partial, batch, count, **settings
    )
    mask_grad = grad.new_empty(width, dtype=dtype)
    sum_partials_kernel[(triton.cdiv(width, SUM_WIDTH),)](
        partial, mask_grad, len(partial), WIDTH=width, D=SUM_WIDTH,
        ROWS=min(SUM_ROWS, triton.next_power_of_2(len(partial))), num_warps=16,
    )  # fmt: skip
    return tokens_grad, mask_grad


@_place_tokens_backward.register_fake
def _(
    grad: Tensor, inverse: Tensor, prefix: int, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, _, width = grad.shape
    return grad.new_empty(batch, count, width), grad.new_empty(width, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, inverse, mask_token, position, prefix = inputs
    ctx.save_for_backward(inverse)
    ctx.prefix, ctx.count = prefix, tokens.shape[1]
    ctx.dtypes = mask_token.dtype, position.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (inverse,) = ctx.saved_tensors
    mask_dtype, position_dtype = ctx.dtypes
    tokens, mask_token = _place_tokens_backward(grad, inverse, ctx.prefix, ctx.count, mask_dtype)
    position = None
    if ctx.needs_input_grad[3]:  # a learned position: rare, so it is left to PyTorch
        position = grad.sum(0, dtype=torch.float32).to(position_dtype)
    return tokens, None, mask_token, position, None


_place_tokens.register_autograd(_backward, setup_context=_setup)


def place_tokens_triton(
    tokens: Tensor, inverse: Tensor, mask_token: Tensor, position: Tensor, *, prefix: int
) -> Tensor:
    """`place_tokens` by the kernel; arguments already checked."""
    return _place_tokens(tokens, inverse, mask_token, position, prefix)

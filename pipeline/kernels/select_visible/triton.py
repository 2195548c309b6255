"""Triton kernel of `select_visible`: one program chooses and writes one sample.

The smallest keys are found by halving the range that holds the last of them, and positions are
written in ascending order by a running count; all in registers.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 16  # that a lane of a program holds: more warps would wait for one another at every count


def warps_of(block: int) -> int:
    """Warps of a program that holds `block` keys."""
    return min(16, max(1, block // (32 * KEYS)))


@triton.jit
def slots(priority, position, LENGTH: tl.constexpr, VISIBLE: tl.constexpr):
    """(shown, running count of shown positions) of the VISIBLE smallest keys.

    The first bound that VISIBLE keys do not exceed ends the search: for random keys after about
    log2(LENGTH) steps. Keys differ, so there is one.
    """
    key = tl.where(position < LENGTH, (priority.to(tl.int64) << 16) | position, 1 << 62)
    low, high = tl.min(key), tl.max(tl.where(position < LENGTH, key, 0))
    while low < high:
        middle = (low + high) >> 1
        count = tl.sum((key <= middle).to(tl.int32))
        low = tl.where(count < VISIBLE, middle + 1, tl.where(count == VISIBLE, middle, low))
        high = tl.where(count < VISIBLE, high, middle)
    shown = key <= high
    return shown, tl.cumsum(shown.to(tl.int32), 0)


@triton.jit
def select_visible_kernel(
    priority_ptr, visible_ptr, hidden_ptr, inverse_ptr,
    LENGTH: tl.constexpr, VISIBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b writes row b of every output."""
    b = tl.program_id(0)
    position = tl.arange(0, BLOCK)
    inside = position < LENGTH
    HIDDEN: tl.constexpr = LENGTH - VISIBLE
    priority = tl.load(priority_ptr + b * LENGTH + position, mask=inside, other=0)
    shown, count = slots(priority, position, LENGTH, VISIBLE)
    inverse = tl.where(shown, count - 1, VISIBLE + position - count)
    tl.store(inverse_ptr + b * LENGTH + position, inverse, mask=inside)
    tl.store(visible_ptr + b * VISIBLE + count - 1, position, mask=shown)
    tl.store(hidden_ptr + b * HIDDEN + position - count, position, mask=inside & ~shown)


def _outputs(priority: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = priority.shape
    widths = (visible, length - visible, length)
    first, second, third = (priority.new_empty(batch, w, dtype=torch.int32) for w in widths)
    return first, second, third


@torch.library.custom_op("relaxmim::select_visible", mutates_args=())
def _select_visible(priority: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    out = _outputs(priority, visible)
    length = priority.shape[1]
    block = max(4, triton.next_power_of_2(length))
    select_visible_kernel[(len(priority),)](
        priority.contiguous(), *out, LENGTH=length, VISIBLE=visible, BLOCK=block,
        num_warps=warps_of(block),
    )  # fmt: skip
    return out


@_select_visible.register_fake
def _(priority: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(priority, visible)


def select_visible_triton(priority: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """`select_visible` by the kernel; arguments already checked."""
    shown, hidden, inverse = _select_visible(priority, visible)
    return shown, hidden, inverse

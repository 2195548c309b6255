"""Triton kernel of `select_visible`: one program sorts and writes one sample.

The sort stays in registers, and positions are written in ascending order by a running count.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def slots(priority, position, LENGTH: tl.constexpr, VISIBLE: tl.constexpr):
    """(shown, running count of shown positions) of the VISIBLE smallest keys."""
    key = (priority.to(tl.int64) << 16) | position
    key = tl.where(position < LENGTH, key, 1 << 62)
    smallest = tl.sort(key)
    last = tl.sum(tl.where(position == VISIBLE - 1, smallest, 0))
    shown = key <= last
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
    select_visible_kernel[(len(priority),)](
        priority.contiguous(), *out, LENGTH=length, VISIBLE=visible,
        BLOCK=max(4, triton.next_power_of_2(length)), num_warps=4,
    )  # fmt: skip
    return out


@_select_visible.register_fake
def _(priority: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(priority, visible)


def select_visible_triton(priority: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """`select_visible` by the kernel; arguments already checked."""
    shown, hidden, inverse = _select_visible(priority, visible)
    return shown, hidden, inverse

"""Which of torch's attention kernels runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Tokens up to which a GPU takes the memory-efficient kernel first. Others work on tiles of more
# keys than there are: both passes of 256 images of 50 tokens take 161 us on an H100, 249 by
# cuDNN's, which torch takes there, and 436 by flash attention, which it takes elsewhere; of 65
# tokens cuDNN's is ahead.
SHORT = 64
ORDER = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def attention_order(tokens: int, like: Tensor) -> AbstractContextManager[None]:
    """A context in which scaled_dot_product_attention of so many tokens, on the device of `like`,
    takes the fastest kernel."""
    if tokens > SHORT or not like.is_cuda:
        return nullcontext()
    order: AbstractContextManager[None] = sdpa_kernel(ORDER, set_priority=True)
    return order


def attend_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`attend` in each of so many heads: q [B, R, D], k and v [B, N, D] → [B, R, D]."""
    q, k, v = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    return attend(q, k, v).transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √C) v by the fastest kernel: q [B, H, R, C], k and v [B, H, N, C] →
    [B, H, R, C]."""
    with attention_order(max(q.shape[-2], k.shape[-2]), q):
        return F.scaled_dot_product_attention(q, k, v)

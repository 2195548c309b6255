"""From a priority per patch to the visible set, the masked set and the place of each patch.

With key[b,l] = priority[b,l] << 16 | l (so equal priorities fall back on the position),

    visible[b]   = the K positions with the smallest keys, in ascending order of position
    hidden[b]    = the other L - K positions, in ascending order
    inverse[b,l] = n      if position l is visible number n
                 = K + n  if position l is hidden number n

Tokens carry their positions, so the order has no effect on a result; ascending order reads memory
in order.
"""

import torch
from torch import Tensor

from pipeline.kernels import backend
from pipeline.kernels.select_visible.reference import select_visible_reference


def select_visible(priority: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """Show the `visible` patches of smallest priority of each sample.

    priority: int64 [B,L] in 0 .. 2**46 - 1. Returns (visible int32 [B,K], hidden int32 [B,L-K],
    inverse int32 [B,L]). Raises ValueError for shapes that do not fit.
    """
    if priority.dtype != torch.int64 or priority.dim() != 2:
        raise ValueError(
            f"priority must be int64 [B,L], not {priority.dtype} {list(priority.shape)}"
        )
    length = priority.shape[1]
    if not 1 <= visible <= length < 2**16:
        raise ValueError(f"cannot show {visible} of {length} patches: need 1 <= K <= L < 65536")
    if backend.implementation() == "triton":
        from pipeline.kernels.select_visible.triton import select_visible_triton as run
    else:
        run = select_visible_reference
    return run(priority, visible)

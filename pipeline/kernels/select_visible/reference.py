"""`select_visible` in PyTorch: the CPU path, and what the kernel is tested against."""

import torch
from torch import Tensor


def select_visible_reference(priority: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """`select_visible` in PyTorch; arguments already checked."""
    position = torch.arange(priority.shape[1], device=priority.device)
    key = priority << 16 | position
    shown = key <= key.kthvalue(visible, dim=1, keepdim=True).values
    slot = shown.cumsum(1)
    inverse = torch.where(shown, slot - 1, visible + position - slot)
    order = torch.empty_like(key).scatter_(1, inverse, position.expand_as(key)).to(torch.int32)
    return order[:, :visible].contiguous(), order[:, visible:].contiguous(), inverse.to(torch.int32)

"""`place_tokens` in PyTorch: the CPU path, and what the kernel is tested against."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def place_tokens_reference(
    tokens: Tensor, inverse: Tensor, mask_token: Tensor, position: Tensor, *, prefix: int
) -> Tensor:
    """`place_tokens` in PyTorch; arguments already checked."""
    return _PlaceTokens.apply(tokens, inverse, mask_token, position, prefix)


def _visible_rows(inverse: Tensor, prefix: int, visible: int) -> Tensor:
    """Rows of the flattened output [B*(P+L)] that the visible tokens go to: int64 [B*K]."""
    batch, length = inverse.shape
    position = torch.arange(length, device=inverse.device).expand(batch, length)
    order = torch.empty_like(position, memory_format=torch.contiguous_format)
    order.scatter_(1, inverse.to(torch.int64), position)
    start = torch.arange(batch, device=inverse.device)[:, None] * (prefix + length) + prefix
    return (order[:, :visible] + start).flatten()


class _PlaceTokens(torch.autograd.Function):
    """Written out: autograd's own backward of an indexed read adds up one element at a time."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, inverse: Tensor, mask_token: Tensor, position: Tensor, prefix: int
    ) -> Tensor:
        batch, count, width = tokens.shape
        rows = _visible_rows(inverse, prefix, count - prefix)
        out = tokens.new_empty(batch, len(position), width)
        out[:, :prefix] = tokens[:, :prefix] + position[:prefix]
        out[:, prefix:] = position[prefix:] + mask_token
        shown = position.index_select(0, rows % len(position)).view(batch, -1, width)
        placed = (tokens[:, prefix:] + shown).to(out.dtype)
        out.view(-1, width).index_copy_(0, rows, placed.reshape(-1, width))
        ctx.save_for_backward(inverse, rows)
        ctx.prefix, ctx.visible = prefix, count - prefix
        ctx.dtypes = mask_token.dtype, position.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, rows = ctx.saved_tensors
        batch, _, width = grad.shape
        flat = grad.reshape(-1, width)
        mask_dtype, position_dtype = ctx.dtypes
        tokens = mask_token = position = None
        if ctx.needs_input_grad[0]:
            shown = flat.index_select(0, rows).view(batch, ctx.visible, width)
            tokens = torch.cat([grad[:, : ctx.prefix], shown], dim=1)
        if ctx.needs_input_grad[2]:
            exact = torch.promote_types(grad.dtype, mask_dtype)
            hidden = (inverse >= ctx.visible).to(exact)
            weight = torch.nn.functional.pad(hidden, (ctx.prefix, 0)).flatten()
            mask_token = torch.mv(flat.to(exact).T, weight).to(mask_dtype)
        if ctx.needs_input_grad[3]:
            exact = torch.promote_types(grad.dtype, position_dtype)
            position = grad.sum(0, dtype=exact).to(position_dtype)
        return tokens, None, mask_token, position, None

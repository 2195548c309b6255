"""`embed_visible` in PyTorch: the CPU path, and what the kernel is tested against."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.kernels.patches import gather_patches, normalise


def embed_visible_reference(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    factors: torch.dtype,
) -> Tensor:
    """`embed_visible` in PyTorch; arguments already checked. factors: dtype to multiply in."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    patches = gather_patches(image, visible, weight.shape[-1])
    pixels = normalise(patches, mean, std, exact).to(factors)
    by_value = weight.permute(0, 2, 3, 1).flatten(1)
    if factors == weight.dtype:
        tokens = F.linear(pixels, by_value, bias)
    else:
        tokens = _RoundedProduct.apply(pixels, by_value) + bias
    if position is not None:
        tokens = tokens + F.embedding(visible, position)
    return tokens.to(weight.dtype)


class _RoundedProduct(torch.autograd.Function):
    """x @ weight.T in fp32 with weight, and in backward the gradient, rounded to x's dtype.

    Written out: autograd would round weight's gradient too. x [B,K,V], weight [D,V] -> [B,K,D].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight.to(x.dtype).float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            rounded = grad.to(x.dtype).float().flatten(0, 1)
            return None, (rounded.mT @ x.float().flatten(0, 1)).to(ctx.dtype)

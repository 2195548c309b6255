"""`color_jitter` in PyTorch: the CPU path, and what the kernel is tested against."""

import itertools

import torch
from torch import Tensor

from pipeline.kernels import philox
from pipeline.kernels.patches import gather_patches
from pipeline.kernels.philox import Epoch

ORDERS = tuple(itertools.permutations(range(4)))  # number -> order of the four steps


def color_jitter_reference(
    image: Tensor,
    factors: Tensor,
    order: Tensor,
    apply: Tensor,
    gray: Tensor,
    *,
    visible: Tensor | None,
    patch: int | None,
) -> Tensor:
    """`color_jitter` in PyTorch; arguments already checked."""
    batch, height, width, _ = image.shape
    if visible is None or patch is None:
        pixels = _jitter(image.reshape(batch, -1, 3), factors, order, apply, gray)
        return pixels.view(image.shape)
    patches = gather_patches(image, visible, patch)
    pixels = _jitter(patches.flatten(1, 3), factors, order, apply, gray).view(patches.shape)
    out = image.new_zeros(batch, height // patch, patch, width // patch, patch, 3)
    columns = width // patch
    index = torch.arange(batch, device=image.device)[:, None]
    out[index, visible // columns, :, visible % columns] = pixels
    return out.view(batch, height, width, 3)


def jitter_parameters_reference(
    sample: Tensor,
    *,
    seed: int,
    epoch: Epoch,
    stream: int,
    low: list[float],
    span: list[float],
    probability: float,
    grayscale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`jitter_parameters` in PyTorch: factors low + span u, order, apply, gray."""
    u = philox.uniform(sample, seed=seed, epoch=epoch, stream=stream, count=7)
    factors = torch.stack([b + s * x for b, s, x in zip(low, span, u[:, :4].T, strict=True)], 1)
    order = (u[:, 4] * len(ORDERS)).to(torch.int32)
    return factors, order, u[:, 5] < probability, u[:, 6] < grayscale


def _jitter(pixels: Tensor, factors: Tensor, order: Tensor, apply: Tensor, gray: Tensor) -> Tensor:
    """Jitter uint8 [B,N,3]: at each of four steps the images that share an operation go together.

    The work is done on float planes [B,3,N] holding whole numbers 0 .. 255.
    """
    planes = pixels.mT.to(torch.float32, memory_format=torch.contiguous_format)
    steps = torch.tensor(ORDERS, device=pixels.device)[order.to(torch.int64)]
    for step in range(4):
        for number, operation in enumerate(_OPERATIONS):
            chosen = ((steps[:, step] == number) & apply).nonzero().flatten()
            if len(chosen):
                factor = factors[chosen, number, None]
                planes[chosen] = operation(planes[chosen], factor)
    chosen = gray.nonzero().flatten()
    if len(chosen):
        planes[chosen] = _grey(planes[chosen])[:, None].expand(-1, 3, -1)
    return planes.to(torch.uint8).mT.contiguous()


def _divided(x: Tensor, by: float) -> Tensor:
    """x / by, correctly rounded: CUDA multiplies by the reciprocal of a Python number."""
    return x / x.new_full((), by)


def _grey(planes: Tensor) -> Tensor:
    red, green, blue = planes.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor_()


def _blend(planes: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    factor = factor[..., None]
    return (factor * planes + (1 - factor) * towards).clamp_(0, 255).floor_()


def _brightness(planes: Tensor, factor: Tensor) -> Tensor:
    return planes.mul(factor[..., None]).clamp_(0, 255).floor_()


def _contrast(planes: Tensor, factor: Tensor) -> Tensor:
    # Whole numbers: the sum is exact in float64 whatever the number of pixels.
    total = _grey(planes).sum(1, dtype=torch.float64)
    mean = _divided(total, planes.shape[2]).to(planes.dtype)
    return _blend(planes, mean[:, None, None], factor)


def _saturation(planes: Tensor, factor: Tensor) -> Tensor:
    return _blend(planes, _grey(planes)[:, None], factor)


def _hue(planes: Tensor, factor: Tensor) -> Tensor:
    red, green, blue = _divided(planes, 255).unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    spread = high - torch.minimum(torch.minimum(red, green), blue)
    grey = spread == 0
    saturation = spread / high.masked_fill(grey, 1)
    safe = spread.masked_fill(grey, 1)
    to_red, to_green, to_blue = (high - red) / safe, (high - green) / safe, (high - blue) / safe
    sector = torch.where(
        high == red,
        to_blue - to_green,
        torch.where(high == green, 2 + to_red - to_blue, 4 + to_green - to_red),
    )
    turn = ((_divided(sector, 6) + 1).fmod(1) + factor).remainder(1)
    return _from_hsv(turn, saturation, high)


def _from_hsv(turn: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    floor = (turn * 6).floor()
    part = turn * 6 - floor
    sector = (floor.to(torch.int32) % 6)[:, None]
    p = (value * (1 - saturation)).clamp_(0, 1)
    q = (value * (1 - saturation * part)).clamp_(0, 1)
    t = (value * (1 - saturation * (1 - part))).clamp_(0, 1)
    rows = [
        (value, t, p),
        (q, value, p),
        (p, value, t),
        (p, q, value),
        (t, p, value),
        (value, p, q),
    ]
    out = torch.stack(rows[5], dim=1)
    for number, row in enumerate(rows[:5]):
        out = torch.where(sector == number, torch.stack(row, dim=1), out)
    return out.mul_(255.999).floor_()


_OPERATIONS = (_brightness, _contrast, _saturation, _hue)

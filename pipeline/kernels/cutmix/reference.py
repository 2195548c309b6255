"""`cutmix` in PyTorch: the CPU path, and what the kernel is tested against."""

import torch
from torch import Tensor

from pipeline.kernels import philox
from pipeline.kernels.philox import Epoch


def cutmix_reference(
    image: Tensor,
    sample: Tensor,
    probability: float,
    *,
    seed: int,
    epoch: Epoch,
    stream: int,
    step: int,
) -> Tensor:
    """`cutmix` in PyTorch; arguments already checked. step: how far the neighbour is, 1 or -1."""
    height, width = image.shape[1:3]
    u = philox.uniform(sample, seed=seed, epoch=epoch, stream=stream, count=4)
    side = (1.0 - u[:, :1]).sqrt()

    def inside(centre: Tensor, size: int) -> Tensor:
        half = (side * size).int() // 2
        centre = (centre * size).int()
        pixel = torch.arange(size, device=image.device)
        return (pixel >= centre - half) & (pixel < centre + half)

    box = inside(u[:, 1:2], height)[:, :, None] & inside(u[:, 2:3], width)[:, None, :]
    box &= (u[:, 3] < probability)[:, None, None]
    return torch.where(box[..., None], image.roll(-step, dims=0), image).contiguous()

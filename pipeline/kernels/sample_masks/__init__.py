"""Which patches the two views T1 and T2 show.

Every position l of a sample draws a Philox word w[l]; the K smallest of w[l] << 16 | l (so equal
words fall back on the position) are visible:

    visible = the K positions with the smallest keys, in ascending order of position
    hidden  = the other L - K positions, in ascending order
    inverse[l] = n      if position l is visible number n
               = K + n  if position l is hidden number n

A mask is a pure function of (seed, epoch, sample number, view): the same bits on every device,
for any batch, rank or worker count. MAE keeps the shuffled order; a ViT's tokens carry their
positions, so the order has no effect on the result, and ascending order reads memory in order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels import backend, philox

POLICIES = ("random", "complement", "independent", "none")


class Masks(NamedTuple):
    """Positions of the two views; int32. Of T2 there is nothing (None) under policy `random`."""

    visible1: Tensor  # [B,K1]
    inverse1: Tensor  # [B,L]
    visible2: Tensor | None  # [B,K2]
    inverse2: Tensor | None  # [B,L]
    hidden1: Tensor  # [B,L-K1]


def view_sizes(length: int, visible: tuple[int, int], policy: str) -> tuple[int, int]:
    """(K1, K2) under a policy; ValueError where they contradict it. K2 = 0: what it implies."""
    first, second = visible
    if policy not in POLICIES:
        raise ValueError(f"masking policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    if not 1 <= length < 2**16 or not 1 <= first <= length:
        raise ValueError(f"cannot show {first} of {length} patches: need 1 <= K1 <= L < 65536")
    implied = {"random": 0, "complement": length - first, "none": length}.get(policy, second)
    if policy != "random" and second not in (0, implied):
        raise ValueError(
            f"policy {policy} with L={length}, K1={first} shows {implied} patches in the second "
            f"view, not {second}"
        )
    if policy in ("complement", "independent") and not 1 <= implied <= length:
        raise ValueError(
            f"policy {policy} needs 1 <= K2 <= {length} visible patches, not {implied}"
        )
    return first, implied


def sample_masks(
    sample: Tensor, *, seed: int, epoch: int, length: int, visible: tuple[int, int], policy: str
) -> Masks:
    """Draw the visible sets of both views.

    sample: int64 [B]; length: L patches; visible: (K1, K2), K2 = 0 meaning what the policy gives.
    policy: `random` (T1 only, MAE), `complement` (T2 shows what T1 hides), `independent` (T2 has
    its own draw of K2), `none` (T2 hides nothing).
    Returns Masks. Raises ValueError for sizes that contradict the policy.
    """
    philox.check_key(sample, seed, epoch)
    sizes = view_sizes(length, visible, policy)
    if backend.implementation() == "triton":
        from pipeline.kernels.sample_masks.triton import sample_masks_triton as run
    else:
        run = sample_masks_reference
    return run(sample, seed=seed, epoch=epoch, length=length, visible=sizes, policy=policy)


def sample_masks_reference(
    sample: Tensor, *, seed: int, epoch: int, length: int, visible: tuple[int, int], policy: str
) -> Masks:
    """`sample_masks` in PyTorch; sizes already checked."""
    first, second = visible
    shown1, hidden1, inverse1 = _draw(sample, seed, epoch, 0, length, first)
    if policy == "random":
        return Masks(shown1, inverse1, None, None, hidden1)
    if policy == "complement":
        hidden = length - first
        inverse2 = torch.where(inverse1 < first, inverse1 + hidden, inverse1 - first)
        return Masks(shown1, inverse1, hidden1, inverse2, hidden1)
    if policy == "independent":
        shown2, _, inverse2 = _draw(sample, seed, epoch, 1, length, second)
        return Masks(shown1, inverse1, shown2, inverse2, hidden1)
    everything = torch.arange(length, dtype=torch.int32, device=sample.device)
    everything = everything.repeat(len(sample), 1)
    return Masks(shown1, inverse1, everything, everything, hidden1)


def _draw(
    sample: Tensor, seed: int, epoch: int, view: int, length: int, visible: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(visible, hidden, inverse) of one view, int32."""
    stream = philox.MASK_STREAM + view
    noise = philox.words(sample, seed=seed, epoch=epoch, stream=stream, count=length)
    position = torch.arange(length, device=sample.device)
    key = noise << 16 | position
    shown = key <= key.kthvalue(visible, dim=1, keepdim=True).values
    slot = shown.cumsum(1)
    inverse = torch.where(shown, slot - 1, visible + position - slot)
    order = torch.empty_like(key).scatter_(1, inverse, position.expand_as(key)).to(torch.int32)
    return order[:, :visible].contiguous(), order[:, visible:].contiguous(), inverse.to(torch.int32)

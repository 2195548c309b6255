"""Triton kernel of `sample_masks`: one program draws, chooses and writes what one sample shows.

The noise is Philox (`philox.py`) and stays in registers, so nothing is read but the sample number.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.philox import Epoch, on_device
from pipeline.kernels.philox_triton import philox_words
from pipeline.kernels.sample_masks.reference import POLICIES, Masks
from pipeline.kernels.select_visible.triton import slots, warps_of
from pipeline.kernels.streams import Stream

_COMPLEMENT, _NONE = (tl.constexpr(POLICIES.index(name)) for name in ("complement", "none"))
_MASK_STREAM = tl.constexpr(int(Stream.MASK))


@triton.jit
def _draw_words(seed, epoch, sample, stream, BLOCK: tl.constexpr):
    """Philox words 0 .. BLOCK-1 of one sample: uint32 [BLOCK]."""
    block = tl.arange(0, BLOCK // 4) + (stream << 16)
    w0, w1, w2, w3 = philox_words(seed, epoch, sample, block)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit(do_not_specialize=["seed"])
def sample_masks_kernel(
    sample_ptr, visible1_ptr, inverse1_ptr, hidden1_ptr, visible2_ptr, inverse2_ptr, seed,
    epoch_ptr, LENGTH: tl.constexpr, VISIBLE1: tl.constexpr, VISIBLE2: tl.constexpr,
    POLICY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, 0) writes row b of every output but a second view that is drawn: (b, 1) does."""
    b, view = tl.program_id(0), tl.program_id(1)
    sample = tl.load(sample_ptr + b)
    position = tl.arange(0, BLOCK)
    inside = position < LENGTH
    HIDDEN: tl.constexpr = LENGTH - VISIBLE1

    words = _draw_words(seed, tl.load(epoch_ptr), sample, _MASK_STREAM + view, BLOCK)
    if view == 0:
        shown, count = slots(words, position, LENGTH, VISIBLE1)
        inverse = tl.where(shown, count - 1, VISIBLE1 + position - count)
        tl.store(inverse1_ptr + b * LENGTH + position, inverse, mask=inside)
        tl.store(visible1_ptr + b * VISIBLE1 + count - 1, position, mask=shown)
        tl.store(hidden1_ptr + b * HIDDEN + position - count, position, mask=inside & ~shown)
        if POLICY == _COMPLEMENT:
            inverse = tl.where(shown, HIDDEN + count - 1, position - count)
            tl.store(inverse2_ptr + b * LENGTH + position, inverse, mask=inside)
        if POLICY == _NONE:
            tl.store(inverse2_ptr + b * LENGTH + position, position, mask=inside)
            tl.store(visible2_ptr + b * LENGTH + position, position, mask=inside)
    else:
        shown, count = slots(words, position, LENGTH, VISIBLE2)
        inverse = tl.where(shown, count - 1, VISIBLE2 + position - count)
        tl.store(inverse2_ptr + b * LENGTH + position, inverse, mask=inside)
        tl.store(visible2_ptr + b * VISIBLE2 + count - 1, position, mask=shown)


def _outputs(
    sample: Tensor, length: int, visible1: int, visible2: int, policy: str
) -> tuple[Tensor, ...]:
    """Empty (visible1, inverse1, hidden1, visible2, inverse2); width 0 where there is none."""
    own2 = visible2 if policy in ("independent", "none") else 0
    widths = (visible1, length, length - visible1, own2, 0 if policy == "random" else length)
    return tuple(sample.new_empty(len(sample), w, dtype=torch.int32) for w in widths)


@torch.library.custom_op("relaxmim::sample_masks", mutates_args=())
def _sample_masks(
    sample: Tensor, seed: int, epoch: Tensor, length: int, visible1: int, visible2: int, policy: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = _outputs(sample, length, visible1, visible2, policy)
    block = max(4, triton.next_power_of_2(length))
    drawn = 2 if policy == "independent" else 1
    sample_masks_kernel[(len(sample), drawn)](
        sample.contiguous(), *out, seed, epoch,
        LENGTH=length, VISIBLE1=visible1, VISIBLE2=visible2, POLICY=POLICIES.index(policy),
        BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip
    return out  # type: ignore[return-value]


@_sample_masks.register_fake
def _(
    sample: Tensor, seed: int, epoch: Tensor, length: int, visible1: int, visible2: int, policy: str
) -> tuple[Tensor, ...]:
    return _outputs(sample, length, visible1, visible2, policy)


def sample_masks_triton(
    sample: Tensor, *, seed: int, epoch: Epoch, length: int, visible: tuple[int, int], policy: str
) -> Masks:
    """`sample_masks` by the kernel; sizes already checked."""
    visible1, inverse1, hidden1, visible2, inverse2 = _sample_masks(
        sample, seed, on_device(epoch, sample), length, *visible, policy
    )
    if policy == "random":
        return Masks(visible1, inverse1, None, None, hidden1)
    if policy == "complement":
        visible2 = hidden1
    return Masks(visible1, inverse1, visible2, inverse2, hidden1)

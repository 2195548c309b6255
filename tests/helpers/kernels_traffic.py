"""Bytes moved: by chains of PyTorch ops (counted as they run) and by the kernels (from their index
ranges, which the tests check against what a kernel does: kernels_traced.py).

Two figures per kernel. `requested`: what all programs ask for, a tile that two programs read
counted twice, bytes that several lanes of one instruction read counted once. `moved`: what must
cross the memory bus if the L2 cache keeps what programs share: distinct 32-byte sectors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import kernels
from pipeline.kernels import backend

SECTOR = 32
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def bytes_of(tensor: Tensor) -> int:
    """Bytes behind a tensor; an expanded axis lies in memory once."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(sizes) * tensor.element_size()


class CountBytes(TorchDispatchMode):
    """Sum of input and output bytes of every aten op that is not a view.

    A gather is charged for what it picks, not for the whole of what it picks from.
    """

    PICKS = ("gather", "index", "index_select", "embedding")
    FREE = ("detach", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "lift")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or func.is_view or name in self.FREE:
            return out  # outside aten: questions about fake tensors, such as their device
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        read = [bytes_of(x) for x in inputs]
        if name in self.PICKS:
            read[0] = min(read[0], bytes_of(outputs[0]))
        if name in ("fill_", "zero_", "normal_", "uniform_"):
            read = []
        self.total += sum(read) + sum(map(bytes_of, outputs))
        return out


def count_bytes(run: Callable[[], Any]) -> int:
    """Bytes that the aten ops of run() move, backward included."""
    with CountBytes() as counter:
        run()
    return counter.total


# ---- MAE's chains, written plainly: whole images and whole sequences, op after op ---------------


@dataclass(frozen=True)
class Sizes:
    """ViT-B/16 at 224 x 224, bf16, MAE's masking and decoder."""

    batch: int = 256
    side: int = 224
    patch: int = 16
    width: int = 768
    decoder: int = 512
    keep: int = 49
    dtype: torch.dtype = torch.bfloat16

    @property
    def length(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def values(self) -> int:
        return 3 * self.patch**2

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    def empty(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta", requires_grad=grad)

    def image(self) -> Tensor:
        shape = (self.batch, self.side, self.side, 3)
        return torch.empty(shape, dtype=torch.uint8, device="meta")


def _normalised_planes(image: Tensor) -> Tensor:
    planes = image.permute(0, 3, 1, 2).to(torch.float32)
    constant = torch.empty(3, 1, 1, device="meta")
    return planes.div_(255).sub_(constant).div_(constant)


def mae_embed(sizes: Sizes) -> None:
    """Normalise, embed every patch, add positions, shuffle, keep."""
    s = sizes
    weight, bias = s.empty(s.width, 3, s.patch, s.patch), s.empty(s.width)
    position = s.empty(1, s.length, s.width)
    planes = _normalised_planes(s.image()).to(s.dtype)
    tokens = F.conv2d(planes, weight, bias, stride=s.patch).flatten(2).transpose(1, 2)
    tokens = tokens + position
    noise = torch.rand(s.batch, s.length, device="meta")
    shuffle = torch.argsort(noise, dim=1)
    restore = torch.argsort(shuffle, dim=1)
    kept = shuffle[:, : s.keep].unsqueeze(-1).repeat(1, 1, s.width)
    torch.gather(tokens, 1, kept)
    hidden = torch.ones(s.batch, s.length, device="meta")
    hidden[:, : s.keep] = 0
    torch.gather(hidden, 1, restore)


def mae_place(sizes: Sizes, backward: bool = False) -> None:
    """Repeat the mask token, append, unshuffle, put the class token back, add positions."""
    s = sizes
    tokens = s.empty(s.batch, s.keep + 1, s.decoder, grad=backward)
    mask_token = s.empty(1, 1, s.decoder, grad=backward)
    position = s.empty(1, s.length + 1, s.decoder)
    restore = torch.empty(s.batch, s.length, dtype=torch.int64, device="meta")
    masks = mask_token.repeat(s.batch, s.length - s.keep, 1)
    body = torch.cat([tokens[:, 1:], masks], dim=1)
    body = torch.gather(body, 1, restore.unsqueeze(-1).repeat(1, 1, s.decoder))
    out = torch.cat([tokens[:, :1], body], dim=1) + position
    if backward:
        out.backward(torch.empty_like(out))


def mae_loss(sizes: Sizes) -> None:
    """Patchify, mean, variance, normalise, squared error of every patch, masked mean; backward."""
    s = sizes
    prediction = s.empty(s.batch, s.length, s.values, grad=True)
    hidden = torch.empty(s.batch, s.length, device="meta")
    planes = _normalised_planes(s.image())
    side = s.side // s.patch
    grid = planes.reshape(s.batch, 3, side, s.patch, side, s.patch)
    target = torch.einsum("nchpwq->nhwpqc", grid).reshape(s.batch, s.length, s.values)
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    loss = ((prediction - target) ** 2).mean(-1)
    ((loss * hidden).sum() / hidden.sum()).backward()


# ---- our references on the same sizes -----------------------------------------------------------


def reference_embed(sizes: Sizes) -> None:
    s = sizes
    sample = torch.empty(s.batch, dtype=torch.int64, device="meta")
    masks = kernels.sample_masks(sample, seed=0, epoch=0, length=s.length, visible=(s.keep, 0),
                                 policy="random")  # fmt: skip
    weight, bias = s.empty(s.width, 3, s.patch, s.patch), s.empty(s.width)
    kernels.embed_visible(s.image(), masks.visible1, weight, bias, s.empty(s.length, s.width),
                          **IMAGENET)  # fmt: skip


def reference_place(sizes: Sizes, backward: bool = False) -> None:
    s = sizes
    tokens = s.empty(s.batch, s.keep + 1, s.decoder, grad=backward)
    mask_token = s.empty(s.decoder, grad=backward)
    inverse = torch.empty(s.batch, s.length, dtype=torch.int32, device="meta")
    position = s.empty(s.length + 1, s.decoder)
    out = kernels.place_tokens(tokens, inverse, mask_token, position, prefix=1)
    if backward:
        out.backward(torch.empty_like(out))


def reference_loss(sizes: Sizes) -> None:
    s = sizes
    region = torch.empty(s.batch, s.length - s.keep, dtype=torch.int32, device="meta")
    prediction = s.empty(*region.shape, s.values, grad=True)
    loss = kernels.patch_loss(prediction, s.image(), region, patch=s.patch, **IMAGENET)
    loss.sum().backward()


# ---- the kernels, from their index ranges --------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch: asked for by its programs, moved at least, and the op's own minimum.

    `around` are the bytes of the small PyTorch ops that belong to the call: a weight put into the
    order in which the kernel reads it, partial sums added up.
    """

    requested: int
    moved: int
    minimum: int
    around: int = 0


def patch_bytes(image: Tensor, positions: Tensor, patch: int) -> int:
    """Bytes of the distinct 32-byte sectors under the patches of an interleaved uint8 image."""
    across = image.shape[2] // patch
    batch = np.arange(len(image))[:, None, None]
    at = positions.numpy()[:, :, None].astype(np.int64)
    line = np.arange(patch)[None, None, :]
    start = batch * image.stride(0) + (at // across * patch + line) * image.stride(1)
    start = (start + at % across * patch * 3).ravel()
    last = (start + 3 * patch - 1) // SECTOR
    first = start // SECTOR
    span = int((last - first).max()) + 1
    sectors = np.unique(np.minimum(first[:, None] + np.arange(span), last[:, None]))
    return int(sectors.size) * SECTOR


def place_tokens_traffic(sizes: Sizes, prefix: int = 1) -> dict[str, Traffic]:
    """Forward and backward of place_tokens."""
    from pipeline.kernels.place_tokens.triton import CHUNK, ROWS

    s = sizes
    block = min(512, 1 << (s.decoder - 1).bit_length())
    rows = prefix + s.length
    in_d, in_batch = -(-s.decoder // block), -(-s.batch // CHUNK)
    tiles = -(-rows // ROWS) * in_batch
    tokens = s.batch * (prefix + s.keep) * s.decoder * s.element
    sequence = s.batch * rows * s.decoder * s.element
    inverse, row = s.batch * s.length * 4, s.decoder * s.element
    forward = tokens + sequence + inverse
    backward = tokens + sequence + inverse
    partial = tiles * s.decoder * 4
    again = inverse * (in_d - 1)
    table = rows * row
    return {
        "forward": Traffic(
            forward + again + table * in_batch + row * tiles,
            forward + table + row,
            forward + table + row,
        ),
        "backward": Traffic(
            backward + again + partial,
            backward + partial,
            backward + row,
            around=partial + s.decoder * 4,
        ),
    }


def patch_loss_traffic(
    sizes: Sizes, image: Tensor, region: Tensor, relaxed: bool = False
) -> dict[str, Traffic]:
    """Forward and backward of patch_loss, without weights."""
    from pipeline.kernels.patch_loss.triton import ROWS

    s = sizes
    rows = region.numel()
    predictions = rows * s.values * s.element * (2 if relaxed else 1)
    pixels, moved = rows * s.values, patch_bytes(image, region, s.patch)
    programs = -(-rows // ROWS)
    partial = programs * 8
    read = predictions + rows * 4
    upstream = programs * (8 if relaxed else 4)
    return {
        "forward": Traffic(
            read + pixels + partial, read + moved + partial, read + pixels + 8, around=partial + 8
        ),
        "backward": Traffic(
            read + pixels + upstream + predictions,
            read + moved + 8 + predictions,
            read + pixels + 8 + predictions,
        ),
    }


def embed_visible_traffic(sizes: Sizes, image: Tensor, visible: Tensor) -> Traffic:
    """Forward of embed_visible with positions."""
    from pipeline.kernels.embed_visible.triton import BLOCKS

    s = sizes
    m, n, _ = BLOCKS[s.dtype]
    rows = visible.numel()
    in_m, in_n = -(-rows // m), -(-s.width // n)
    weight, bias = s.width * s.values * s.element, s.width * s.element
    out, index = rows * s.width * s.element, rows * 4
    pixels, moved = rows * s.values, patch_bytes(image, visible, s.patch)
    row = s.width * s.element
    position = torch.unique(visible).numel() * row
    # Rows of a tile that stand at one position read its embedding together.
    read = sum(torch.unique(tile).numel() for tile in visible.flatten().split(m)) * row
    return Traffic(
        (pixels + 2 * index) * in_n + (weight + bias) * in_m + read + out,
        moved + index + weight + bias + position + out,
        pixels + index + weight + bias + position + out,
        around=2 * weight,  # [D,3,p,p] -> [D,p*p*3]
    )


def sample_masks_traffic(sizes: Sizes) -> Traffic:
    """sample_masks under `complement`: the sample numbers in, four int32 tables out."""
    s = sizes
    total = s.batch * (8 + 4 * (s.length + s.length + s.length))
    return Traffic(total, total, total)


# ---- the table -----------------------------------------------------------------------------------


@contextmanager
def references() -> Iterator[None]:
    """Run the PyTorch references, whatever is chosen."""
    before = backend._implementation
    kernels.use("reference")
    try:
        yield
    finally:
        backend._implementation = before


@references()
def measured(sizes: Sizes) -> dict[str, tuple[int, int, list[Traffic]]]:
    """Per op: bytes of MAE's chain, of our reference, and the traffic of the op's launches."""
    s = sizes
    sample = torch.arange(s.batch)
    masks = kernels.sample_masks(sample, seed=0, epoch=0, length=s.length, visible=(s.keep, 0),
                                 policy="complement")  # fmt: skip
    image = torch.empty(s.batch, s.side, s.side, 3, dtype=torch.uint8)
    embed = [sample_masks_traffic(s), embed_visible_traffic(s, image, masks.visible1)]
    loss, place = patch_loss_traffic(s, image, masks.hidden1), place_tokens_traffic(s)
    chains = {
        "embed_visible": (mae_embed, reference_embed, embed),
        "patch_loss": (mae_loss, reference_loss, list(loss.values())),
        "place_tokens": (mae_place, reference_place, [place["forward"]]),
    }
    table = {
        name: (count_bytes(lambda f=chain: f(s)), count_bytes(lambda f=ours: f(s)), launches)
        for name, (chain, ours, launches) in chains.items()
    }
    both = (count_bytes(lambda: mae_place(s, True)), count_bytes(lambda: reference_place(s, True)))
    table["place_tokens with backward"] = (*both, list(place.values()))
    return table


def ratios(sizes: Sizes) -> tuple[dict[str, float], dict[str, float]]:
    """(all bytes an op asks for / MAE's chain, bytes each launch moves / its minimum)."""
    ratio, of_minimum = {}, {}
    for name, (chain, _, launches) in measured(sizes).items():
        ratio[name] = sum(t.requested + t.around for t in launches) / chain
        of_minimum[name] = max(t.moved / t.minimum for t in launches)
    return ratio, of_minimum

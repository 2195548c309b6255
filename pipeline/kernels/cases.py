"""What the report, the benches and the tests need to know of an op, found in its folder.

`<op>/cases.py` gives CASES, calls of the op at a model's sizes, and perhaps PHASE (the phase of a
step that it belongs to) and `as_launch` (the op as one launch, for the roofline). `ops()` finds
them: a new folder is in every list by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipeline import kernels

SECTOR = 32  # bytes, of the memory bus
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


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
    device: str = "cpu"

    @property
    def length(self) -> int:
        """Patches of an image."""
        return (self.side // self.patch) ** 2

    @property
    def values(self) -> int:
        """Values of a patch."""
        return 3 * self.patch**2

    @property
    def element(self) -> int:
        """Bytes of a value of dtype."""
        return self.dtype.itemsize

    def empty(self, *shape: int, grad: bool = False) -> Tensor:
        """A tensor without data, for counting bytes."""
        return torch.empty(*shape, dtype=self.dtype, device="meta", requires_grad=grad)

    def meta_image(self) -> Tensor:
        """Images without data."""
        shape = (self.batch, self.side, self.side, 3)
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def leaf(self, *shape: int) -> Tensor:
        """Standard normal numbers with a gradient."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device).requires_grad_()

    def image(self) -> Tensor:
        """Random images: uint8 [B, H, W, 3]."""
        shape = (self.batch, self.side, self.side, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def sample(self) -> Tensor:
        """Sample numbers: int64 [B]."""
        return torch.arange(self.batch, device=self.device)

    def positions(self, first: int, last: int) -> Tensor:
        """Positions first … last - 1 in every image: int32 [B, last - first]."""
        row = torch.arange(first, last, dtype=torch.int32, device=self.device)
        return row.repeat(self.batch, 1)


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


@dataclass(frozen=True)
class Bytes:
    """Memory traffic of a call: MAE's chain of ops and our reference, which run on tensors without
    data and are counted as they run, and the kernel's launches at given images and masks.
    """

    chain: Callable[[Sizes], None]
    reference: Callable[[Sizes], None]
    launches: Callable[[Sizes, Tensor, kernels.Masks], list[Traffic]]


@dataclass(frozen=True)
class Case:
    """A call of an op. inputs: draws them at given sizes → the call, which returns the output.

    gradient: whether the output has one, so that backward is run too. kernels: what is launched
    (forward and backward); wide: those whose loads and stores are all to be of 128 bits; typed:
    whether the call depends on a dtype; rounds: whether it multiplies in 16 bits under autocast.
    """

    name: str
    inputs: Callable[[Sizes], Callable[[], Any]]
    kernels: tuple[str, ...]
    gradient: bool = False
    wide: tuple[str, ...] = ()
    typed: bool = True
    rounds: bool = False


def ops() -> dict[str, ModuleType]:
    """`cases` modules by the name of their op: every folder of pipeline/kernels."""
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__) if m.ispkg]
    return {name: importlib.import_module(f"pipeline.kernels.{name}.cases") for name in names}


def all_cases() -> dict[str, Case]:
    """Every case of every op by its name."""
    return {case.name: case for module in ops().values() for case in module.CASES}


def all_bytes() -> dict[str, Bytes]:
    """The memory traffic of every op that states it, by the name of the call."""
    return {name: b for m in ops().values() for name, b in getattr(m, "BYTES", {}).items()}


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


def normalised_planes(image: Tensor) -> Tensor:
    """What MAE's loader gives: fp32 [B, 3, H, W], normalised."""
    planes = image.permute(0, 3, 1, 2).to(torch.float32)
    constant = torch.empty(3, 1, 1, device="meta")
    return planes.div_(255).sub_(constant).div_(constant)


# ---- an op as one launch, for the roofline -------------------------------------------------------


class Book(Protocol):
    """Where FLOPs and bytes of launches are added up; ops are not counted while it is closed."""

    closed: bool

    def add(self, flops: int, moved: int) -> None:
        """One launch."""


def bytes_of(tensor: Tensor) -> int:
    """Bytes behind a tensor; an expanded axis is in memory once."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(sizes) * tensor.element_size()


def size(*tensors: Any) -> int:
    """Bytes behind tensors, in any nesting; what is no tensor counts nothing."""
    return sum(bytes_of(t) for t in tree_leaves(tensors) if isinstance(t, Tensor))


def launch(
    book: Book, out: Tensor, given: Sequence[Tensor], cost: tuple[int, int], back: tuple[int, int]
) -> Tensor:
    """A differentiable launch as a shape and a cost, (FLOPs, bytes) forward and backward.

    out: empty; the gradients of `given` are empty too.
    """
    book.add(*cost)
    result: Tensor = _Launch.apply(book, back, out, *given)
    return result


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, back: tuple[int, int], out: Tensor, *given: Tensor) -> Tensor:
        ctx.book, ctx.back = book, back
        ctx.given = [(t.shape, t.dtype) if t.requires_grad else None for t in given]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.book.add(*ctx.back)
        empty = [None if g is None else torch.empty(g[0], dtype=g[1]) for g in ctx.given]
        return None, None, None, *empty


def uncounted(book: Book, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op itself, its inner ops not counted."""

    def run(*args: Any, **keywords: Any) -> Any:
        book.closed = True
        try:
            return op(*args, **keywords)
        finally:
            book.closed = False

    return run

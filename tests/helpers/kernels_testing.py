"""What the kernel tests share: the device, both implementations side by side, tolerances.

On the CPU the Triton kernels run under Triton's interpreter, which has to be asked for before
triton is imported; RELAXMIM_TEST_DEVICE=cuda runs the same tests compiled, on a GPU.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import SkipTest

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.kernels import backend

DEVICE = os.environ.get("RELAXMIM_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported (torchvision does it) before TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
elif not torch.cuda.is_available():
    raise RuntimeError(f"RELAXMIM_TEST_DEVICE={DEVICE}, but there is no CUDA device here")

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Largest difference over the largest value. The interpreter cuts bf16 off where a GPU rounds: two
# units in the last place.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6, torch.float64: 1e-9}

Leaves = dict[str, Tensor]


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Run with one implementation; memory that nobody has written holds NaN, or the largest int."""
    before = backend._implementation
    if implementation == "triton" and DEVICE == "cpu" and (said := backend._interpreter_problem()):
        raise SkipTest(said)
    kernels.use(implementation, DEVICE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        backend._implementation = before


def gradients(function: Callable[..., Tensor], leaves: Leaves) -> dict[str, Tensor]:
    """Output and the gradient of every leaf, by name, under a fixed random upstream gradient."""
    own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    own = {
        name: copy if leaf.is_contiguous() else _with_strides(copy, leaf)
        for (name, copy), leaf in zip(own.items(), leaves.values(), strict=True)
    }
    out = function(**own)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    wanted = torch.autograd.grad(out, list(own.values()), upstream, materialize_grads=True)
    return {"output": out.detach(), **dict(zip(own, wanted, strict=True))}


def _with_strides(copy: Tensor, like: Tensor) -> Tensor:
    """A leaf with the values of copy and the strides of like."""
    size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    out = torch.empty(size, dtype=like.dtype, device=like.device)
    return out.as_strided(like.shape, like.stride()).copy_(copy.detach()).requires_grad_()


def assert_agree(
    name: str, got: Tensor, expected: Tensor, tolerance: float, floor: float = 1e-4
) -> None:
    """No NaN, same shape, and max |got - expected| <= tolerance * max(|expected|, floor)."""
    assert got.shape == expected.shape, f"{name}: {list(got.shape)} != {list(expected.shape)}"
    assert not got.isnan().any(), f"{name}: NaN"
    if not got.numel():
        return
    worst = float((got.double() - expected.double()).abs().max())
    scale = max(float(expected.double().abs().max()), floor)
    assert worst <= tolerance * scale, f"{name}: off by {worst:.3g} where values reach {scale:.3g}"


def assert_implementations_agree(
    function: Callable[..., Tensor], leaves: Leaves, floor: float = 1e-4
) -> None:
    """Kernel against reference: the output and every gradient, by name, same dtypes."""
    with using("triton"):
        got = gradients(function, leaves)
    with using("reference"):
        expected = gradients(function, leaves)
    tolerance = max(TOLERANCE[leaf.dtype] for leaf in leaves.values())
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert_agree(name, got[name], value, tolerance, floor)


def assert_gradients(
    function: Callable[..., Tensor], oracle: Callable[..., Tensor], leaves: Leaves
) -> None:
    """Reference against a float64 oracle: the output and every gradient, by name."""
    with using("reference"):
        got = gradients(function, leaves)
    expected = gradients(oracle, {name: leaf.double() for name, leaf in leaves.items()})
    for name, value in expected.items():
        assert_agree(name, got[name], value, TOLERANCE[got[name].dtype])


def random_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [batch,height,width,3] on DEVICE, among them a flat one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, height, width, 3)
    image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    image[-1] = image[-1, 0, 0]
    return image.to(DEVICE)


def some_positions(batch: int, length: int, count: int, seed: int = 0) -> Tensor:
    """int32 [batch,count]: distinct positions in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=generator)[:count] for _ in range(batch)]
    return torch.stack(rows).to(torch.int32).to(DEVICE)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers on DEVICE."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)

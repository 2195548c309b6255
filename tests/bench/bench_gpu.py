"""Time every kernel on a CUDA device against its PyTorch reference and a device copy.

Usage: python tests/bench/bench_gpu.py [--batch 256] [--dtype bf16]. Behind `make bench-gpu`.
Without a CUDA device it says so and exits with 2. ViT-B/16 at 224 x 224; forward, and backward
where there is one. `copy`: the time to copy as many bytes as the op must at least move.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from kernels_traffic import IMAGENET, Sizes, measured
from torch import Tensor

from pipeline import kernels

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def calls(sizes: Sizes, device: str) -> dict[str, Callable[[], Any]]:
    """One call of each op on random inputs, backward included, by name."""
    s = sizes
    sample = torch.arange(s.batch, device=device)
    key: dict[str, Any] = {"seed": 0, "epoch": 0}
    settings: dict[str, Any] = {"length": s.length, "visible": (s.keep, 0), "policy": "complement"}
    masks = kernels.sample_masks(sample, **key, **settings)
    shape = (s.batch, s.side, s.side, 3)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, dtype=s.dtype, device=device).requires_grad_()

    weight, bias = leaf(s.width, 3, s.patch, s.patch), leaf(s.width)
    position = leaf(s.length, s.width).detach()
    tokens, mask_token = leaf(s.batch, s.keep + 1, s.decoder), leaf(s.decoder)
    places = leaf(s.length + 1, s.decoder).detach()
    first, second = (leaf(s.batch, s.length - s.keep, s.values) for _ in range(2))
    query, keys = leaf(s.batch, s.length, s.width), leaf(s.batch, s.length, s.width).detach()
    drawn = kernels.jitter_parameters(sample, **key, view=0)

    def embed() -> Tensor:
        return kernels.embed_visible(image, masks.visible1, weight, bias, position, **IMAGENET)

    def place() -> Tensor:
        return kernels.place_tokens(tokens, masks.inverse1, mask_token, places, prefix=1)

    def loss() -> Tensor:
        return kernels.patch_loss(first, image, masks.hidden1, patch=s.patch, **IMAGENET)

    def relaxed() -> Tensor:
        return kernels.patch_loss(
            first, image, masks.hidden1, patch=s.patch, other=second, **IMAGENET
        )

    def contrast() -> Tensor:
        return kernels.token_infonce(query, keys, temperature=0.2, negatives="position", offset=0)[
            0
        ]

    def backward(function: Callable[[], Tensor]) -> Callable[[], None]:
        upstream = torch.ones_like(function())
        return lambda: function().backward(upstream)

    return {
        "sample_masks": lambda: kernels.sample_masks(sample, **key, **settings),
        "embed_visible": embed,
        "embed_visible with backward": backward(embed),
        "place_tokens": place,
        "place_tokens with backward": backward(place),
        "patch_loss": backward(loss),
        "patch_loss relaxed": backward(relaxed),
        "token_infonce position": backward(contrast),
        "color_jitter": lambda: kernels.color_jitter(image, *drawn),
    }


def least_bytes(sizes: Sizes) -> dict[str, int]:
    """Bytes an op must at least move, where the traffic table has it."""
    table = measured(sizes)
    return {name: sum(t.minimum for t in launches) for name, (_, _, launches) in table.items()}


def timings(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Microseconds of each call by implementation, medians as Triton's do_bench takes them."""
    from triton.testing import do_bench

    out: dict[str, dict[str, float]] = {}
    for implementation in ("reference", "triton"):
        kernels.use(implementation, "cuda")
        for name, call in calls(sizes, "cuda").items():
            milliseconds = do_bench(call, return_mode="median")
            out.setdefault(name, {})[implementation] = 1000 * milliseconds
    for name, count in least_bytes(sizes).items():
        source = torch.empty(count // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = do_bench(lambda to=target, of=source: to.copy_(of), return_mode="median")
        if name in out:
            out[name]["copy"] = 1000 * copy
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench-gpu times kernels on a CUDA device, and there is none here",
              file=sys.stderr)  # fmt: skip
        return 2
    found = timings(Sizes(batch=options.batch, dtype=DTYPES[options.dtype]))
    print(f"{torch.cuda.get_device_name()}, batch {options.batch}, {options.dtype}: microseconds\n")
    print(f"{'op':30} {'reference':>10} {'triton':>10} {'copy':>10}")
    for name, row in found.items():
        cells = [f"{row[c]:.1f}" if c in row else "-" for c in ("reference", "triton", "copy")]
        print(f"{name:30} {cells[0]:>10} {cells[1]:>10} {cells[2]:>10}")
    print(
        json.dumps({name: {k: round(v, 1) for k, v in row.items()} for name, row in found.items()})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

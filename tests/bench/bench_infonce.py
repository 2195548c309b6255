"""token_infonce on the CPU: peak memory and time against the materialised N x N computation.

Usage: python tests/bench/bench_infonce.py [--tokens 16384] [--width 256] [--rounds 3]. Behind
`make bench-infonce`; the last line is JSON. Peak memory is that of a fresh process over what it
held before the call. Times are medians of alternating calls in one process on one thread, in
seconds of processor time, which on one thread is wall time less what other programs took.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import kernels

TEMPERATURE = 0.2


def streaming(query: Tensor, key: Tensor) -> Tensor:
    return kernels.token_infonce(
        query[:, None], key[:, None], temperature=TEMPERATURE, negatives="all", offset=0
    )[0]


def materialised(query: Tensor, key: Tensor) -> Tensor:
    """The usual writing: einsum over all pairs, then cross-entropy with the diagonal."""
    q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = torch.einsum("nd,md->nm", q, k) / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(q)))


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "streaming": streaming,
    "materialised": materialised,
}


def inputs(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(tokens, width, generator=generator)
    key = query + torch.randn(tokens, width, generator=generator)
    return query.requires_grad_(), key.requires_grad_()


def step(way: str, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients."""
    loss = WAYS[way](query, key)
    return loss.detach(), *torch.autograd.grad(loss, [query, key])


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of(way: str, tokens: int, width: int) -> float:
    """MiB that forward and backward add to the peak of a fresh process."""
    command = [sys.executable, __file__, "--measure", way, "--tokens", str(tokens)]
    command += ["--width", str(width)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure_peak(way: str, tokens: int, width: int) -> None:
    """In the fresh process: warm up on little, then print the growth of the peak."""
    torch.set_num_threads(1)
    step(way, *inputs(64, width))
    query, key = inputs(tokens, width)
    before = peak_kib()
    step(way, query, key)
    print((peak_kib() - before) / 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_peak(options.measure, options.tokens, options.width)
        return 0
    torch.set_num_threads(1)
    memory = {way: peak_of(way, options.tokens, options.width) for way in WAYS}
    query, key = inputs(options.tokens, options.width)
    results, times = {}, {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            start = time.process_time()
            results[way] = step(way, query, key)
            times[way].append(time.process_time() - start)
    seconds = {way: statistics.median(taken) for way, taken in times.items()}
    for way in WAYS:
        print(f"{way:13} {memory[way]:9.1f} MiB  {seconds[way]:7.3f} s  loss {results[way][0]:.6f}")
    off = {
        name: float((a - b).abs().max() / b.abs().max())
        for name, a, b in zip(("loss", "query", "key"), *results.values(), strict=True)
    }
    summary = {
        "tokens": options.tokens,
        "width": options.width,
        "memory_ratio": round(memory["streaming"] / memory["materialised"], 4),
        "time_ratio": round(seconds["streaming"] / seconds["materialised"], 4),
        "largest_difference": max(off.values()),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())

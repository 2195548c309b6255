"""The smallest kernel: whether Triton compiles and launches on a device."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl


@triton.jit
def trial_kernel(out_ptr):
    tl.store(out_ptr, 1)


def run(device: torch.device) -> None:
    """Launch it. Raises whatever the compiler, the cache's folder or the driver does."""
    trial_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=device))
    torch.cuda.synchronize(device)

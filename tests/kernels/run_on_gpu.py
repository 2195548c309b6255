"""Run the kernel tests on a CUDA device, compiled instead of interpreted.

Usage: python tests/kernels/run_on_gpu.py [pytest options]. Behind `make test-gpu`. Without a CUDA
device it says so and exits with 2.
"""

import os
import sys
from pathlib import Path

import pytest
import torch


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "error: test-gpu runs the kernel tests on a CUDA device, and there is none here "
            "(the same cases run under Triton's interpreter in the ordinary tests)",
            file=sys.stderr,
        )
        return 2
    os.environ["RELAXMIM_TEST_DEVICE"] = "cuda"
    os.environ.pop("TRITON_INTERPRET", None)
    files = sorted(str(path) for path in Path(__file__).parent.glob("test_kernel*.py"))
    return int(pytest.main([*files, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())

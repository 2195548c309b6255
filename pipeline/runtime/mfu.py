"""Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, App. B): FLOP/s of the model / the peak."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pipeline
from pipeline.config.peaks import peak_flops

ESTIMATE = Path(pipeline.__file__).parent / "estimate.py"


def peak_of(device: str, precision: str, given_tflops: float | None) -> tuple[float | None, str]:
    """(FLOP/s of one rank's device at most, a line for the log where it is not known)."""
    peak = given_tflops * 1e12 if given_tflops else peak_flops(device, precision)
    if peak is None:
        return None, f"MFU: not shown, the peak of {device} is not known (--peak-tflops N gives it)"
    return peak, ""


class Mfu:
    """The utilisation of devices whose peaks sum up to `peak` FLOP/s.

    recipe: the file of the resolved recipe; micro_batch, ranks: how it runs. Its FLOPs are counted
    by pipeline/estimate.py in a process of its own: the count takes seconds, for which no start
    waits, and runs the step with other kernels, which are chosen for a whole process.
    """

    def __init__(self, recipe: Path, peak: float, *, micro_batch: int, ranks: int) -> None:
        self.peak = peak
        self.problem = ""  # why there is no count
        self._per_image: float | None = None
        self._of_size: dict[int, float] = {}  # where a recipe has images of several
        alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._counting: subprocess.Popen[str] | None = subprocess.Popen(
            [sys.executable, ESTIMATE, "--flops", "--recipe", recipe,
             "--gpus", str(ranks), "--micro-batch", str(micro_batch)],
            env=os.environ | alone, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def flops_per_image(
        self, sizes: Mapping[int, int] | None = None, wait: bool = False
    ) -> float | None:
        """Forward and backward, by estimate's count; None until it is there.

        sizes: side of the images → steps that had it, whose mean is taken, under data.sizes; else
        the mean of the whole run.
        """
        if self._counting is not None and (wait or self._counting.poll() is not None):
            out, errors = self._counting.communicate()
            try:
                first, *others = out.splitlines() or [""]
                self._per_image = float(first)
                self._of_size = {int(s): float(n) for s, n in map(str.split, others)}
            except ValueError:
                why = (errors.strip() or f"exit code {self._counting.returncode}").splitlines()[-1]
                self.problem = f"MFU: not shown, counting the FLOPs failed ({why})"
            self._counting = None
        if not sizes or not self._of_size:
            return self._per_image
        return sum(self._of_size[s] * n for s, n in sizes.items()) / sum(sizes.values())

    def of(self, images_per_second: float, sizes: Mapping[int, int] | None = None) -> float | None:
        """The share of the peak at this speed (images of all ranks); None while not known."""
        flops = self.flops_per_image(sizes)
        return None if flops is None else flops * images_per_second / self.peak

    def close(self) -> None:
        """End the count, should it still run."""
        if self._counting is not None:
            self._counting.kill()
            self._counting.communicate()
            self._counting = None

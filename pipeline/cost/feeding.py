"""What a GPU waits for: itself, the host that launches its kernels, or the loader that feeds it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Feeding:
    """Seconds of one rank's optimizer step, each part as if it were alone.

    gpu: computing; launches: kernels that the host launches, launch_ms each; images: that the
    loader's `cores` bring at core_images a second and core.
    """

    gpu: float
    launches: int
    launch_ms: float
    images: int
    core_images: float
    cores: int

    @property
    def host(self) -> float:
        """Seconds of launching."""
        return self.launches * self.launch_ms / 1e3

    @property
    def loader(self) -> float:
        """Seconds of loading."""
        return self.images / (self.core_images * self.cores)

    @property
    def seconds(self) -> float:
        """Of the step: its slowest part, since they overlap."""
        return max(self.gpu, self.host, self.loader)

    @property
    def bound(self) -> str:
        """`GPU-bound`, `host-bound` or `loader-bound`."""
        parts = {"GPU": self.gpu, "host": self.host, "loader": self.loader}
        return max(parts, key=lambda name: parts[name]) + "-bound"

    @property
    def cores_needed(self) -> int:
        """Cores per GPU with which the loader is no slower than the rest."""
        return max(1, math.ceil(self.images / (self.core_images * max(self.gpu, self.host))))

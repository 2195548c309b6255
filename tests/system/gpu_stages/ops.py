"""DeepSpeed's fused ops, compiled while other stages run."""

from __future__ import annotations

from typing import Any

from gpu_stages.common import Skip, Where
from pipeline.distributed import cannot_build
from pipeline.runtime.engine import build_ops


def build(where: Where) -> dict[str, Any]:
    """Compile them, so that no later stage waits for it."""
    if cannot_build():
        raise Skip("no compiler is used here: torch's fused AdamW takes the steps")
    return {"built": build_ops()}

"""Micro-batches that a step can be made of, and the largest that fits."""

from __future__ import annotations

from pipeline.config.plan import most_stage
from pipeline.config.planning import why_too_few
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError

BF16_WEIGHTS = ("bf16", "bf16-fp32-grads")  # of the precisions, see estimate.py
MARGIN = 0.1  # of a device's memory, left for the CUDA context, momentary tensors, fragments


class PlanError(UserError):
    """A plan that cannot be made; the message says why."""


def split(recipe: Recipe, ranks: int) -> list[int]:
    """Micro-batches that divide a rank's images of a step and of which a run can be made, the
    largest first. PlanError where there is none."""
    if recipe.data.partitions % ranks:  # of which batch_size is a multiple
        raise PlanError(
            f"--gpus {ranks}: batch_size {recipe.batch_size} and data.partitions "
            f"{recipe.data.partitions} must be multiples of the number of GPUs"
        )
    per_rank = recipe.batch_size // ranks
    if problem := why_too_few(recipe, per_rank, ranks):
        raise PlanError(f"--gpus {ranks}: {problem}")
    sizes = (n for n in range(per_rank, 0, -1) if per_rank % n == 0)
    return [n for n in sizes if not why_too_few(recipe, n, ranks)]


def stages_under(precision: str, kind: str = "adamw") -> list[int]:
    """ZeRO stages that run in a precision with a kind of optimizer: the engine refuses DeepSpeed's
    stage 0 in bf16, and 1 with fp32 gradients."""
    return [n for n in range(most_stage(kind) + 1) if precision not in BF16_WEIGHTS[n:]]


def fits(need: int, memory: float) -> bool:
    """Whether bytes fit in a device's memory less MARGIN."""
    return need <= (1 - MARGIN) * memory


def largest_that_fits(needs: dict[int, int], memory: float) -> int:
    """The largest micro-batch whose bytes fit in a device's memory less MARGIN, else the smallest.

    needs: micro-batch → its bytes.
    """
    return max((n for n, need in needs.items() if fits(need, memory)), default=min(needs))

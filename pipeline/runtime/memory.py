"""Out of memory in the model, as a sentence that says what to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.config.plan import RunPlan
from pipeline.errors import UserError

GIB = 2**30
CONTEXT = 1.0  # GiB, about, of CUDA and NCCL in this process
# Allocators that raise a RuntimeError without a class of its own.
_WORDS = (
    "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "Cuda failure 2 'out of memory'",
)  # fmt: skip
_EVALUATION = (
    ": use more ranks (launch.sh), a lower --batch-size or fewer --workers where the command has "
    "them, or smaller images"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one behind it, says that memory ran out on the device or the host."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(behind, RuntimeError) and any(word in str(behind) for word in _WORDS):
            return True
        behind = behind.__cause__
    return False


@contextlib.contextmanager
def explaining_memory(plan: RunPlan | None = None, image_size: int = 0) -> Iterator[None]:
    """Turn running out of memory inside into a UserError with the sizes and what to lower.

    plan, image_size: of a training; without them the advice is for an evaluation.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not out_of_memory(error):
            raise
        advice = _EVALUATION if plan is None else _advice(plan, image_size)
        raise UserError(f"out of memory on {_where()}{advice}") from error


def _where() -> str:
    if not torch.cuda.is_available():
        return "the CPU"
    device = torch.cuda.current_device()
    used = torch.cuda.max_memory_allocated(device) / GIB
    free, total = (count / GIB for count in torch.cuda.mem_get_info(device))
    others = total - free - torch.cuda.memory_reserved(device) / GIB - CONTEXT
    more = f", {others:.1f} by other processes" if others > CONTEXT else ""
    return f"cuda:{device} ({used:.1f} of {total:.1f} GiB were in use{more})"


def _advice(plan: RunPlan, image_size: int) -> str:
    size = plan.micro_batch * plan.accumulation * plan.world
    remedies = []
    if plan.micro_batch > 1:
        smaller = next(m for m in range(plan.micro_batch // 2, 0, -1) if plan.micro_batch % m == 0)
        remedies.append(
            f"set train_micro_batch_size_per_gpu of the ds_config to {smaller} or less "
            f"(accumulation keeps the batch of {size}"
            f"{f'; {plan.pooled} come from fewer images' if plan.pooled else ''})"
        )
    if not plan.checkpointing:
        remedies.append("set gradient_checkpointing there to true")
    if plan.cuda_graphs:
        remedies.append("set cuda_graphs there to false, since they hold all gradients")
    if plan.stage < 3 and plan.world > 1:
        remedies.append(f"use a zero_optimization.stage above {plan.stage}")
    remedies.append("use smaller images or a smaller encoder")
    *first, last = remedies
    advice = f"{', '.join(first)}, or {last}" if first else last
    return (
        f" with a micro-batch of {plan.micro_batch} images of {image_size} × {image_size} "
        f"pixels: {advice}; pipeline/estimate.py predicts what fits"
    )

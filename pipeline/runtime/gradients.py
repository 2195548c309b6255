"""Gradients on their way to the optimizer, where DeepSpeed's own path costs the host too much.

DeepSpeed 0.19.8 has a Python hook per parameter, which copies the gradient into a bucket, the
bucket into another and back, and computes a norm per tensor; under bf16 it also looks for
infinities tensor by tensor. `one_norm` computes one norm, which also shows whether the gradient is
finite. `FlatGradients` needs no hooks where a rank holds all gradients until the step anyway: under
ZeRO 1, and on one rank under every stage. docs/step.md says how much time each saves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of which one norm is taken: a CPU's sum of 10^8 squares in fp32 is off by a hundredth.
CHUNK = 1 << 20


def total_norm(gradients: list[Tensor], group: Any = None) -> float:
    """The L2 norm of this rank's gradients and those of all ranks of the group, in one read of the
    device; inf or nan where one of them is not finite."""
    chunks = [c for g in gradients for c in g.detach().view(-1).split(CHUNK)]
    squares = torch.stack(torch._foreach_norm(chunks, 2, dtype=torch.float32)).square().sum()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(squares, group=group)
    return float(squares) ** 0.5


def one_norm(optimizer: Any, stage: int) -> None:
    """Let a ZeRO optimizer take one norm, and skip the step where it is not finite. One whose
    gradients are on the host takes its own, which DeepSpeed has from the way there."""
    if optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload:
        return
    group = optimizer.dp_process_group

    def norm() -> float:
        parts = optimizer.averaged_gradients.values()
        return total_norm([g for part in parts for g in part], group)

    def clip(gradients: list[Tensor], norm: float) -> None:
        factor = optimizer.clip_grad / (norm + 1e-6) if optimizer.clip_grad > 0 else 1.0
        if factor < 1:
            torch._foreach_mul_(gradients, factor)

    if stage == 3:
        optimizer.has_overflow = lambda partition_gradients=True: False
        optimizer._get_norm_groups = lambda: [torch.tensor(norm())]  # of the host
    else:
        optimizer.check_overflow = lambda partition_gradients=True: None
        optimizer.scaled_global_norm = norm
        optimizer.unscale_and_clip_grads = clip
        # Every step points all parameters to the flat weights, where they are since the start.
        optimizer._update_model_bit16_weights = lambda group: None


class FlatPartition(list[Tensor]):
    """This rank's part of a group's gradients, as DeepSpeed's step takes it where it is flat."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


class FlatGradients:
    """The gradients of DeepSpeed's ZeRO optimizer (stage 1 or 2) without its hooks and buckets.

    Micro-batches add up in the parameters' own `grad`. At the end of a step a group's are joined in
    one copy and, on several ranks, one reduce-scatter leaves every rank its part of the mean.
    """

    def __init__(self, engine: Any, each: bool = False) -> None:
        """each: join the gradients after every micro-batch, as those of a CUDA graph need it."""
        self.engine, self.optimizer = engine, engine.optimizer
        for hook in self.optimizer._grad_acc_hooks:
            hook.remove()
        self.optimizer._grad_acc_hooks = []
        engine.allreduce_gradients = self.reduce
        # What they are summed in: bf16 gradients perhaps in fp32.
        self._dtype = self.optimizer.gradient_accumulation_dtype
        self._each = each or self._dtype != self.optimizer.dtype
        self.sums: dict[int, Tensor] = {}  # by group, of the micro-batches so far

    @torch.no_grad()
    def reduce(self, bucket_size: int = 0) -> None:
        """After a backward pass, in place of DeepSpeed's `allreduce_gradients`."""
        last = self.engine.is_gradient_accumulation_boundary()
        if not last and not self._each:
            return
        for number, group in enumerate(self.optimizer.bit16_groups):
            flat = self._joined(number, group)
            if self._each:
                before = self.sums.pop(number, None)
                flat = flat.to(self._dtype) if before is None else before.add_(flat)
                self.sums[number] = flat
            if last:
                self.sums.pop(number, None)
                part = FlatPartition(self._own(number, flat))
                self.optimizer.averaged_gradients[number] = part

    def _joined(self, number: int, group: list[Tensor]) -> Tensor:
        """The gradients of a group one after another, padded as its weights are; they are freed."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        left = self.optimizer.bit16_groups_flat[number].numel() - sum(p.numel() for p in group)
        if left:
            parts.append(parts[0].new_zeros(left))
        for p in group:
            p.grad = None
        return self.optimizer.flatten(parts)

    def _own(self, number: int, flat: Tensor) -> Tensor:
        """This rank's part of the mean over ranks."""
        group = self.optimizer.real_dp_process_group[number]
        world = dist.get_world_size(group)
        if world == 1:
            return flat
        flat = flat.to(self.optimizer.communication_data_type).div_(world)
        own = flat.new_empty(flat.numel() // world)
        dist.reduce_scatter_tensor(own, flat, group=group)
        return own

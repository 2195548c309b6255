"""Muon for the matrices of the transformer blocks, AdamW for all the rest (ZeRO 0 to 2).

Keller Jordan 2024 (https://kellerjordan.github.io/posts/muon/), per matrix W [r, c]:

    m ← 0.95 m + 0.05 g;  u ← 0.05 g + 0.95 m  (Nesterov)
    X ← u / |u|;  five times X ← a X + (b A + c A A) X with A = X Xᵀ
    W ← W - lr (0.2 √max(r, c) X + weight decay W)

The factor gives X the size of AdamW's updates, so that one learning rate and one weight decay serve
both (Liu et al. 2025, arXiv:2502.16982). q, k and v of a `qkv` weight are three matrices.

DeepSpeed's own Muon (0.19.8) is not used: its Newton-Schulz casts to bf16 and goes through
torch.compile on a CPU too, so that it follows no plain loop and needs a compiler there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.config.plan import RunPlan, asks_for
from pipeline.errors import UserError

MOST_STAGE = 2  # of ZeRO
MOMENTUM, STEPS, COEFFICIENTS = 0.95, 5, (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of AdamW's updates


def moments(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the state that a parameter of the group has, beside the step count."""
    return ("momentum",) if "shapes" in group else ("exp_avg", "exp_avg_sq")


def section(plan: RunPlan) -> dict[str, Any]:
    """What DeepSpeed's configuration says of the optimizer. UserError for what would move parts of
    a matrix to where they are not looked for."""
    zero = plan.config.get("zero_optimization", {})
    for key in ("round_robin_gradients", "offload_optimizer", "cpu_offload", "parameter_alignment"):
        if asks_for(zero, key):
            raise UserError(
                f"optimizer.kind muon needs a ds_config without zero_optimization.{key}"
            )
    return {"zero_allow_untested_optimizer": True}


def build(module: nn.Module, groups: list[dict[str, Any]], plan: RunPlan) -> Optimizer | None:
    """The optimizer, every group cut into its matrices of blocks and the rest."""
    names = {id(p): name for name, p in module.named_parameters()}
    made = []
    for group in groups:
        matrix = [p for p in group["params"] if is_matrix(names[id(p)], p)]
        rest = [p for p in group["params"] if not is_matrix(names[id(p)], p)]
        shapes = [matrices(names[id(p)], p) for p in matrix]
        made += [{**group, "params": matrix, "shapes": shapes}] if matrix else []
        made += [{**group, "params": rest}] if rest else []
    return Muon(made, lr=plan.lr, betas=plan.optimizer.betas, eps=plan.optimizer.eps)


def describe() -> str:
    """A line for the log."""
    return "optimizer: Muon for the matrices of the blocks, AdamW for the rest"


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of a transformer block."""
    return parameter.ndim == 2 and "blocks." in name


def matrices(name: str, parameter: Tensor) -> tuple[int, int, int]:
    """A weight as (matrices, rows, columns)."""
    rows, columns = parameter.shape
    parts = 3 if name.endswith("qkv.weight") else 1
    return parts, rows // parts, columns


def orthogonalise(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly (singular values 0.7 to 1.2), of x [n, r, c].

    Newton-Schulz; in bf16 on a GPU, as Keller Jordan does, and in x's own precision elsewhere.
    """
    a, b, c = COEFFICIENTS
    y = x.bfloat16() if x.is_cuda else x
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


class Muon(Optimizer):
    """Groups with `shapes` take Muon's step, the others AdamW's.

    A group holds its parameters or, under ZeRO 1 and 2, this rank's part of them all, flat: the
    parts of all ranks are gathered, and each rank orthogonalises the matrices that reach into its
    own. Every rank must step the same groups in the same order, as DeepSpeed does.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            flat = "shapes" in group and group["params"][0].ndim == 1
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if "shapes" not in group:
                    self._adamw(parameter, group)
                    continue
                look_ahead = self._momentum(parameter)
                if flat:
                    update = _own_part(look_ahead, group["shapes"])
                else:
                    update = _update(look_ahead, group["shapes"][number]).view_as(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Count a step and move the momentum; Nesterov's look-ahead at it."""
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "momentum": torch.zeros_like(parameter)}
        state["step"] += 1
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in moments(group)} | {"step": 0}
        state["step"] += 1
        (first, second), (lr, step) = group["betas"], (group["lr"], state["step"])
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], root, value=-lr / (1 - first**step))


def _update(look_ahead: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The update of the matrices [n, r, c] of one weight."""
    return orthogonalise(look_ahead.view(shape)) * (RMS * math.sqrt(max(shape[1:])))


def _own_part(part: Tensor, shapes: list[tuple[int, int, int]]) -> Tensor:
    """The update of this rank's flat part of weights of `shapes`, one after another."""
    world, rank = dist.get_world_size(), dist.get_rank()
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part.contiguous())
    every = torch.cat(parts)
    update, first = torch.zeros_like(part), 0
    begin, end = rank * len(part), (rank + 1) * len(part)
    for shape in shapes:
        last = first + math.prod(shape)
        low, high = max(first, begin), min(last, end)
        if low < high:
            mine = _update(every[first:last], shape).flatten()[low - first : high - first]
            update[low - begin : high - begin] = mine
        first = last
    return update

"""AdamW (Loshchilov & Hutter 2019): DeepSpeed's fused one, or torch's without a compiler."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from pipeline.config.plan import RunPlan
from pipeline.runtime import ops

MOST_STAGE = 3  # of ZeRO


def moments(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the state that a parameter of the group has, beside the step count."""
    return ("exp_avg", "exp_avg_sq")


def section(plan: RunPlan) -> dict[str, Any]:
    """What DeepSpeed's configuration says of the optimizer."""
    o = plan.optimizer
    params = {"lr": plan.lr, "betas": list(o.betas), "eps": o.eps, "weight_decay": 0.0}
    if ops.problem():
        params |= {"torch_adam": True, "fused": True}
    return {"optimizer": {"type": "AdamW", "params": params}}


def build(module: nn.Module, groups: list[dict[str, Any]], plan: RunPlan) -> Optimizer | None:
    """None: DeepSpeed builds it from the section."""
    return None


def describe() -> str:
    """A line for the log."""
    if not ops.problem():
        return "optimizer: DeepSpeed's fused AdamW"
    return f"optimizer: torch's fused AdamW (without DeepSpeed's ops: {ops.problem()})"

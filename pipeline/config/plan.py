"""How a training runs: the stage that DeepSpeed has, flat gradients, compiled blocks, graphs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from pipeline.config.installed import source
from pipeline.config.schema import OptimizerRecipe
from pipeline.errors import UserError
from shard_tools.cli import counted


@dataclass(frozen=True)
class RunPlan:
    """How a training runs on these ranks: DeepSpeed's configuration and what follows from it.

    config: all of it but the optimizer, which the engine adds (runtime/optimizers). lr: the peak.
    negatives: whether they come from the micro-batch of all ranks. exchanges: whether ranks send
    each other anything while the loss is computed. may_fail: which of compile and cuda_graphs are
    "auto": what cannot be compiled or captured is then run without. off: which of them is off on a
    GPU though it is "auto", and why.
    """

    config: dict[str, Any]
    optimizer: OptimizerRecipe
    lr: float
    stage: int
    world: int
    micro_batch: int
    accumulation: int
    precision: str
    precision_reason: str
    negatives: bool
    checkpointing: bool
    compile: bool
    cuda_graphs: bool
    watchdog_seconds: float
    exchanges: bool = False
    may_fail: Set[str] = frozenset()
    off: tuple[str, ...] = ()

    @property
    def pooled(self) -> str:
        """What the loss takes from all images of a micro-batch on all ranks; "" where nothing."""
        if self.negatives:
            return "negatives"
        return "statistics of batch norm" if self.exchanges else ""

    def describe(self) -> list[str]:
        """The plan as lines of a log."""
        meaning = {"autocast": "products in bf16, weights and gradients in fp32"}
        reasons = [meaning.get(self.precision, ""), self.precision_reason]
        why = f" ({'; '.join(filter(None, reasons))})" if any(reasons) else ""
        size = self.world * self.micro_batch * self.accumulation
        parts = (
            counted(self.world, "rank"),
            counted(self.micro_batch, "image"),
            counted(self.accumulation, "accumulation step"),
        )
        lines = [f"precision: {self.precision}{why}", f"batch: {size} = {' × '.join(parts)}"]
        if self.pooled and self.accumulation > 1:
            images = self.world * self.micro_batch
            lines.append(f"{self.pooled}: from the {images} images of one micro-batch on all ranks")
        if self.checkpointing:
            lines.append("gradient checkpointing: blocks are recomputed in the backward pass")
        if self.compile:
            lines.append("compile: the first steps compile the blocks")
        if self.cuda_graphs:
            lines.append("cuda_graphs: forward and backward of a micro-batch are one CUDA graph")
        return [*lines, *self.off]


# Steps under which `compile` "auto" is false: compiling takes as long as hundreds of them.
SHORT = 1000
# Keys of `zero_optimization` under which a rank's part is not one piece of a flat group on its
# device, and keys that ask for DeepSpeed's own way of reducing.
_CUT_OTHERWISE = (
    "offload_optimizer", "offload_param", "cpu_offload", "round_robin_gradients",
    "parameter_alignment", "zenflow",
)  # fmt: skip
_REDUCED_OTHERWISE = ("overlap_comm",)


def deepspeed_stage(plan: RunPlan) -> int:
    """The ZeRO stage that DeepSpeed runs a plan under.

    One rank has nothing to share: its stage 3 would cut every parameter into one piece and gather
    it, and runs as stage 2, unless something is kept on the host.
    """
    if _asks(plan, _CUT_OTHERWISE):
        return plan.stage
    if plan.stage == 3 and plan.world == 1:
        return 2
    return stage_with_graphs(plan.stage, plan.world) if plan.cuda_graphs else plan.stage


def stage_with_graphs(stage: int, ranks: int) -> int:
    """The stage under which DeepSpeed runs CUDA graphs. Stage 2 frees gradients while the backward
    pass runs, and stage 0 reduces them there, which a graph cannot: they run as stage 1."""
    return 1 if stage == 0 or (stage == 2 and ranks > 1) else stage


def takes_flat(plan: RunPlan) -> bool:
    """Whether `FlatGradients` serves a plan: a rank holds all gradients until the step anyway."""
    stage = deepspeed_stage(plan)
    if stage not in (1, 2) or _asks(plan, _CUT_OTHERWISE):
        return False
    if plan.world == 1:
        return True
    config = plan.config
    if plan.precision == "bf16" and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        return False  # of these DeepSpeed's stage 1 has another optimizer, which skips no step
    listed = config.get("torch_autocast", {}).get("lower_precision_safe_modules")
    scaled = config.get("prescale_gradients") or config.get("gradient_predivide_factor", 1.0) != 1
    return stage == 1 and not (listed or scaled or _asks(plan, _REDUCED_OTHERWISE))


def _asks(plan: RunPlan, keys: tuple[str, ...]) -> bool:
    return any(asks_for(plan.config.get("zero_optimization", {}), key) for key in keys)


def asks_for(zero: dict[str, Any], key: str) -> bool:
    """Whether a `zero_optimization` asks for what a key is for: the device of an offload section,
    unless it says another, is none."""
    value = zero.get(key)
    if key.startswith("offload_") and isinstance(value, dict):
        return value.get("device", "none") != "none"
    return bool(value)


def why_no_graphs(plan: RunPlan) -> str:
    """Why the micro-batches of a plan cannot be captured as CUDA graphs; "" if they can."""
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if plan.checkpointing:
        return "excludes gradient_checkpointing"
    if not takes_flat(dataclasses.replace(plan, cuda_graphs=True)):
        return (
            "needs zero_optimization.stage 0 to 2 (3 on one rank), with nothing offloaded, no "
            "overlap_comm and, on several ranks, no fp32 sums of bf16 gradients: otherwise "
            "DeepSpeed reduces gradients while the backward pass runs"
        )
    if plan.exchanges and plan.world > 1:
        return (
            "excludes communication between ranks while the loss is computed: negatives, "
            "statistics of batch norm"
        )
    return ""


def most_stage(kind: str) -> int:
    """The last ZeRO stage that an optimizer works under, read from its module without torch."""
    text = source("pipeline", f"runtime/optimizers/{kind}.py")
    found = re.search(r"^MOST_STAGE = (\d)", text, re.M)
    return int(found[1]) if found else 3


def check_stage(kind: str, stage: int, most: int) -> None:
    """UserError where an optimizer does not work under a ZeRO stage."""
    if stage > most:
        raise UserError(
            f"optimizer.kind {kind} does not work under ZeRO stage {stage}, which cuts every "
            f"matrix: use a ds_config with zero_optimization.stage {most} or lower"
        )


def settle(plan: RunPlan, compiled: bool | str, graphs: bool | str) -> RunPlan:
    """The plan with `compile` and `cuda_graphs` of a ds_config: true, false or "auto", which is
    true where it can be. UserError where true cannot be."""
    import torch

    may_fail = {k for k, v in (("compile", compiled), ("cuda_graphs", graphs)) if v == "auto"}
    gpu, off = torch.cuda.is_available(), []
    if compiled == "auto":
        compiled = gpu and deepspeed_stage(plan) < 3
        if gpu and not compiled:
            off.append("compile: off (needs zero_optimization.stage 0 to 2)")
    problem = why_no_graphs(plan) if graphs else ""
    if graphs is True and problem:
        raise UserError(f"cuda_graphs of the ds_config {problem}: leave it out")
    if gpu and problem:
        off.append(f"cuda_graphs: off ({problem})")
    return dataclasses.replace(
        plan, compile=bool(compiled), cuda_graphs=bool(graphs and not problem), may_fail=may_fail,
        off=tuple(off),
    )  # fmt: skip


def for_steps(plan: RunPlan, steps: int) -> RunPlan:
    """The plan for a schedule of this many steps: in a short one compiling does not pay."""
    if not plan.compile or "compile" not in plan.may_fail or steps >= SHORT:
        return plan
    why = f"compile: off (a run of {counted(steps, 'step')} is too short for it to pay)"
    return dataclasses.replace(plan, compile=False, off=(*plan.off, why))

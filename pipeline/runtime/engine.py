"""The engine: DeepSpeed's start and step, unsharded weights and moments.

The only module that imports deepspeed when it is imported.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.command import check_environment
from pipeline.config.plan import RunPlan, deepspeed_stage, takes_flat
from pipeline.distributed import (
    Ranks,
    any_rank,
    can_build,
    cores_per_rank,
    device_of,
    free_port,
    joining,
    prepare_deepspeed,
    unlink_buffer,
    wait_at_most,
)
from pipeline.errors import UserError
from pipeline.method.positions import SmallerTables
from pipeline.runtime import ops
from pipeline.runtime.compiled import compile_blocks
from pipeline.runtime.gradients import FlatGradients, one_norm
from pipeline.runtime.graphs import CaptureError, MicroStepGraph
from pipeline.runtime.optimizers import optimizer_of
from pipeline.runtime.watchdog import FIRST_PATIENCE

prepare_deepspeed()

import deepspeed
import deepspeed.comm
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

# A learning rate, or what gives it for a group of parameters.
Rate = float | Callable[[dict[str, Any]], float]


def init_ranks() -> Ranks:
    """Join the process group (env of deepspeed, torchrun or launch.sh; alone without one).

    Until a StopSignal listens, SIGTERM ends the process, also while it waits for other ranks.
    Raises UserError where the environment is no rank's, or rank 0's port is taken or not reached.
    """
    check_environment()
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }.items():
        os.environ.setdefault(key, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    local_world = int(
        os.environ.get("LOCAL_SIZE")
        or os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ["WORLD_SIZE"]
    )
    device = device_of(local_rank)
    if device.type == "cuda" and get_accelerator()._name == "cpu":
        raise UserError(
            "DS_ACCELERATOR is cpu, but torch sees a GPU: leave it out to train there, or set "
            "CUDA_VISIBLE_DEVICES to an empty text too, to train on the CPU"
        )
    ops.prepare()
    if ops.problem():
        _without_built_ops()
    with contextlib.redirect_stdout(io.StringIO()), joining():  # it prints which op it has loaded
        deepspeed.init_distributed(verbose=False)
        # Made here, where all ranks have just met: later it would wait for one that has died.
        groups._clone_world_group()
        cores = cores_per_rank()  # the first thing that NCCL does
        unbuilt = any_rank(bool(ops.problem()))  # the first thing that goes over gloo
    if unbuilt:
        ops.give_up("another rank has none")
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    if device.type == "cpu" and world > 1:
        unlink_buffer(rank)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)
    return Ranks(rank, world, local_rank, local_world, device, cores)


def _without_built_ops() -> None:
    """Tell DeepSpeed's communication not to compile its shared-memory reduction."""
    name = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if isinstance(name, OpBuilder):
        deepspeed.ops.__compatible_ops__[name.NAME] = False


def build_ops() -> list[str]:
    """Compile the fused ops of this machine once (set-up); the names of those built.

    RuntimeError where that fails.
    """
    built = ops.prepare()
    if ops.problem() and can_build():
        raise RuntimeError(ops.problem())
    return built


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What DeepSpeed's own checks refuse of a ds_config becomes a UserError in its words. They are
    plain exceptions of its files with a text; what is raised elsewhere is a slip."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        text = " ".join(str(error).split())
        if not text or not Path(last).is_relative_to(Path(deepspeed.__file__).parent):
            raise
        raise UserError(f"DeepSpeed refuses the ds_config: {text}") from error


class Engine:
    """A DeepSpeed engine around an objective, with one optimizer step as its unit."""

    def __init__(self, objective: nn.Module, groups: list[dict[str, Any]], plan: RunPlan) -> None:
        self.plan = plan
        self.module = objective
        for part in objective.modules():
            if plan.checkpointing and hasattr(part, "grad_checkpointing"):
                part.grad_checkpointing = True  # type: ignore[assignment]
        if plan.compile:
            compile_blocks(objective, may_fail="compile" in plan.may_fail)
        self.kind = optimizer_of(plan)
        # Of ZeRO, as DeepSpeed runs it: below the plan's where one rank has nothing to share.
        self.stage = deepspeed_stage(plan)
        self.config = copy.deepcopy(plan.config | self.kind.section(plan))
        if self.stage:  # with graphs also of a ds_config without the section
            self.config.setdefault("zero_optimization", {})["stage"] = self.stage
        # DeepSpeed's count of samples per second waits for the device twice in a micro-batch.
        self.config.setdefault("timers", {"throughput": {"enabled": False}})
        client = self.kind.build(objective, groups, plan)
        own = client.param_groups if client else groups
        # What the optimizer keeps per parameter, by the parameter's identity.
        self._moments = {id(p): self.kind.moments(g) for g in own for p in g["params"]}
        # DeepSpeed keeps it for the whole process, where an engine before this one may have set it.
        deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        self._linear = nn.functional.linear  # in whose place stage 3 puts its own
        with _refusals():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=objective,
                optimizer=client,
                model_parameters=None if client else groups,
                config=copy.deepcopy(self.config),
            )
        if plan.watchdog_seconds:
            # NCCL ends a process that waits for ten minutes and says neither rank nor step; the
            # watchdog does, also in the first step (loop.py).
            longest = 2 * FIRST_PATIENCE * plan.watchdog_seconds
            wait_at_most(longest, None, deepspeed.utils.groups._clone_world_group())
        self.flat = FlatGradients(self.engine, plan.cuda_graphs) if takes_flat(plan) else None
        self.graph = None
        if plan.cuda_graphs:
            self.graph = MicroStepGraph(self._forward, objective, plan.accumulation)
        if self.stage == 0 and plan.world == 1:  # nothing to reduce: no buckets
            self.engine.enable_backward_allreduce = False
        if self.stage > 0:
            one_norm(self.optimizer, self.stage)
        self._norm: Tensor | None = None
        self.step_skipped = False  # the last step, since its gradient was not finite

    def adopt(self, teacher: nn.Module) -> None:
        """Move a teacher, which DeepSpeed does not know, to the module's device; its blocks are
        compiled where the module's are."""
        teacher.to(self.engine.device)
        if self.plan.compile:
            compile_blocks(teacher, may_fail="compile" in self.plan.may_fail)

    def resize(self) -> None:
        """Between two steps: the micro-batches to come have images of another size."""
        if self.graph is not None:
            self.graph.forget()

    def micro_step(self, lr: Rate, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch; the last of a step also updates the weights.

        lr: of groups without `lr_scale`, which multiplies it; or a function of the group. A step
        whose gradient is not finite on any rank leaves the weights as they are and sets
        `step_skipped`, under every stage.
        """
        found = self._replay(*inputs)
        if found is None:
            found = self.engine(*inputs)
            self.engine.backward(found[0])
        loss, terms = found
        self.update(lr)
        return loss.detach(), terms

    def _replay(self, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The micro-batch as a CUDA graph; None where there are none, or none can be captured."""
        if self.graph is None:
            return None
        try:
            found = self.graph.run(*inputs)
        except CaptureError as error:
            if "cuda_graphs" not in self.plan.may_fail:
                raise
            print(f"cuda_graphs: none can be captured here, kernels are launched one by one "
                  f"({str(error).splitlines()[0]})", file=sys.stderr, flush=True)  # fmt: skip
            self.graph = None
        if self.graph is None:  # and the error, which held the tensors of the failed pass, is gone
            self.module.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return None
        self.engine.allreduce_gradients()
        return found

    def _forward(self, *inputs: Any) -> Any:
        """The objective as DeepSpeed calls it, without the engine's own bookkeeping."""
        with deepspeed.runtime.torch_autocast.autocast_if_enabled(self.engine):
            return self.module(*inputs)

    def update(self, lr: Rate) -> None:
        """After a backward pass: count the micro-batch; after the last of a step, take the step."""
        if self.stage == 0 and self.engine.is_gradient_accumulation_boundary():
            # DeepSpeed tells no norm under stage 0 in fp32.
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
            self.step_skipped = not bool(self._norm.isfinite())
            if self.step_skipped:
                # What DeepSpeed's step would do, but for the update.
                self.module.zero_grad(set_to_none=True)
                self.engine.micro_steps += 1
                self.engine.global_steps += 1
                self.engine.skipped_steps += 1
                return
        for group in self.optimizer.param_groups:
            group["lr"] = lr(group) if callable(lr) else lr * group.get("lr_scale", 1.0)
        self.engine.step()
        if self.stage > 0:
            # DeepSpeed reads the norm in every step itself and leaves out what is not finite.
            self.step_skipped = bool(self.optimizer.overflow)

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[object]:
        """A context in which these parameters are whole on every rank, to be read (collective)."""
        if self.stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters)

    @contextlib.contextmanager
    def masters(self, parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
        """A context with the fp32 values of these parameters, whole on every rank (collective).

        Under bf16 those of the master weights, from which the model's are rounded.
        """
        if self.plan.precision != "bf16":
            with self.gathered(parameters):
                yield [p.detach() for p in parameters]
        elif self.stage == 3:
            yield [self._whole(p, "model").float() for p in parameters]
        else:
            yield self._joined_masters(parameters)

    def _joined_masters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Stages 1 and 2: the parts of all ranks, which do not overlap, joined by one sum."""
        sizes = [p.numel() for p in parameters]
        flat = torch.zeros(sum(sizes), device=parameters[0].device)
        parts = flat.split(sizes)
        for p, part in zip(parameters, parts, strict=True):
            mine = getattr(p, "_hp_mapping", None)
            if mine is not None:
                at = mine.lp_fragment_address
                part[at.start : at.start + at.numel].copy_(mine.hp_fragment)
        if self.plan.world > 1:
            torch.distributed.all_reduce(flat)
        return [  # what is frozen has no master weights
            part.view_as(p) if p.requires_grad else p.detach().float()
            for p, part in zip(parameters, parts, strict=True)
        ]

    def gradient_norm(self) -> float:
        """The global norm of the last step's gradients, before clipping; nan where not known."""
        norm = self._norm if self.stage == 0 else self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def full_state(self, kind: str = "model") -> dict[str, Tensor]:
        """All weights and buffers, or a moment (one of `moments`) of all that has it: unsharded,
        fp32, on the CPU; on rank 0 only (collective)."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters(kind).items():
            whole = self._whole(parameter, kind)
            if self.rank == 0:
                state[name] = whole.float().cpu()
        if self.rank == 0 and kind == "model":
            state |= {k: b.float().cpu().clone() for k, b in self.buffers().items()}
        return state

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of a checkpoint, by name: all but tables that each start makes again."""
        tables = [part for part in self.module.modules() if isinstance(part, SmallerTables)]
        made = {id(buffer) for part in tables for buffer in part.buffers()}
        return {k: b for k, b in self.module.named_buffers() if id(b) not in made}

    def parameters(self, kind: str) -> dict[str, nn.Parameter]:
        """The parameters of the model, or those that have a moment, by name."""
        named = self.module.named_parameters()
        return {k: p for k, p in named if kind == "model" or kind in self._moments.get(id(p), ())}

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of all that the optimizer keeps per parameter."""
        return tuple(dict.fromkeys(name for names in self._moments.values() for name in names))

    @property
    def base_optimizer(self) -> Any:
        """The optimizer inside ZeRO's: its state has this rank's moments."""
        return self.engine.basic_optimizer

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """A parameter or its moment, whole on every rank (collective)."""
        if self.stage > 0 and parameter.requires_grad:
            if kind == "model":
                return safe_get_full_fp32_param(parameter)
            return safe_get_full_optimizer_state(parameter, kind)
        if kind == "model":
            with self.gathered([parameter]):
                return parameter.detach().clone()
        # Stage 0: a parameter that never had a gradient has no moments.
        return self.base_optimizer.state[parameter].get(kind, torch.zeros_like(parameter))

    @torch.no_grad()
    def put(self, target: Any, kind: str, value: Tensor) -> None:
        """Write a whole fp32 value to where this rank keeps its part of it."""
        stage = self.stage if target.requires_grad else 0
        if kind == "model":
            partitioned = self.stage == 3 and isinstance(target, nn.Parameter)
            with deepspeed.zero.GatheredParameters([target], modifier_rank=0, enabled=partitioned):
                target.copy_(value)
            if stage in (1, 2):
                safe_set_full_fp32_param(target, value.to(target.device))
        elif stage == 0:
            self.base_optimizer.state[target][kind].copy_(value)
        elif stage < 3:
            safe_set_full_optimizer_state(target, value.to(target.device), kind)
        if stage == 3:  # DeepSpeed's full setters forget the padding of the last rank
            size = target.ds_tensor.numel()
            start = size * self.rank
            part = value.flatten()[start : start + size]
            part = nn.functional.pad(part, (0, size - part.numel())).to(target.ds_tensor.device)
            if kind == "model":
                safe_set_local_fp32_param(target, part)
            else:
                safe_set_local_optimizer_state(target, part, kind)

    @property
    def rank(self) -> int:
        """This process's rank."""
        return int(deepspeed.comm.get_rank())

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.engine.destroy()
        nn.functional.linear = self._linear

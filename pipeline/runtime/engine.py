"""The engine around DeepSpeed: joining the ranks, the training step, full weights and moments.

No other module imports deepspeed at import time.
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
    cannot_build,
    cores_per_rank,
    device_of,
    free_port,
    prepare_deepspeed,
    stop_with_torchrun,
    unlink_buffer,
    wait_at_most,
)
from pipeline.errors import UserError
from pipeline.method.vit import SmallerTables
from pipeline.rendezvous import MEET, joining
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

# A learning rate, or a function of the parameter group that returns it.
Rate = float | Callable[[dict[str, Any]], float]


def init_ranks() -> Ranks:
    """Join the process group that deepspeed, torchrun or launch.sh describes in the environment;
    without one this process is the only rank.

    SIGTERM ends the process while it waits for other ranks: StopSignal handles it only later.
    Raises UserError if the environment does not describe a rank, or if rank 0's port is taken, is
    another run's or cannot be reached.
    """
    check_environment()
    stop_with_torchrun()
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if "WORLD_SIZE" not in os.environ:  # no launcher: where to meet is left from another run
        os.environ |= here
    for key, value in ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | here).items():
        os.environ.setdefault(key, value)
    # Of mpirun above the launcher: LOCAL_RANK counts, and DeepSpeed refuses another number here.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = device_of(local_rank)
    if device.type == "cuda" and get_accelerator()._name == "cpu":
        raise UserError(
            "DS_ACCELERATOR is cpu, but torch sees a GPU: unset it to train on the GPU, or set "
            "CUDA_VISIBLE_DEVICES to an empty text too, to train on the CPU"
        )
    ops.prepare()
    if ops.problem():
        _without_built_ops()
    quiet = contextlib.redirect_stdout(io.StringIO())  # DeepSpeed prints the op it loads
    with quiet, joining():
        deepspeed.init_distributed(verbose=False, init_method=MEET)
        # Made while all ranks are known to be there: later it could wait for one that has died.
        groups._clone_world_group()
        cores = cores_per_rank()  # the first collective over NCCL
        unbuilt = any_rank(bool(ops.problem()))  # the first over gloo
    if unbuilt:
        ops.give_up("another rank has none")
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    if device.type == "cpu" and world > 1:
        unlink_buffer(rank)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)
    return Ranks(rank, world, local_rank, device, cores)


def _without_built_ops() -> None:
    """Keep DeepSpeed's communication from compiling its shared-memory reduction."""
    name = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if isinstance(name, OpBuilder):
        deepspeed.ops.__compatible_ops__[name.NAME] = False


def build_ops() -> list[str]:
    """Compile DeepSpeed's fused ops for this machine (part of set-up); the names of those built.

    RuntimeError if that fails.
    """
    built = ops.prepare()
    if ops.problem() and not cannot_build():
        raise RuntimeError(ops.problem())
    return built


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn an error of DeepSpeed's own checks of a ds_config into a UserError with its text. These
    are plain exceptions with a message, raised in DeepSpeed's files; any other is a bug."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        text = " ".join(str(error).split())
        if not text or not Path(last).is_relative_to(Path(deepspeed.__file__).parent):
            raise
        raise UserError(f"DeepSpeed refuses the ds_config: {text}") from error
    except RuntimeError as error:
        if "Unable to JIT load the async_io op" not in str(error):
            raise
        raise UserError(
            "the ds_config offloads to nvme, for which DeepSpeed's async_io op cannot be compiled "
            "here: install libaio with its headers (libaio-dev), or offload to cpu"
        ) from None


def _link_as_laid_out(optimizer: Any) -> None:
    """Let the parameters of a ZeRO 1 or 2 optimizer know where their fp32 parts are.

    With round_robin_gradients a group is flattened in another order than the model's, in which
    DeepSpeed 0.19.8 links it: full weights and moments would be read from, and written to, other
    parameters.
    """
    if not optimizer.round_robin_gradients:
        return
    ordered = optimizer.bit16_groups
    optimizer.bit16_groups = optimizer.round_robin_bit16_groups
    optimizer._link_all_hp_params()
    optimizer.bit16_groups = ordered


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
        # The ZeRO stage that DeepSpeed runs, which can be below the plan's on one rank.
        self.stage = deepspeed_stage(plan)
        self.config = copy.deepcopy(plan.config | self.kind.section(plan))
        if self.stage:  # the ds_config may lack the section: with graphs stage 0 runs as 1
            self.config.setdefault("zero_optimization", {})["stage"] = self.stage
        # DeepSpeed's timer of samples per second synchronises the device twice per micro-batch.
        self.config.setdefault("timers", {"throughput": {"enabled": False}})
        client = self.kind.build(objective, groups, plan)
        own = client.param_groups if client else groups
        # What the optimizer keeps per parameter, by the parameter's identity.
        self._moments = {id(p): self.kind.moments(g) for g in own for p in g["params"]}
        # A global of DeepSpeed's, which an earlier engine in this process may have set.
        deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        self._linear = nn.functional.linear  # stage 3 replaces it
        with _refusals():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=objective,
                optimizer=client,
                model_parameters=None if client else groups,
                config=copy.deepcopy(self.config),
            )
        if plan.watchdog_seconds:
            # NCCL ends a process after ten minutes of waiting and names neither rank nor step. The
            # watchdog names both, so it must be the first, also in the longer first step (loop.py).
            longest = 2 * FIRST_PATIENCE * plan.watchdog_seconds
            wait_at_most(longest, None, deepspeed.utils.groups._clone_world_group())
        self.flat = FlatGradients(self.engine, plan.cuda_graphs) if takes_flat(plan) else None
        self.graph = None
        if plan.cuda_graphs:
            self.graph = MicroStepGraph(self._forward, objective, plan.accumulation)
        if self.stage == 0 and plan.world == 1:  # nothing to reduce: no buckets
            self.engine.enable_backward_allreduce = False
        if self.stage in (1, 2):
            _link_as_laid_out(self.optimizer)
        if self.stage > 0:
            one_norm(self.optimizer, self.stage)
        self._norm: Tensor | None = None
        self.step_skipped = False  # whether the last step had a gradient that is not finite

    def adopt(self, teacher: nn.Module) -> None:
        """Move a teacher, which DeepSpeed does not know of, to the module's device, and compile its
        blocks if the module's are compiled."""
        teacher.to(self.engine.device)
        if self.plan.compile:
            compile_blocks(teacher, may_fail="compile" in self.plan.may_fail)

    def resize(self) -> None:
        """Called between two steps when the image size changes: drops the CUDA graph."""
        if self.graph is not None:
            self.graph.forget()

    def micro_step(self, lr: Rate, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch; the last of a step also updates the weights.

        lr: multiplied by a group's `lr_scale` if it has one; or a function of the group. If the
        gradient is not finite on any rank, the step leaves the weights unchanged and sets
        `step_skipped`, under every ZeRO stage.
        """
        found = self._replay(*inputs)
        if found is None:
            found = self.engine(*inputs)
            self.engine.backward(found[0])
        loss, terms = found
        self.update(lr)
        return loss.detach(), terms

    def _replay(self, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Run the micro-batch as a CUDA graph; None if there are no graphs or capturing fails."""
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
        if self.graph is None:  # outside `except`, so that the error no longer holds tensors
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
        """Count the micro-batch after its backward pass; the last one of a step takes the step."""
        if self.stage == 0 and self.engine.is_gradient_accumulation_boundary():
            # DeepSpeed does not compute the norm under stage 0 in fp32.
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
            self.step_skipped = not bool(self._norm.isfinite())
            if self.step_skipped:
                # As DeepSpeed's step, without the update.
                self.module.zero_grad(set_to_none=True)
                self.engine.micro_steps += 1
                self.engine.global_steps += 1
                self.engine.skipped_steps += 1
                return
        for group in self.optimizer.param_groups:
            group["lr"] = lr(group) if callable(lr) else lr * group.get("lr_scale", 1.0)
        self.engine.step()
        if self.stage > 0:
            # DeepSpeed reads the norm in every step anyway and skips one that is not finite.
            self.step_skipped = bool(self.optimizer.overflow)

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[object]:
        """A context in which every rank can read these parameters unsharded (collective)."""
        if self.stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters)

    @contextlib.contextmanager
    def masters(self, parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
        """A context with the unsharded fp32 values of these parameters on every rank (collective).

        Under bf16 these are the master weights, of which the model's weights are roundings.
        """
        if self.plan.precision != "bf16":
            with self.gathered(parameters):
                yield [p.detach() for p in parameters]
        elif self.stage == 3:
            yield [self._full(p, "model").float() for p in parameters]
        else:
            yield self._gathered_masters(parameters)

    def _gathered_masters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Stages 1 and 2: every rank fills in its own part, and one sum joins the parts."""
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
        return [  # frozen parameters have no master weights
            part.view_as(p) if p.requires_grad else p.detach().float()
            for p, part in zip(parameters, parts, strict=True)
        ]

    def gradient_norm(self) -> float:
        """The global norm of the last step's gradients before clipping; nan if not known."""
        norm = self._norm if self.stage == 0 else self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def full_state(self, kind: str = "model") -> dict[str, Tensor]:
        """All weights and buffers by name, or one kind of `moments` of the parameters that have it:
        unsharded, fp32, on the CPU of rank 0; empty on other ranks (collective)."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters(kind).items():
            full = self._full(parameter, kind)
            if self.rank == 0:
                state[name] = full.float().cpu()
        if self.rank == 0 and kind == "model":
            state |= {k: b.float().cpu().clone() for k, b in self.buffers().items()}
        return state

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of a checkpoint by name: all but the tables that every start computes."""
        tables = [part for part in self.module.modules() if isinstance(part, SmallerTables)]
        computed = {id(buffer) for part in tables for buffer in part.buffers()}
        return {k: b for k, b in self.module.named_buffers() if id(b) not in computed}

    def parameters(self, kind: str) -> dict[str, nn.Parameter]:
        """All parameters by name (kind "model"), or those that have this kind of moment."""
        named = self.module.named_parameters()
        return {k: p for k, p in named if kind == "model" or kind in self._moments.get(id(p), ())}

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of what the optimizer keeps per parameter (exp_avg, …)."""
        return tuple(dict.fromkeys(name for names in self._moments.values() for name in names))

    @property
    def base_optimizer(self) -> Any:
        """The optimizer inside ZeRO's, whose state holds this rank's part of the moments."""
        return self.engine.basic_optimizer

    def _full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """A parameter (kind "model") or its moment, unsharded on every rank (collective)."""
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
    def set_full(self, target: Any, kind: str, value: Tensor) -> None:
        """Write an unsharded fp32 value into what this rank keeps of it. target: a parameter, or a
        buffer; kind: "model" or a moment."""
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
        if stage == 3:  # DeepSpeed's full setters ignore the padding of the last rank
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

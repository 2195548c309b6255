"""The only module that imports deepspeed: configuration, start, step, whole weights and moments."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.recipe import Recipe
from pipeline.config.suggest import bundled, choices
from pipeline.distributed import Ranks, bf16_units, can_build, forget_buffer, free_port
from pipeline.errors import UserError

# DeepSpeed chooses its accelerator at import; without this it warns on every machine without one.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed compiles its fused ops with ninja, which lies beside this interpreter in a venv.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
# Compiled ops belong to this environment: a cache shared by several would be built over and over.
if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch)\.")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import deepspeed
import deepspeed.comm
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
# How it runs: what a file in ds_configs/ may say. None: any value DeepSpeed takes.
_MECHANICS: dict[str, set[str] | None] = {
    "zero_optimization": {
        name
        for key, field in DeepSpeedZeroConfig.model_fields.items()
        for name in (key, field.alias)
        if name
    },
    "bf16": {"enabled", "immediate_grad_update", "check_grad_overflow"},
    "activation_checkpointing": None,
    "aio": None,
    "communication_data_type": None,
    "comms_logger": None,
    "data_types": {"grad_accum_dtype"},
    "disable_python_gc": None,
    "dump_state": None,
    "flops_profiler": None,
    "memory_breakdown": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "steps_per_print": None,
    "gradient_checkpointing": None,
    "compile": None,
    "timers": None,
    "train_micro_batch_size_per_gpu": None,
    "wall_clock_breakdown": None,
    "watchdog_seconds": None,
    "zero_allow_untested_optimizer": None,
}
# What changes the result, and the recipe key that owns it.
_RECIPE_KEYS = {
    "optimizer": "optimizer",
    "scheduler": "optimizer.epochs, warmup_epochs and min_lr",
    "gradient_clipping": "optimizer.gradient_clipping",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size (accumulation is computed from it)",
    "lr": "optimizer.base_lr",
    "betas": "optimizer.betas",
    "weight_decay": "optimizer.weight_decay",
    "seed": "seed",
}

# DeepSpeed's stage 0 under bf16 was 0.04 off plain torch's loss, the other stages 0.006.
STAGE_0_BF16 = "bf16 needs zero_optimization.stage 1, 2 or 3"


@dataclass(frozen=True)
class Plan:
    """How one recipe runs on these ranks: DeepSpeed's configuration and what follows from it."""

    config: dict[str, Any]
    stage: int
    micro_batch: int
    accumulation: int
    precision: str
    notes: tuple[str, ...]
    checkpointing: bool = False
    compile: bool = False
    watchdog_seconds: float = 1800.0


def init_ranks() -> Ranks:
    """Join the process group (env of deepspeed, torchrun or launch.sh; alone without one)."""
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
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    if not can_build():
        _without_built_ops()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which op it has loaded
        deepspeed.init_distributed(verbose=False)
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    if device.type == "cpu" and world > 1:
        forget_buffer(rank)
    return Ranks(rank, world, local_rank, local_world, device)


def _without_built_ops() -> None:
    """Tell DeepSpeed's communication not to compile its shared-memory reduction."""
    name = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if isinstance(name, OpBuilder):
        deepspeed.ops.__compatible_ops__[name.NAME] = False


def build_ops() -> list[str]:
    """Compile the fused ops of this machine once (set-up); the names of those built."""
    if not can_build():
        return []
    built = []
    wanted = ["FusedAdamBuilder"] + ([] if torch.cuda.is_available() else ["ShareMemCommBuilder"])
    for wanted_name in wanted:
        builder = get_accelerator().create_op_builder(wanted_name)
        builder.load(verbose=False)
        built.append(builder.NAME)
    return built


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """A file of ds_configs/, checked key by key (DeepSpeed would ignore a misspelt one).

    Raises UserError naming the file and the key, and the recipe key where that one owns it.
    """
    path = bundled(path, DS_CONFIGS, ".json")
    if not path.exists():
        raise UserError(f"{path}: no such file{choices(path, DS_CONFIGS, '.json')}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object")
    for key, value in config.items():
        if key in _RECIPE_KEYS:
            raise UserError(f"{path}: {key!r} belongs to the recipe: {_RECIPE_KEYS[key]}")
        if key not in _MECHANICS:
            raise UserError(f"{path}: unknown key {key!r}; valid: {', '.join(_MECHANICS)}")
        known = _MECHANICS[key]
        if known is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key!r} must be an object, not {value!r}")
        for inner in value:
            if inner not in known:
                valid = ", ".join(sorted(known))
                raise UserError(f"{path}: unknown key '{key}.{inner}'; valid: {valid}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    wanted = config.get("bf16", {}).get("enabled", False)
    if not (isinstance(wanted, bool) or wanted == "auto"):
        raise UserError(f'{path}: bf16.enabled must be true, false or "auto", not {wanted!r}')
    if stage == 0 and wanted:
        raise UserError(f"{path}: {STAGE_0_BF16}")
    for key in ("gradient_checkpointing", "compile"):
        if not isinstance(config.get(key, False), bool):
            raise UserError(f"{path}: {key!r} must be true or false, not {config[key]!r}")
    patience = config.get("watchdog_seconds", 0)
    if isinstance(patience, bool) or not isinstance(patience, int | float) or not patience >= 0:
        raise UserError(f"{path}: watchdog_seconds must be a number from 0 up, not {patience!r}")
    if stage == 3 and config.get("compile"):
        raise UserError(f"{path}: compile needs zero_optimization.stage 0, 1 or 2")
    return config


def resolve_precision(config: dict[str, Any]) -> tuple[str, str]:
    """Replace `bf16.enabled: "auto"` in place; ("bf16" or "fp32", a line for the log).

    "auto" is bf16 on a GPU with bf16 units and fp32 elsewhere, so that a CPU run gives the same
    numbers whether or not the processor multiplies bf16 natively. true is bf16 on every CPU
    (emulated where the processor lacks it). UserError where a GPU cannot do what was asked for.
    """
    wanted = config.get("bf16", {}).get("enabled", False)
    gpu = torch.cuda.is_available()
    if wanted is True and gpu and not bf16_units():
        name = torch.cuda.get_device_name()
        raise UserError(f'bf16.enabled true: {name} has no bf16 units; use false or "auto"')
    if wanted is True and not config.get("zero_optimization", {}).get("stage", 0):
        raise UserError(STAGE_0_BF16)
    enabled = gpu and bf16_units() if wanted == "auto" else wanted
    if not enabled:
        if "bf16" in config:
            config["bf16"] = {"enabled": False}
        asked = wanted == "auto"
        why = " (auto: bf16 on a GPU with bf16 units only)" if asked else ""
        return "fp32", f"precision: fp32{why}"
    # A step that is not finite is never taken.
    config["bf16"] |= {"enabled": True, "check_grad_overflow": True}
    emulated = " (emulated: this processor has no bf16 units)" if not bf16_units() else ""
    return "bf16", f"precision: bf16{emulated}"


# Images of an "auto" micro-batch at the most, and on a CPU tokens too: of 128 images of 64 patches,
# or of about 50 of 224 x 224. A function of the recipe alone, since InfoNCE's negatives come from
# the micro-batch; where the speed no longer rises was measured (make bench-micro-batch).
MOST_IMAGES, MOST_TOKENS_ON_CPU = 128, 10_000


def auto_micro_batch(per_rank: int, patches: int) -> int:
    """The largest divisor of a rank's `per_rank` images per step within the limits above."""
    most = min(per_rank, MOST_IMAGES)
    if not torch.cuda.is_available():
        most = max(1, min(most, MOST_TOKENS_ON_CPU // (patches + 1)))
    return next(m for m in range(most, 0, -1) if per_rank % m == 0)


def make_plan(
    config: dict[str, Any], recipe: Recipe, world: int, patches: int | None = None
) -> Plan:
    """Split the recipe's batch over the ranks and fill in what the recipe owns.

    patches of an image, where the recipe's encoder does not say it; they limit the micro-batch
    that `train_micro_batch_size_per_gpu: "auto"` takes. UserError where the batch cannot be
    split.
    """
    notes = []
    per_rank, left = divmod(recipe.batch_size, world)
    if left or recipe.data.partitions % world:
        raise UserError(
            f"batch_size {recipe.batch_size} with data.partitions {recipe.data.partitions} cannot "
            f"be split over {world} ranks: both must be multiples of the number of ranks"
        )
    micro = config.get("train_micro_batch_size_per_gpu", "auto")
    if micro == "auto":
        micro = auto_micro_batch(per_rank, patches or recipe.encoder.patches)
    if not isinstance(micro, int) or micro < 1 or per_rank % micro:
        raise UserError(
            f"train_micro_batch_size_per_gpu {micro!r} does not divide the {per_rank} images per "
            f"rank of batch_size {recipe.batch_size} over {world} ranks"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    full = copy.deepcopy(config)
    checkpointing = full.pop("gradient_checkpointing", False)
    compiled = full.pop("compile", False)
    watchdog_seconds = float(full.pop("watchdog_seconds", Plan.watchdog_seconds))
    precision, note = resolve_precision(full)
    notes.append(note)
    o = recipe.optimizer
    torch_adam = not can_build()
    full["optimizer"] = {
        "type": "AdamW",
        "params": {"lr": recipe.lr, "betas": list(o.betas), "eps": o.eps, "weight_decay": 0.0}
        | ({"torch_adam": True, "fused": True} if torch_adam else {}),
    }
    notes.append(
        "optimizer: torch's fused AdamW (no compiler here to build DeepSpeed's: c++, ninja)"
        if torch_adam
        else "optimizer: DeepSpeed's fused AdamW"
    )
    full["gradient_clipping"] = o.gradient_clipping
    full["train_batch_size"] = recipe.batch_size
    full["train_micro_batch_size_per_gpu"] = micro
    full["gradient_accumulation_steps"] = per_rank // micro
    full.setdefault("steps_per_print", 10**9)
    notes.append(
        f"batch: {recipe.batch_size} = {world} ranks x {micro} x {per_rank // micro} micro-batches"
    )
    if recipe.teacher and per_rank > micro and recipe.measure.kind == "infonce":
        notes.append(f"negatives: from the {world * micro} images of one micro-batch on all ranks")
    if checkpointing:
        notes.append("gradient checkpointing: blocks are computed again in the backward pass")
    if compiled:
        notes.append("compile: the first steps compile the blocks")
    return Plan(
        full, stage, micro, per_rank // micro, precision, tuple(notes), checkpointing, compiled,
        watchdog_seconds,
    )  # fmt: skip


class Engine:
    """A DeepSpeed engine around an objective, with one optimizer step as its unit."""

    def __init__(self, objective: nn.Module, groups: list[dict[str, object]], plan: Plan) -> None:
        self.plan = plan
        self.module = objective
        for part in objective.modules():
            if plan.checkpointing and hasattr(part, "grad_checkpointing"):
                part.grad_checkpointing = True  # type: ignore[assignment]
            if plan.compile:
                for block in getattr(part, "blocks", ()):
                    block.compile(dynamic=False)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective, model_parameters=groups, config=copy.deepcopy(plan.config)
        )
        self._norm: Tensor | None = None
        self.step_skipped = False  # the last step, since its gradient was not finite

    def micro_step(self, lr: float, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch; the last of a step also updates the weights.

        lr: of groups without `lr_scale`, which multiplies it. A step whose gradient is not finite
        on any rank leaves the weights as they are and sets `step_skipped`, under every stage.
        """
        loss, terms = self.engine(*inputs)
        self.engine.backward(loss)
        if self.plan.stage == 0 and self.engine.is_gradient_accumulation_boundary():
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
                return loss.detach(), terms
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.engine.step()
        if self.plan.stage > 0:
            # DeepSpeed reads the norm in every step itself and leaves out what is not finite.
            self.step_skipped = bool(self.optimizer.overflow)
        return loss.detach(), terms

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[object]:
        """A context in which these parameters are whole on every rank, to be read (collective)."""
        if self.plan.stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters)

    def gradient_norm(self) -> float:
        """The global norm of the last step's gradients, before clipping; nan where not known."""
        norm = self._norm if self.plan.stage == 0 else self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def full_state(self, kind: str = "model") -> dict[str, Tensor]:
        """All weights and buffers, or a moment (`exp_avg`, `exp_avg_sq`) of all that is trained:
        whole, fp32, on the CPU; on rank 0 only (collective)."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters(kind).items():
            whole = self._whole(parameter, kind)
            if self.rank == 0:
                state[name] = whole.float().cpu()
        if self.rank == 0 and kind == "model":
            state |= {k: b.float().cpu().clone() for k, b in self.module.named_buffers()}
        return state

    def parameters(self, kind: str) -> dict[str, nn.Parameter]:
        """The parameters of the model, or those that have a moment, by name."""
        named = self.module.named_parameters()
        return {k: p for k, p in named if kind == "model" or p.requires_grad}

    @property
    def adam(self) -> Any:
        """The AdamW inside: its state has this rank's moments."""
        return self.engine.basic_optimizer

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """A parameter or its moment, whole on every rank (collective)."""
        if self.plan.stage > 0 and parameter.requires_grad:
            if kind == "model":
                return safe_get_full_fp32_param(parameter)
            return safe_get_full_optimizer_state(parameter, kind)
        if kind == "model":
            with self.gathered([parameter]):
                return parameter.detach().clone()
        # Stage 0: a parameter that never had a gradient has no moments.
        return self.adam.state[parameter].get(kind, torch.zeros_like(parameter))

    @torch.no_grad()
    def put(self, target: Any, kind: str, value: Tensor) -> None:
        """Write a whole fp32 value to where this rank keeps its part of it."""
        stage = self.plan.stage if target.requires_grad else 0
        if kind == "model":
            partitioned = self.plan.stage == 3 and isinstance(target, nn.Parameter)
            with deepspeed.zero.GatheredParameters([target], modifier_rank=0, enabled=partitioned):
                target.copy_(value)
            if stage in (1, 2):
                safe_set_full_fp32_param(target, value.to(target.device))
        elif stage == 0:
            self.adam.state[target][kind].copy_(value)
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

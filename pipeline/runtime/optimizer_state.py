"""Weights and the optimizer's moments on disk: unsharded, fp32, by parameter name.

A folder holds model.safetensors, with the optimizer's step count, and one file per moment, named as
the optimizer names it (AdamW: exp_avg.safetensors and exp_avg_sq.safetensors). They know neither
ranks nor ZeRO stage: any number of ranks resumes from them under any stage, and bit for bit where
both are the same. DeepSpeed's own files are not written. They hold the same numbers cut per rank,
as pickles, and its universal checkpoints, tried first, refuse stage 2 -> 0 and 2 -> 3 and lose the
weight decay of the groups under stage 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.runtime.engine import Engine

MODEL = "model"


def save_consolidated(engine: Engine, folder: Path) -> str:
    """Write the files (collective; rank 0 writes and holds one of them in memory at a time).

    Returns why it failed, "" where it did not; on rank 0 only, since the others do not write.
    """
    problem = ""
    states = [s for s in engine.base_optimizer.state.values() if s]
    # The optimizer's steps: those that were not skipped. Under stage 0 only some states count them;
    # one that counts none (SGD) has moments after the first.
    step = max((int(s["step"]) for s in states if "step" in s), default=min(1, len(states)))
    if step:
        _link_moments(engine)
    for kind in (MODEL, *(engine.moments if step else ())):
        whole = engine.full_state(kind)
        if engine.rank == 0 and not problem:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(whole, folder / f"{kind}.safetensors", {"step": str(step)})
            except (OSError, SafetensorError) as error:
                problem = str(error)
    return problem


def load_consolidated(engine: Engine, folder: Path) -> None:
    """Read the files into an engine that has not stepped yet (collective; every rank reads).

    Raises UserError where a file is no safetensors or is of another model.
    """
    step = _read(engine, folder, MODEL)
    if step:
        _make_moments(engine, step)
        for kind in engine.moments:
            _read(engine, folder, kind)
    _replay_bias_correction(engine.base_optimizer)


def _read(engine: Engine, folder: Path, kind: str) -> int:
    """Load one file; the step count in it."""
    path = folder / f"{kind}.safetensors"
    targets: dict[str, Tensor] = {**engine.parameters(kind)}
    if kind == MODEL:
        targets |= engine.buffers()
    try:
        with safe_open(path, "pt") as file:
            odd = sorted(targets.keys() ^ set(file.keys()))
            if odd:
                lacking = "the file" if odd[0] in targets else "the run"
                raise UserError(f"{path}: {lacking} has no {odd[0]!r}; it is of another model")
            for name, target in targets.items():
                value, shape = file.get_tensor(name), getattr(target, "ds_shape", target.shape)
                if value.shape != shape:
                    found = f"{list(value.shape)}, the run needs {list(shape)}"
                    raise UserError(f"{path}: {name!r} has shape {found}")
                engine.set_full(target, kind, value)
            return int((file.metadata() or {}).get("step", 0))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be loaded ({reason})") from None


def _make_moments(engine: Engine, step: int) -> None:
    """The state as after `step` steps, with moments of zero (DeepSpeed makes it late)."""
    optimizer = engine.base_optimizer
    tensor = isinstance(optimizer, torch.optim.AdamW)  # torch counts in a tensor
    for p, group in _stepped(engine):
        state: dict[str, Any] = {k: torch.zeros_like(p) for k in engine.kind.moments(group)}
        state["step"] = torch.tensor(float(step), device=p.device) if tensor else step
        optimizer.state[p] = state
    _link_moments(engine)


def _stepped(engine: Engine) -> list[tuple[Tensor, dict[str, Any]]]:
    """The tensors that the optimizer steps on this rank, each with its group. Under stage 3 a group
    is one flat tensor, or several of about `sub_group_size` elements."""
    groups = engine.base_optimizer.param_groups
    if engine.stage < 3:
        return [(p, group) for group in groups for p in group["params"]]
    zero = engine.optimizer
    flat = enumerate(zero.fp32_partitioned_groups_flat)
    return [(p, groups[zero.sub_group_to_group_id[number]]) for number, p in flat]


def _link_moments(engine: Engine) -> None:
    """Tell DeepSpeed's parameters where their moments are.

    It does so itself after the first step of the first parameter group, too early for the others.
    """
    if engine.stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _replay_bias_correction(optimizer: Any) -> None:
    """Bring the C++ state of DeepSpeed's AdamW on the CPU (FusedAdam there, and the one of an
    offloaded optimizer) to where an undisturbed run has it.

    It keeps beta^t as a running product outside its state dict; after a load it would start
    again from pow(beta, t), which differs in the last bit. One scratch number makes the steps.
    """
    offloaded = hasattr(optimizer, "ds_opt_adam")
    fused = hasattr(optimizer, "multi_tensor_adam") and not torch.cuda.is_available()
    if not (offloaded or fused):
        return
    done = [s["step"] for s in optimizer.state.values() if "step" in s]
    scratch = [torch.zeros(1) for _ in range(4)]
    betas = optimizer.param_groups[0]["betas"]
    for step in range(1, int(max(done, default=0)) + 1):
        if offloaded:
            kernel, which = optimizer.ds_opt_adam.adam_update, optimizer.opt_id
            kernel(which, step, 0.0, *betas, 1e-8, 0.0, True, *scratch)
        else:
            kernel, unused = optimizer.multi_tensor_adam, optimizer._dummy_overflow_buf
            kernel(1, unused, [[t] for t in scratch], 0.0, *betas, 1e-8, step, 1, 1, 0.0)

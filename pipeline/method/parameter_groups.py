"""Which parameters decay."""

from __future__ import annotations

from pipeline.method.objective import Objective


def parameter_groups(objective: Objective) -> list[dict[str, object]]:
    """Decayed and undecayed parameters (SPEC §4): biases and 1-D parameters do not decay; cls
    and mask tokens do if `weight_decay.tokens`.
    """
    decay = objective.recipe.optimizer.weight_decay
    groups: dict[str, dict[str, object]] = {
        "decay": {"name": "decay", "weight_decay": decay.value, "params": []},
        "no_decay": {"name": "no_decay", "weight_decay": 0.0, "params": []},
    }
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(("cls_token", "mask_token")):
            group = "decay" if decay.tokens else "no_decay"
        else:
            group = "no_decay" if parameter.ndim <= 1 or name.endswith(".bias") else "decay"
        groups[group]["params"].append(parameter)  # type: ignore[attr-defined]
    return [group for group in groups.values() if group["params"]]

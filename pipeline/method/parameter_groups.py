"""Which parameters decay, and which learning rates their layers have."""

from __future__ import annotations

from typing import Any

from pipeline.method.objective import Objective

# Names of the first layer: all before the first block.
EMBEDDINGS = (
    "cls_token", "mask_token", "reg_token", "pos_embed", "patch_embed", "norm_pre", "embeds.",
    "rope.", "rel_pos", "shared_rel_pos",
)  # fmt: skip


def parameter_groups(objective: Objective) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: biases and 1-D parameters do not decay; cls
    and mask tokens do if `weight_decay.tokens`.

    Where the layers have learning rates of their own (`layer_decay`, `layer_anneal`), two groups
    for each, with `lr_scale` and `anneal`: see schedules.learning_rate.
    """
    optimizer = objective.recipe.optimizer
    depth, by_layer = len(objective.encoder.blocks), optimizer.by_layer
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(("cls_token", "mask_token")):
            decays = optimizer.weight_decay.tokens
        else:
            decays = not (parameter.ndim <= 1 or name.endswith(".bias"))
        layer = layer_of(name, depth) if by_layer else depth + 1
        if (layer, decays) not in groups:
            group: dict[str, Any] = {
                "name": "decay" if decays else "no_decay",
                "weight_decay": optimizer.weight_decay.value if decays else 0.0,
                "params": [],
            }
            if by_layer:
                group["name"] += f", layer {layer}"
                group["lr_scale"] = layer_scale(optimizer.layer_decay, layer, depth)
                group["anneal"] = layer_end(optimizer.layer_anneal, layer, depth)
            groups[layer, decays] = group
        groups[layer, decays]["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def layer_of(name: str, depth: int) -> int:
    """Layer number of a parameter: embeddings 0, block i is i + 1, all behind the blocks (last
    norm, decoder, heads) depth + 1."""
    name = name.removeprefix("encoder.")
    if name.startswith(EMBEDDINGS):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_scale(decay: float, layer: int, depth: int) -> float:
    """The share of the learning rate that a layer has: decay^(depth + 1 - layer)."""
    return decay ** (depth + 1 - layer)


def layer_end(first: float, layer: int, depth: int) -> float:
    """The share of the run after which a layer's rate is at its lowest: `first` for the embeddings,
    1 behind the blocks, linear between them."""
    return first + (1.0 - first) * layer / (depth + 1)

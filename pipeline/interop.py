"""Weights under other projects' names. Names are facts; no code of those projects is used.

facebookresearch/mae: one flat state dict for encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.measures import Reconstruction
from pipeline.objective import Objective

# facebookresearch/mae's prefix → ours, inside an Objective with a Reconstruction measure.
_MAE_DECODER = {
    "decoder_embed.": "measure.decoder.embed.",
    "decoder_blocks.": "measure.decoder.blocks.",
    "decoder_norm.": "measure.decoder.norm.",
    "decoder_pred.": "measure.decoder.head.",
}


def _ours(name: str) -> str:
    """Our name of a facebookresearch/mae parameter."""
    if name == "mask_token":
        return "measure.decoder.mask_token"
    if name == "decoder_pos_embed":
        return "measure.decoder.pos_embed"
    for theirs, ours in _MAE_DECODER.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return "encoder." + name


def from_mae(objective: Objective, state: Mapping[str, Tensor]) -> None:
    """Load a checkpoint in facebookresearch/mae's names (its "model" entry) into an objective.

    Raises ValueError naming the first weight that is missing, unknown or of another shape.
    """
    if not isinstance(objective.measure, Reconstruction):
        raise ValueError("a facebookresearch/mae checkpoint holds a decoder: use a MAE recipe")
    mine = objective.state_dict()
    renamed = {_ours(name): value for name, value in state.items()}
    for name in sorted(mine.keys() ^ renamed.keys()):
        problem = "is missing from" if name in mine else "is not expected in"
        raise ValueError(f"weight {name} {problem} the facebookresearch/mae checkpoint")
    for name, value in renamed.items():
        if value.numel() != mine[name].numel():
            raise ValueError(
                f"weight {name} has shape {list(value.shape)}, the recipe needs "
                f"{list(mine[name].shape)}"
            )
    objective.load_state_dict({k: v.reshape(mine[k].shape) for k, v in renamed.items()})


def to_mae(objective: Objective) -> dict[str, Tensor]:
    """The state dict of an objective under facebookresearch/mae's names and shapes."""
    if not isinstance(objective.measure, Reconstruction):
        raise ValueError("only a reconstruction measure has a decoder to write for MAE")
    back = {ours: theirs for theirs, ours in _MAE_DECODER.items()}
    state: dict[str, Tensor] = {}
    for name, value in objective.state_dict().items():
        if name == "measure.decoder.mask_token":
            state["mask_token"] = value[None, None]
        elif name == "measure.decoder.pos_embed":
            state["decoder_pos_embed"] = value[None]
        elif name.startswith("encoder."):
            state[name.removeprefix("encoder.")] = value
        else:
            ours = next(prefix for prefix in back if name.startswith(prefix))
            state[back[ours] + name.removeprefix(ours)] = value
    return state

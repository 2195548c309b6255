"""Masked-image-modelling pretraining; the door for notebooks and other projects.

    from pipeline import load_encoder

    model, info = load_encoder("runs/rmae")      # a run, an export, or a foreign file
    tokens = model.forward_features(x)           # [B, 1 + L, D], cls token first

Nothing here imports deepspeed, and nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline import interrupts, late

if TYPE_CHECKING:
    from pipeline.config.recipe import load_recipe
    from pipeline.method.objective import build_objective
    from pipeline.weights.load import load_encoder
    from pipeline.weights.reconstructor import load_reconstructor

__all__ = ["build_objective", "load_encoder", "load_recipe", "load_reconstructor"]
late.install()
if interrupts.of_a_command():  # whose imports take seconds, with a cold cache minutes
    interrupts.interrupt_quietly()
_HOME = {
    "build_objective": "pipeline.method.objective",
    "load_encoder": "pipeline.weights.load",
    "load_recipe": "pipeline.config.recipe",
    "load_reconstructor": "pipeline.weights.reconstructor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""What the command line of pretraining says. Imports nothing heavy, as it is read first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the command line says; a path or a bundled name for ds_config and recipe."""

    ds_config: str | Path
    recipe: str | Path
    overrides: tuple[str, ...] = ()
    data: str = "data/shards/train"
    output: str | None = None
    resume: str = "auto"
    resume_changed: bool = False
    lock: bool = True
    max_steps: int | None = None
    peak_tflops: float | None = None
    verbose: bool = False

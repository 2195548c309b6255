"""What a pretraining run consists of on one rank; made by setup.py, used by loop.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.plan import RunPlan
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader
from pipeline.distributed import Ranks
from pipeline.method.objective import Objective
from pipeline.method.teacher import Teacher
from pipeline.runtime.checkpoint import CheckpointStore
from pipeline.runtime.engine import Engine
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.probes import Probes
from pipeline.runtime.run_lock import RunLock
from pipeline.runtime.skipped_steps import SkippedSteps
from pipeline.runtime.watchdog import Watchdog


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of this start, [first, last); total: those of the whole recipe; sizes: of the
    images, see schedules.size_steps."""

    first: int
    last: int
    total: int
    per_epoch: int
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Model:
    """What is trained: the objective in its engine, and its EMA teacher if the method has one."""

    objective: Objective
    teacher: Teacher | None
    engine: Engine


@dataclass(frozen=True)
class RunFolder:
    """The run's folder, locked by rank 0. resumed_from: the path that --resume named when the run
    began, or ""."""

    path: Path
    store: CheckpointStore
    lock: RunLock | None
    resumed_from: str


@dataclass(frozen=True)
class Watch:
    """What observes the training: logs, probes, the watchdog, the count of skipped steps."""

    monitor: Monitor
    probes: Probes
    watchdog: Watchdog
    nonfinite: SkippedSteps


@dataclass(frozen=True)
class TrainState:
    """One pretraining run on this rank."""

    recipe: Recipe
    plan: RunPlan
    ranks: Ranks
    data: str
    schedule: dict[str, Any]  # same_run.schedule_facts, for state.json
    steps: Steps
    model: Model
    loader: Loader
    folder: RunFolder
    watch: Watch

    @property
    def negatives_batch(self) -> int:
        """Images of a micro-batch over all ranks: InfoNCE's negatives, and the statistics of batch
        norm, come from these."""
        return self.ranks.world * self.plan.micro_batch

    def bad_samples(self) -> int:
        """Samples on all ranks that could not be decoded, since the run began (collective)."""
        return int(self.ranks.sum(torch.tensor(self.loader.bad_samples)))

    def close(self) -> None:
        """Stop the workers, flush the logs, release the folder's lock."""
        self.watch.watchdog.close()
        self.loader.close()
        self.watch.monitor.close()
        if self.folder.lock is not None:
            self.folder.lock.release()

"""What the stages share: where they run, sizes, images, time that is left."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import null_gpu
import torch
from torch import Tensor

from pipeline.config.recipe import RECIPES, Recipe, load_recipe
from pipeline.kernels.cases import Sizes
from shard_tools.atomic import write_json

ROOT = Path(__file__).resolve().parents[3]


class Skip(Exception):
    """There is nothing to do here; why."""


class Fault(Exception):
    """What was found is wrong; one sentence."""


@dataclass(frozen=True)
class Where:
    """device: cuda or cpu. tiny: a rehearsal, whose figures mean nothing. folder: of all results.
    mae: a checkout of facebookresearch/mae. ends: when the stage's time is over (monotonic)."""

    device: str
    tiny: bool
    folder: Path
    stage: str
    mae: Path | None = None
    batch: int = 128
    ends: float = float("inf")
    facts: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def gpu(self) -> bool:
        """Whether figures of this run mean anything."""
        return self.device == "cuda" and not null_gpu.here()

    def left(self) -> float:
        """Seconds until the stage is ended from outside."""
        return self.ends - time.monotonic()

    def note(self, found: dict[str, Any]) -> None:
        """Keep what was found so far."""
        write_json(self.folder / f"{self.stage}.json", finite(self.facts | found))

    def found(self, stage: str) -> dict[str, Any]:
        """What an earlier stage found, or nothing."""
        path = self.folder / f"{stage}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def sizes(self, batch: int, dtype: torch.dtype = torch.bfloat16) -> Sizes:
        """Of the kernels' calls: ViT-B/16's at a batch, or the smallest."""
        if self.tiny:
            return Sizes(2, side=16, patch=4, width=16, decoder=16, keep=4, dtype=dtype,
                         device=self.device)  # fmt: skip
        return Sizes(batch, dtype=dtype, device=self.device)

    def recipe(self, name: str, *overrides: str) -> Recipe:
        """A bundled recipe, of the smallest size in a rehearsal."""
        if self.tiny:
            from tiny import tiny_overrides

            overrides = (*overrides, *tiny_overrides(name))
        return load_recipe(RECIPES / f"{name}.yaml", list(overrides))

    def images(self, recipe: Recipe, batch: int, seed: int = 0) -> Tensor:
        """Smooth random pictures, uint8 [B, H, W, 3], on the device."""
        side, draw = recipe.encoder.image_size, torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch, 3, 7, 7, generator=draw).to(self.device)
        smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
        return (255 * smooth.permute(0, 2, 3, 1)).to(torch.uint8).contiguous()

    def numbers(self, step: int, batch: int) -> Tensor:
        """Sample numbers of a step, int64 [B]."""
        return torch.arange(step * batch, (step + 1) * batch, device=self.device)


def finite(found: Any) -> Any:
    """The same with None for every number that JSON has no word for."""
    if isinstance(found, dict):
        return {key: finite(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def facts(device: str) -> dict[str, Any]:
    """The machine, for the head of every result."""
    import platform

    name = f"CPU ({platform.processor() or platform.machine()})"
    found: dict[str, Any] = {"device": name, "cores": len(os.sched_getaffinity(0))}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
    if null_gpu.here():
        found["null"] = True
    return found | {"python": platform.python_version(), "torch": torch.__version__}


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """Processes that run a stage's parts; this process itself where one is enough."""
    if count == 1:
        yield Here()
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield pool


class Here(Executor):
    """Runs what is submitted at once."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **keywords: Any) -> Future[Any]:
        """The future of what has been run."""
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **keywords))
        except Exception as error:
            future.set_exception(error)
        return future


def join() -> None:
    """Make this process a rank of its own, once."""
    from pipeline.runtime.engine import init_ranks

    if not torch.distributed.is_initialized():
        init_ranks()


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give a GPU's unused memory back, and forget the peak."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(call: Callable[[], Any], device: str, times: int) -> float:
    """Seconds per call over `times` calls, the device's work included."""
    synchronise(device)
    begun = time.perf_counter()
    for _ in range(times):
        call()
    synchronise(device)
    return (time.perf_counter() - begun) / times

"""Where scalars and pictures go beside log.txt and metrics.jsonl: TensorBoard, wandb, MLflow.

`monitor.log_to` of the recipe names them. Each is a class with the four methods of Tracker and a
line in TRACKERS; the packages of wandb and MLflow are extras and imported only where asked for.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from pipeline.config.texts import flatten
from pipeline.errors import UserError
from shard_tools.atomic import write_json

RUNS = "trackers.json"  # in the run's folder: the run's id with each service
PROJECT = "relaxmim"  # where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names no other


class Tracker(Protocol):
    """Takes what is logged after `step` steps (rank 0 only)."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """pixels: uint8 [H, W, 3]."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, output: Path, first: int, settings: Mapping[str, Any]) -> None:
        # Points carry the number of finished steps, so the first that is void is first + 1, also
        # where a run starts again before its first checkpoint.
        threading.excepthook = _but_tensorboards
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class WandB:
    """A run of Weights & Biases, found again by its id; WANDB_MODE=offline needs no network."""

    def __init__(self, output: Path, first: int, settings: Mapping[str, Any]) -> None:
        import wandb

        try:
            online = wandb.setup().settings.mode in ("online", "shared")
            if online and not wandb.login(prompt=False, verify=False):
                raise UserError(
                    "monitor.log_to: wandb has no API key: run `wandb login`, or set "
                    "WANDB_MODE=offline and `wandb sync` the run later"
                )
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=output.name,
                id=_run_id(output, "wandb") or secrets.token_hex(4),
                resume="allow",
                dir=output,
                config=dict(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.errors.Error, OSError) as error:
            raise UserError(f"monitor.log_to: wandb: {_sentence(error)}") from error
        self._image = wandb.Image
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # its own count knows no resume
        _keep_run_id(output, "wandb", self._run.id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **values})

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._run.log({"step": step, name: self._image(pixels)})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, found again by its id; MLFLOW_TRACKING_URI says where."""

    def __init__(self, output: Path, first: int, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._entities = mlflow.entities
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = _run_id(output, "mlflow")
        try:
            self._client = mlflow.MlflowClient()
            if known:
                self._client.update_run(known, "RUNNING")
                self.id = known
            else:
                found = self._client.get_experiment_by_name(experiment)
                number = (
                    found.experiment_id if found else self._client.create_experiment(experiment)
                )
                self.id = self._client.create_run(number, run_name=output.name).info.run_id
                params = [
                    self._entities.Param(k, str(v)[:500])
                    for k, v in flatten(dict(settings)).items()
                    if v != {}
                ]
                for start in range(0, len(params), 100):  # a call takes no more
                    self._client.log_batch(self.id, params=params[start : start + 100])
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise UserError(f"monitor.log_to: mlflow: {_sentence(error)}") from error
        _keep_run_id(output, "mlflow", self.id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(k, v, now, step) for k, v in values.items()]
        # In a thread of MLflow's: a server that is away must not hold up the training.
        self._client.log_batch(self.id, metrics=metrics, synchronous=False)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        path = f"{name}/step-{step:08d}.png"
        self._client.log_image(self.id, pixels, artifact_file=path, synchronous=False)

    def close(self) -> None:
        import mlflow

        mlflow.flush_async_logging()
        self._client.set_terminated(self.id)


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Trackers:
    """All trackers of a run; one that fails costs its curves, said once, and not the run.

    names: of TRACKERS. first: steps that a resumed run has behind it. settings: what the run is
    made of, for those that keep it. Raises UserError where one cannot start.
    """

    def __init__(
        self, names: Sequence[str] = (), output: Path = Path(), first: int = 0,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        logged = last_step(output / "metrics.jsonl") if names else 0
        self._unwritable = False
        self._trackers: list[tuple[str, int, Tracker]] = []
        for name in names:
            # A service cannot forget the steps of a killed start that come again.
            again = logged if _run_id(output, name) else 0
            self._trackers.append((name, again, TRACKERS[name](output, first, settings)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Keep values after `step` steps by their names (loss/loss)."""
        self._each(lambda tracker: tracker.scalars(values, step), step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Keep a picture, uint8 [H, W, 3]."""
        self._each(lambda tracker: tracker.picture(name, pixels, step), step)

    def close(self) -> None:
        """Send and write what is still to be."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None], step: float = math.inf) -> None:
        for entry in list(self._trackers):
            name, again, tracker = entry
            if step <= again:
                continue
            try:
                call(tracker)
            except Exception as error:
                full_disk = isinstance(error, OSError) and name == "tensorboard"
                if not full_disk:
                    self._trackers.remove(entry)
                if not (full_disk and self._unwritable):
                    print(f"warning: {name} is incomplete: {_sentence(error)}", flush=True)
                self._unwritable |= full_disk


def last_step(metrics: Path) -> int:
    """The last step that metrics.jsonl has; 0 where there is none."""
    if not metrics.exists():
        return 0
    rows = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return int(max((s for s in map(step_of, rows) if math.isfinite(s)), default=0))


def step_of(row: str) -> float:
    """The step of a row of metrics.jsonl; infinite where a kill has cut it."""
    try:
        return int(json.loads(row)["step"]) if row.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _but_tensorboards(args: threading.ExceptHookArgs) -> None:
    """Python's report of an exception that ends a thread. What ends TensorBoard's (a full disk) is
    raised at its next event and said there."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


def _run_ids(output: Path) -> dict[str, str]:
    try:
        ids = json.loads((output / RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


def _run_id(output: Path, service: str) -> str | None:
    return _run_ids(output).get(service)


def _keep_run_id(output: Path, service: str, run_id: str) -> None:
    write_json(output / RUNS, _run_ids(output) | {service: run_id})


def _sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

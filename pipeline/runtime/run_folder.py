"""The folder of a run: its lock, its checkpoints and its exported encoder.

    runs/<name>/
      recipe.yaml  ds_config.json  versions.json   what ran
      log.txt  metrics.jsonl  tensorboard/  pictures/   how it went
      checkpoints/step-00001000/  checkpoints/latest   to go on from
      encoder/encoder.safetensors  encoder.json   timm weights, what eval reads
      model.safetensors   encoder and decoder (or heads), whole and fp32
      failure.txt   why the last start failed, if it did
      lock   held while the run is alive

A checkpoint is written under a temporary name, listed with sha256 in files.json, fsynced and
renamed; `latest` changes last. So a name without a dot in front is always a whole checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import socket
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from pipeline.config.recipe import Recipe, RecipeError, first_difference, load_recipe
from pipeline.distributed import agree
from pipeline.errors import UserError
from pipeline.method.encoder import encoder_info, encoder_state
from pipeline.method.objective import Objective
from pipeline.method.teacher import Teacher
from pipeline.runtime.engine import Engine
from pipeline.runtime.optimizer_state import load_whole, save_whole
from shard_tools.atomic import seal, verify, write_atomic, write_json

STATE, TEACHER = "state.json", "teacher.safetensors"


class RunLock:
    """An exclusive lock on a run folder, held until the process ends.

    Raises UserError naming the holder where another run has it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / "lock", "a+")  # noqa: SIM115 (open as long as the run)
        try:
            # Not flock: loader workers would inherit it and hold it for a while after a kill.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise UserError(
                f"{folder}: another run holds this folder ({holder}); choose another --output"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Free the folder."""
        self._file.close()


def claim(output: Path, recipe: Recipe, resume: str) -> tuple[RunLock, Path | None]:
    """Lock the run folder and find where to go on (rank 0).

    resume: `none`, `auto` (the newest whole checkpoint of this folder, if any) or the path of a
    run folder or of a checkpoint. Raises UserError in one sentence, also for a checkpoint of
    another recipe and for a folder that already holds a run under `none`.
    """
    lock = RunLock(output)
    _remove_leftovers(output)
    if resume == "none":
        if any((output / "checkpoints").glob("step-*")):
            raise UserError(
                f"{output}: already holds a run; choose another --output or say --resume auto"
            )
        return lock, None
    if resume == "auto":
        found = newest_checkpoint(output / "checkpoints")
        if found is not None:  # a run killed before it wrote `latest`, or whose newest is broken
            write_atomic(found.parent / "latest", found.name + "\n")
    else:
        place = Path(resume)
        found = place if (place / STATE).is_file() else newest_checkpoint(place / "checkpoints")
        if found is None:
            raise UserError(f"--resume {resume}: no whole checkpoint there")
        verify(found)
    if found is not None:
        _check_recipe(found, recipe)
    return lock, found


def _remove_leftovers(output: Path) -> None:
    """Remove what a killed run had half written; only the holder of the lock may."""
    for folder in ("checkpoints/.step-*", ".*.tmp", "*/.*.tmp"):
        for path in output.glob(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _check_recipe(checkpoint: Path, recipe: Recipe) -> None:
    try:
        theirs = load_recipe(checkpoint / "recipe.yaml")
    except RecipeError as error:
        raise UserError(f"{checkpoint}: its recipe cannot be read: {error}") from None
    difference = first_difference(theirs, recipe)
    if difference:
        raise UserError(f"{checkpoint}: a checkpoint of another recipe ({difference})")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are whole; broken ones are named and passed over."""
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify(place)
        except UserError as error:
            print(f"warning: {error}; trying the one before", flush=True)
        else:
            return place
    return None


class SaveError(UserError):
    """A checkpoint that could not be written, in one sentence; those before it are whole."""


def save_checkpoint(
    output: Path, engine: Engine, teacher: Teacher | None, recipe_text: str, state: dict[str, Any],
    keep: int,
) -> Path:  # fmt: skip
    """Write checkpoints/step-<step> (collective) and remove all but the newest `keep`.

    Raises SaveError on every rank where the disk is full or a write fails; what was half written
    is removed.
    """
    folder = output / "checkpoints"
    name = f"step-{state['step']:08d}"
    temporary = folder / f".{name}"
    if engine.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    problem = save_whole(engine, temporary)

    def complete() -> None:
        try:
            if problem:
                raise OSError(problem)
            if teacher is not None:
                save_file(_contiguous(teacher.state_dict()), temporary / TEACHER)
            (temporary / "recipe.yaml").write_text(recipe_text)
            (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
            seal(temporary, folder / name)
            write_atomic(folder / "latest", name + "\n")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            before = [p.name for p in sorted(folder.glob("step-*")) if p.name != name]
            raise SaveError(_unwritten(folder / name, error, before)) from None
        # Those of later steps are broken ones that this start has passed over.
        done = [p for p in sorted(folder.glob("step-*")) if p.name <= name]
        for old in done[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    _on_rank_0(complete)
    return folder / name


def _on_rank_0(write: Callable[[], None]) -> None:
    """Run `write` on rank 0; its UserError is a SaveError on every rank (collective)."""
    try:
        agree(write)
    except UserError as error:
        raise SaveError(str(error)) from None


def _unwritten(path: Path, error: Exception, good: list[str]) -> str:
    """One sentence: what could not be written, why, and the newest of the good checkpoints."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    full = full or "No space left" in str(error) or "Disk quota" in str(error)
    reason = "the disk is full" if full else str(error)
    last = good[-1] if good else "none"
    return f"{path} could not be written: {reason}; the last good checkpoint is {last}"


def load_checkpoint(checkpoint: Path, engine: Engine, teacher: Teacher | None) -> dict[str, Any]:
    """Restore weights, optimizer and teacher (collective) and return the saved state.

    The ranks and the ZeRO stage may be others than those that saved; the precision may not.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    if state["precision"] != engine.plan.precision:
        raise UserError(
            f"{checkpoint}: written with precision {state['precision']}, this run has "
            f"{engine.plan.precision}; go on with the same precision"
        )
    load_whole(engine, checkpoint)
    if teacher is not None:
        teacher.load_state_dict(load_file(checkpoint / TEACHER))
    return state


def export(output: Path, checkpoint: Path, objective: Objective, recipe: Recipe, step: int) -> None:
    """Write encoder/ (timm names) and model.safetensors from a checkpoint (collective).

    Raises SaveError on every rank where they cannot be written.
    """

    def write() -> None:
        whole = load_file(checkpoint / "model.safetensors")
        prefix = "encoder."
        encoder = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
        weights = encoder_state(encoder, objective.encoder)
        try:
            write_atomic(output / "encoder" / "encoder.safetensors", save(weights))
            write_json(output / "encoder" / "encoder.json", encoder_info(recipe, step))
            write_atomic(output / "model.safetensors", save(whole))
        except OSError as error:
            raise SaveError(_unwritten(output / "encoder", error, [checkpoint.name])) from None

    _on_rank_0(write)


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def versions() -> dict[str, str]:
    """The versions that a run records."""
    packages = ("torch", "deepspeed", "timm")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}

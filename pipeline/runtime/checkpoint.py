"""Checkpoints of any training: of pretraining, and of the evaluations that train.

    FOLDER/checkpoints/
      step-00001000/   what the training wrote, state.json (the step and more),
                       files.json (size and sha256 of every file)
      latest           the name of the newest one

A checkpoint is written under a temporary name, sealed (listed with its sha256 and fsynced) and
renamed; `latest` changes last. So a name without a dot in front is always a complete checkpoint.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import UserError
from shard_tools.atomic import seal, verify, write_atomic, write_json

STATE = "state.json"
# Keys in older checkpoints → their present names.
_RENAMED = {"stage": "zero_stage", "together": "negatives_batch"}


class SaveError(UserError):
    """A checkpoint that could not be written; those before it are valid."""


class CheckpointStore:
    """The checkpoints below `folder`, of which the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder / "checkpoints", keep

    def all(self) -> list[Path]:
        """Every complete checkpoint, damaged or not, the oldest first. Folders with other names,
        such as copies that somebody keeps, do not count."""
        return sorted(p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))

    def newest(self, content: Collection[str] | None = None) -> Path | None:
        """The newest valid checkpoint, None if there is none; warns of damaged newer ones.

        content: as in `verify`; a check of only some files does not warn.
        UserError if every checkpoint is damaged: starting from scratch would hide that.
        """
        found = self.all()
        for path in reversed(found):
            try:
                verify(path, content)
                _check_step(path)
            except UserError as error:
                if path == found[0]:
                    raise UserError(
                        f"{error}; no valid checkpoint is left: remove {self.folder} to start from "
                        "scratch"
                    ) from None
                if content is None:
                    print(f"warning: {error}; falling back to the previous checkpoint", flush=True)
            else:
                return path
        return None

    def save(self, step: int, write: Callable[[Path], str], meta: dict[str, Any]) -> Path:
        """Let `write` fill a folder, seal it and remove all but the newest `keep` (collective).

        write: also collective; returns on rank 0 why it failed, or "".
        meta: JSON for state.json, without the step. Raises SaveError on every rank if the disk is
        full or a write fails; what was half written is removed.
        """
        name = step_name(step)
        temporary = self.folder / f".{name}"
        _on_first_rank(self.remove_leftovers)
        problem = write(temporary)
        _on_first_rank(partial(self._complete, temporary, name, problem, {"step": step} | meta))
        return self.folder / name

    def _complete(self, temporary: Path, name: str, problem: str, state: dict[str, Any]) -> None:
        try:
            if problem:
                raise OSError(problem)
            write_json(temporary / STATE, state)
            seal(temporary, self.folder / name)
            self.point_latest_to(self.folder / name)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            valid = [p.name for p in self.all() if p.name != name]
            raise SaveError(unwritten(self.folder / name, error, valid)) from None
        # Checkpoints of later steps are damaged: this training fell back from them.
        done = [p for p in self.all() if p.name <= name]
        for old in done[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, read: Callable[[Path, dict[str, Any]], None]) -> dict[str, Any] | None:
        """Call `read` with the newest valid checkpoint and its state; the state, or None.

        Collective: rank 0 finds and verifies it.
        """
        from pipeline.distributed import agree  # imports torch, which `newest` does without

        path: Path | None = agree(self.newest)
        if path is None:
            return None
        state = read_state(path)
        read(path, state)
        return state

    def point_latest_to(self, path: Path) -> None:
        """Make `latest` name this checkpoint."""
        write_atomic(self.folder / "latest", path.name + "\n")

    def remove_leftovers(self) -> None:
        """Remove what a killed training left half written; call it only while holding the lock."""
        for path in self.folder.glob(".*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def step_name(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint, older keys under their present names."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return {_RENAMED.get(key, key): value for key, value in state.items()}


def _check_step(path: Path) -> None:
    """UserError where a checkpoint has the name of another step: renamed to a later one it would
    stay the newest, from which every start would begin."""
    if step_name(step := read_state(path)["step"]) != path.name:
        raise UserError(f"{path}: holds step {step}; rename it to {step_name(step)}")


def _on_first_rank(write: Callable[[], None]) -> None:
    """Run `write` on the first rank; its UserError is a SaveError on every rank (collective)."""
    from pipeline.distributed import agree

    try:
        agree(write)
    except UserError as error:
        raise SaveError(str(error)) from None


def write_on_first_rank(path: Path, valid: str, write: Callable[[], None]) -> None:
    """Run `write` on the first rank; where it fails, SaveError on every rank (collective).

    path: what it writes; valid: the checkpoint that stays, both for the sentence.
    """

    def attempt() -> None:
        try:
            write()
        except (OSError, SafetensorError) as error:
            raise SaveError(unwritten(path, error, [valid])) from None

    _on_first_rank(attempt)


def unwritten(path: Path, error: Exception, valid: list[str]) -> str:
    """One sentence: what could not be written, why, and the newest of the valid checkpoints."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    full = full or "No space left" in str(error) or "Disk quota" in str(error)
    reason = "the disk is full" if full else str(error)
    last = valid[-1] if valid else "none"
    return f"{path} could not be written: {reason}; the last valid checkpoint is {last}"

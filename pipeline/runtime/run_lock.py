"""Who may write to a run's folder, and what a run resumes from. Nothing here imports torch."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Collection
from pathlib import Path

from pipeline.errors import UserError, naming, reason
from pipeline.runtime.checkpoint import STATE, CheckpointStore, read_state
from pipeline.runtime.output import UNWRITABLE, check_output
from shard_tools.atomic import verify


class LostFolder(UserError):
    """A run's folder that is no longer its own, nor what is in it (failure.txt)."""


class RunLock:
    """An exclusive lock on a run folder, held until the process ends.

    needed: whether a file system without locks is refused. Raises UserError where the folder
    cannot be made or written, and naming the holder where another run has it; advice: what to do
    then.
    """

    def __init__(
        self, folder: Path, needed: bool = True, advice: str = "choose another --output"
    ) -> None:
        check_output(folder)
        self._folder, self._needed, self._advice = folder, needed, advice
        self._take()

    def _take(self) -> None:
        folder = self._folder
        with naming(folder, UNWRITABLE):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / "lock", "a+")  # noqa: SIM115 (open as long as the run)
        try:
            # Not flock: loader workers would inherit it and hold it for a while after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                if not self._needed:
                    self._file = file
                    return
                raise UserError(
                    f"{folder}: its file system has no locks ({reason(error)}), so a second run "
                    "on the folder would go unnoticed; mount it with locks (NFS: with lockd, "
                    "Lustre: -o flock), choose another --output, or say --no-lock and start only "
                    "one run on it"
                ) from None
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{folder}: another run holds this folder ({holder}); {self._advice}"
            ) from None
        with naming(folder / "lock", UNWRITABLE):  # a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        self._file = file

    def keep(self) -> bool:
        """Whether the folder, or the lock in it, was removed or moved away since; then it is made
        and locked again. UserError where another run has taken it meanwhile."""
        here, lock = self._file, self._folder / "lock"
        try:
            if os.path.samestat(os.fstat(here.fileno()), lock.stat()):
                return False
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # not known; what is written next will say what is wrong
            return False
        self._take()
        here.close()
        return True

    def release(self) -> None:
        """Free the folder."""
        self._file.close()


def claim(output: Path, resume: str, lock_needed: bool = True) -> tuple[RunLock, Path | None]:
    """Lock the run folder and find the checkpoint to resume from (rank 0).

    resume: `none`, `auto` (the newest valid checkpoint of this folder, if any) or the path of a
    run folder or of a checkpoint, where this run begins; rerun with the same path it continues
    itself. Raises UserError, also for a folder that already holds a run, under `none` or a path
    elsewhere. Whether the checkpoint is of the same run, same_run.py says.
    """
    lock, store = RunLock(output, lock_needed), CheckpointStore(output)
    with naming(output, UNWRITABLE):
        store.remove_leftovers()
        for path in (*output.glob(".*.tmp"), *output.glob("*/.*.tmp")):
            path.unlink(missing_ok=True)
    found = find_checkpoint(output, resume)
    if found is not None and resume == "auto":
        with naming(output, UNWRITABLE):  # of a run killed before that, or whose newest is damaged
            store.point_latest_to(found)
    return lock, found


def find_checkpoint(
    output: Path, resume: str, content: Collection[str] | None = None
) -> Path | None:
    """The checkpoint that a run in `output` resumes from (see `claim`); nothing is written.

    content: as in `verify`.
    """
    store = CheckpointStore(output)
    if resume == "none":
        if store.all():
            raise UserError(
                f"{output}: already holds a run; choose another --output or say --resume auto"
            )
        return None
    if resume == "auto":
        return store.newest(content)
    path, own = Path(resume), store.newest(content)
    if own is not None and read_state(own).get("resumed_from") == str(path.resolve()):
        return own
    found = path if (path / STATE).is_file() else CheckpointStore(path).newest(content)
    if found is None:
        why = "" if path.exists() else " (no such file or folder)"
        raise UserError(
            f"--resume {resume}: no valid checkpoint there{why}; give auto, none, or the path of a "
            "run or of a checkpoint"
        )
    verify(found, content)
    if own is not None and own.resolve() != found.resolve():
        raise UserError(
            f"--resume {resume}: {output} already holds a run at {own.name}, which a restart would "
            "continue: say --resume auto, choose another --output, or remove its later checkpoints"
        )
    return found

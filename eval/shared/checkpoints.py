"""The checkpoints from which an evaluation that trains resumes when it is rerun."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from eval.shared.labels import IMAGES
from eval.shared.results import difference
from pipeline.distributed import Ranks, StopSignal, agree
from pipeline.errors import PREEMPTED, UserError
from pipeline.runtime.checkpoint import CheckpointStore
from pipeline.runtime.run_lock import RunLock

# Settings that earlier versions did not record; nothing is known of those.
LATER = ("mean", "std", *IMAGES.values())


def leave(stop: StopSignal, step: int, total: int, ranks: Ranks) -> NoReturn:
    """Print that the training is saved, and exit with PREEMPTED."""
    if ranks.first:
        signal_name = stop.name or "a signal to another rank"
        print(
            f"stopped by {signal_name}: saved at step {step} of {total}; the same command resumes",
            flush=True,
        )
    sys.exit(PREEMPTED)


def hold(folder: Path, ranks: Ranks) -> list[RunLock]:
    """The lock of a training's folder, which the first rank holds as long as the list is kept.
    UserError where another process trains there (collective)."""
    held: list[RunLock] = []
    ranks.agree(lambda: held.append(RunLock(folder, needed=False)))
    return held


class Checkpoints:
    """A store of one checkpoint that belongs to certain settings.

    settings: what the result depends on, of encoder and data their sha256 and not their path; a
    checkpoint of other settings is refused, as is the folder of a pretraining. held: see `hold`.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], held: Sequence[RunLock] = ()
    ) -> None:
        self.store, self.held = CheckpointStore(folder, keep=1), held
        self.settings = json.loads(json.dumps(settings))

    def save(self, step: int, write: Callable[[Path], str], **more: Any) -> None:
        """Let `write` fill a folder; the settings and `more` (JSON) go beside it (collective).
        UserError where the folder was removed, and another training has it now."""
        agree(lambda: [lock.keep() for lock in self.held])
        self.store.save(step, write, {"settings": self.settings, **more})

    def load(self, read: Callable[[Path], None]) -> dict[str, Any]:
        """`read` the checkpoint's folder; its step and what was saved beside it, or {}."""

        unsaid = {key: value for key, value in self.settings.items() if key in LATER}

        def check_and_read(folder: Path, state: dict[str, Any]) -> None:
            if "settings" not in state:
                raise UserError(
                    f"{self.store.folder} holds the checkpoints of a pretraining; choose another "
                    "--output"
                )
            theirs = {**unsaid, **state["settings"]}
            keys = self.settings.keys() | theirs.keys()
            others = {key for key in keys if self.settings.get(key) != theirs.get(key)}
            others -= {IMAGES[key] for key in IMAGES.keys() & others}  # their index says it
            changed = [
                difference(key, theirs.get(key), self.settings.get(key)) for key in sorted(others)
            ]
            if changed:
                raise UserError(
                    f"{self.store.folder} holds a training with another {', '.join(changed)}; "
                    "remove it or choose another --output"
                )
            read(folder)

        return self.store.load(check_and_read) or {}

    def announce(self, step: int, total: int, ranks: Ranks) -> None:
        """Print where a training of `total` steps resumes, if it does; step: of its checkpoint."""
        if step and ranks.first:
            left = "" if step < total else "; no step is left"
            print(f"resumes from {self.store.folder}, at step {step} of {total}{left}", flush=True)

"""Where an evaluation that trains goes on from when it is called again."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eval.shared.cli import World
from pipeline.errors import UserError
from shard_tools.atomic import seal, verify, write_atomic


class Checkpoints:
    """The newest checkpoint in FOLDER/checkpoints: step-<step>/ and, written last, latest.json.

    settings: what the result depends on; a checkpoint of other settings is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], world: World) -> None:
        self.folder, self.world = folder / "checkpoints", world
        self.settings = json.loads(json.dumps(settings))

    def save(self, step: int, write: Callable[[Path], str], **more: Any) -> None:
        """Let `write` fill a folder; `more` (JSON) goes beside it (collective).

        write: returns why it failed, "" where it did not, on the first rank. The checkpoint before
        is removed last, so that a broken one is never gone on from.
        """
        tag = f"step-{step:08d}"
        temporary = self.folder / f".{tag}"
        if self.world.first:
            shutil.rmtree(temporary, ignore_errors=True)
        problem = write(temporary)
        content = {"tag": tag, "step": step, "settings": self.settings, **more}

        def complete() -> None:
            try:
                if problem:
                    raise OSError(problem)
                seal(temporary, self.folder / tag)
                write_atomic(self.folder / "latest.json", json.dumps(content))
            except OSError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise UserError(f"{self.folder / tag} could not be written: {error}") from None
            for old in (*self.folder.glob("step-*"), *self.folder.glob(".step-*")):
                if old.name != tag:  # those with a dot are what a kill left
                    shutil.rmtree(old)

        self.world.agree(complete)  # on the first rank, which wrote

    def load(self, read: Callable[[Path], None]) -> dict[str, Any]:
        """`read` the newest checkpoint's folder; its step and what was saved beside it, or {}."""
        path = self.folder / "latest.json"
        if not path.is_file():
            return {}
        try:
            latest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: {error}; remove {self.folder} to start anew") from None
        if latest["settings"] != self.settings:
            keys = self.settings.keys() | latest["settings"].keys()
            changed = sorted(k for k in keys if self.settings.get(k) != latest["settings"].get(k))
            raise UserError(
                f"{self.folder} holds a training with another {', '.join(changed)}; "
                "remove it or choose another --output"
            )
        try:
            self.world.agree(partial(verify, self.folder / latest["tag"]))
        except UserError as error:
            raise UserError(f"{error}; remove {self.folder} to start anew") from None
        read(self.folder / latest["tag"])
        return dict(latest)

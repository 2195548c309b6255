"""Whether a run could be written to its folder. Without any package, since the doctor looks too."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import UserError
from shard_tools.atomic import check_writable

UNWRITABLE = "--output cannot be written"
# What is written there first after minutes or hours, at a save or at a picture.
_FOLDERS = ("checkpoints", "encoder", "pictures")
_FILES = (
    "checkpoints/latest", "encoder/encoder.safetensors", "encoder/encoder.json",
    "model.safetensors", "failure.txt",
)  # fmt: skip


def check_output(folder: Path) -> None:
    """UserError where a run could not be written to a folder, or to one in it. Nothing is made."""
    if os.path.exists(folder) and not os.path.isdir(folder):  # False where it cannot be known
        raise UserError(f"{folder}: is a file; --output is a folder")
    try:
        os.fsencode(folder).decode("utf-8")
    except UnicodeDecodeError:  # the first save would fail on it
        name = os.fsencode(folder).decode("utf-8", "backslashreplace")
        raise UserError(
            f"{name}: {UNWRITABLE}: its path is not UTF-8, which safetensors needs; rename it"
        ) from None
    check_writable(folder, folder=True, what=UNWRITABLE)
    for path in (folder / name for name in _FOLDERS):
        if os.path.lexists(path):  # a link to nothing too
            check_writable(path, folder=True, what=UNWRITABLE)
    for path in (folder / name for name in _FILES):
        if path.is_dir():
            raise UserError(f"{path}: {UNWRITABLE} (a folder, where a file is written)")

"""Whether a file can hold weights, by its first bytes or its header. Nothing here imports torch."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.errors import UserError

METADATA = "relaxmim"  # the key of encoder_info in the metadata of an exported file


def check_file(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file, {} of others.

    UserError where it is neither that, to its last byte, nor what torch.save writes.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                return file.metadata() or {}
        with path.open("rb") as file:
            first = file.read(2)
        known = zipfile.is_zipfile(path) if first == b"PK" else first[:1] == b"\x80"
        if not known and not tarfile.is_tarfile(path):
            cut = "a part of one" if first == b"PK" else "neither .safetensors nor of torch.save"
            raise unreadable(path, f"it is {cut}")
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from None
    return {}


def written_info(path: Path, text: str | None) -> dict[str, Any]:
    """What pipeline/export.py wrote beside the weights (arch, options, mean, std), or {}."""
    try:
        return dict(json.loads(text or "{}"))
    except (ValueError, TypeError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, why: object) -> UserError:
    """What to say of a file that holds no weights."""
    return UserError(f"{path}: cannot be read as a file of weights ({why})")

"""Whether a file can hold weights, judged by its first bytes or header, without importing torch."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.config.texts import is_number
from pipeline.errors import UserError

METADATA = "relaxmim"  # the key of encoder_info in the metadata of an exported file
ZERO_PARTS = "_states.pt"  # how the names of the files in DeepSpeed's own checkpoints end
FULL_WEIGHTS = "the file of full weights that DeepSpeed's zero_to_fp32.py writes"


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
        if known and first == b"PK" and _is_program(path):
            raise unreadable(
                path, "it is a TorchScript program, whose code is not run; save its state_dict"
            )
        if not known and not tarfile.is_tarfile(path):
            if first == b"PK":
                raise unreadable(path, "it is a part of one")
            raise unreadable(path, "it is neither .safetensors nor a file of torch.save")
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from None
    return {}


def _is_program(path: Path) -> bool:
    """Whether a zip is what torch.jit.save writes, as of OpenAI's CLIP."""
    with zipfile.ZipFile(path) as file:
        return any(name.partition("/")[2] == "constants.pkl" for name in file.namelist())


def written_info(path: Path, text: str | None) -> dict[str, Any]:
    """What pipeline/export.py wrote into a file of weights (arch, options, mean, std), as `text`,
    or what the encoder.json of a run says of its own files; {} of others. UserError."""
    try:
        if text:
            return facts(text, METADATA)
        beside = _encoder_json(path)
        if beside is None or not beside.is_file():
            return {}
        return facts(beside.read_text(encoding="utf-8"), beside.name)
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(path, error) from None


def _encoder_json(path: Path) -> Path | None:
    """Where a run's encoder.json is, if the file has a name of the run's or of its checkpoints'
    weights."""
    folder = path.absolute().parent
    if path.name == "encoder.safetensors":
        return folder / "encoder.json"
    if path.name != "model.safetensors":
        return None
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    return run / "encoder" / "encoder.json"


def facts(text: str, name: str) -> dict[str, Any]:
    """What encoder.json, classifier.json or an export (its name) says of an encoder.

    ValueError where that does not build it, or does not say its pixels.
    """
    try:
        info = json.loads(text)
        _check_facts(info)
    except KeyError as error:
        raise ValueError(f"{name}: {error.args[0]} is missing") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None
    return dict(info)


def _check_facts(info: Any) -> None:
    if not isinstance(info, dict):
        raise TypeError("it is not an object with arch, options, mean and std")
    if not isinstance(info["arch"], str):
        raise TypeError("arch is not a name")
    if not isinstance(info["options"], dict):
        raise TypeError("options is not an object")
    size = info["options"]["img_size"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise TypeError(f"img_size {size!r} is not a number of pixels")
    for key in ("mean", "std"):
        check_statistic(key, info[key])


def check_statistic(key: str, value: Any) -> None:
    """TypeError where a value is no mean or std (the key) of pixels, which are in 0 … 1."""
    numbers = value if isinstance(value, list | tuple) else ()
    good = [is_number(v) and 0 <= v <= 1 and (v > 0 or key == "mean") for v in numbers]
    if good != [True] * 3:
        raise TypeError(
            f"{key} is not a list of three numbers in 0 … 1, the range of the pixels: {value!r}"
        )


def unreadable(path: Path, why: object) -> UserError:
    """What to say of a file that holds no weights."""
    return UserError(f"{path}: cannot be read as a file of weights ({why})")

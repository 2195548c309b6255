"""What a mistyped, misplaced or renamed key was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from shard_tools.home import expand_home

# Old key → new key; since 0.2.
RENAMED = {
    "views.hide": "views.mask_ratio",
    "views.second_hide": "views.second_mask_ratio",
    "encoder.hidden": "encoder.masked_tokens",
    "encoder.style": "encoder.init",
}
# (key, old value) → new value; since 0.2.
RENAMED_VALUES = {
    ("encoder.masked_tokens", "token"): "replace",
    ("measure.tokens", "class"): "cls",
    ("measure.tokens", "mean"): "mean_patch",
    ("measure.tokens", "patch+class"): "patch+cls",
}
# What other projects call it, where the letters alone do not lead there.
ALIASES = {
    "lr": "optimizer.base_lr",
    "blr": "optimizer.base_lr",
    "learning_rate": "optimizer.base_lr",
    "batch": "batch_size",
    "weight_decay": "optimizer.weight_decay.value",
    "wd": "optimizer.weight_decay.value",
    "clip_grad": "optimizer.gradient_clipping",
    "mask": "views.mask_ratio",
    "masking_ratio": "views.mask_ratio",
    "tau": "measure.temperature",
    "model": "encoder.arch",
    "img_size": "encoder.image_size",
    "input_size": "encoder.image_size",
    "num_workers": "data.workers",
}


# Of a section that has one of several classes: its key → the classes by kind.
Kinds = Mapping[str, Mapping[str, type[BaseModel]]]


def all_keys(model: Any, kinds: Kinds, prefix: str = "") -> list[str]:
    """The full keys `a.b.c` of a settings class and its sections."""
    keys: dict[str, None] = {}
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        keys[key] = None
        for section in kinds[key].values() if key in kinds else _models(field.annotation):
            keys |= dict.fromkeys(all_keys(section, kinds, f"{key}."))
    return list(keys)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def meant(key: str, model: Any, kinds: Kinds) -> str:
    """`; did you mean …?` for an unknown key of a settings class, or "" where nothing is near."""
    if key in RENAMED:
        return f"; it is now {RENAMED[key]}"
    if (section := key.split(".", 1)[0]) in kinds:
        owners = [k for k, m in kinds[section].items() if key in all_keys(m, kinds, f"{section}.")]
        if owners:
            verb = "has" if len(owners) == 1 else "have"
            return f"; only {section}.kind {' and '.join(owners)} {verb} it"
    known = all_keys(model, kinds)
    last = key.rsplit(".", 1)[-1]
    full = [ALIASES[last]] if ALIASES.get(last) in known else []
    full = full or [k for k in known if k.rsplit(".", 1)[-1] == last]
    if not full:
        ends = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        full = near or [ends[e] for e in difflib.get_close_matches(last, list(ends), n=1)]
    return f"; did you mean {' or '.join(full[:3])}?" if full else ""


def meant_value(key: str, value: Any) -> str:
    """`; it is now …` for a renamed value of a key, or ""."""
    new = RENAMED_VALUES.get((key, value)) if isinstance(value, str) else None
    return f"; it is now {new}" if new else ""


def bundled(name: str | Path, folder: Path, suffix: str) -> Path:
    """The file that `name` means: itself, or the bundled file of that bare name in `folder`.

    A bare name that is neither is returned as it is; `choices` then lists what there is.
    """
    path = Path(expand_home(str(name)))
    if path.is_file() or len(path.parts) != 1:  # a folder `mae` may be a checkout of MAE
        return path
    found = folder / f"{path.name.removesuffix(suffix)}{suffix}"
    return found if found.is_file() else path


def choices(name: str | Path, folder: Path, suffix: str) -> str:
    """`; did you mean …? bundled are: …` for a bare name that is no file, "" for a path.

    Not a YAML that only others build on, which has no name.
    """
    if len(Path(name).parts) != 1:
        return ""
    files = [p for p in folder.glob(f"*{suffix}") if suffix != ".yaml" or _has_name(p)]
    names = sorted(p.stem for p in files)
    near = difflib.get_close_matches(Path(name).name.removesuffix(suffix), names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"; {hint}bundled are: {', '.join(names)}"


def _has_name(recipe: Path) -> bool:
    return any(line.startswith("name:") for line in recipe.read_text("utf-8").splitlines())

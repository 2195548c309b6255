"""Files of weights: read without running code, and where in them an encoder is kept.

A checkpoint is a dictionary in dictionaries; the encoder is whatever has a patch embedding. Around
it stand the names of containers (`model`, `state_dict`, `teacher`) and of wrappers (`module.`,
`_orig_mod.`), which differ by project and are looked through, not listed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import pathlib
import re
import types
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.weights import mmpretrain
from pipeline.weights.header import FULL_WEIGHTS, ZERO_PARTS

# Where an average of the weights is kept beside them (timm; DeiT and ConvNeXt; others).
EMA = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "model_ema_state_dict")
# Which of several encoders in one file the project itself evaluates: its average where that is the
# method (I-JEPA, DINO, iBOT, MSN), the online one in MoCo v3, solo-learn and lightly's MoCo. Parts
# of a word: momentum_encoder, backbone_momentum, teacher_embedding_model, anchor_backbone.
_ROLES = {"target": 0, "teacher": 0, "student": 2, "anchor": 2, "momentum": 3}
_ONLINE = 1  # of what has no role
# Wrappers that may stand anywhere in a name: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# What the first layer of a ViT is called: by timm, NaFlexViT, CLIP, Meta's PE.
_FIRST = re.compile(r"(?:^|(?<=\.))(?:patch_embed\.|embeds\.proj\.weight$|visual\.conv1\.weight$)")

_TRANSFORMERS = re.compile(r"(?:^|\.)embeddings\.patch_embeddings?\.(?:projection\.)?weight$")


@dataclass(frozen=True, eq=False)
class Found:
    """An encoder in a file: its weights, and the words that stood before their names.

    words: containers and prefixes, outermost first (("state_dict", "module", "base_encoder")).
    around: with what is beside a prefix `encoder.`, under that prefix.
    others: the words of other encoders there, which are not taken.
    mmpretrain: whether the names were mmpretrain's; they are timm's here.
    """

    state: dict[str, Tensor]
    words: tuple[str, ...]
    around: dict[str, Tensor] = field(default_factory=dict)
    others: tuple[tuple[str, ...], ...] = ()
    mmpretrain: bool = False

    @property
    def place(self) -> str:
        """Where it is in the file, for a sentence."""
        return ".".join(self.words) or "the file itself"


def load_tensors(path: Path) -> Any:
    """The content of a file of weights (.safetensors, or of torch.save), on the CPU.

    Reads tensors and plain values only (numbers of numpy, paths, dates, the argparse.Namespace of
    training scripts): no code of the file runs. Raises UserError.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_plain_values()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut or damaged pickle ends in any
        said = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        said = said.partition(" Check the documentation")[0]  # of torch.load
        reason = _refused_objects(path) or said[:160] or type(error).__name__
        raise UserError(f"{path}: cannot be read as a file of weights ({reason})") from None
    if record := _damaged_record(path):
        raise UserError(
            f"{path}: is damaged (the checksum of its {record} is another); copy or download it "
            "again"
        )
    return content


def _damaged_record(path: Path) -> str:
    """A record of a file of torch.save's whose CRC-32 is not its content's, which torch.load does
    not look at; "" where there is none, or no checksum: torch can leave out all of them."""
    if not zipfile.is_zipfile(path):  # torch's form before 1.6
        return ""
    sound, damaged = [], []
    with zipfile.ZipFile(path) as file:
        for record in file.namelist():
            try:
                with file.open(record) as content:
                    while content.read(1 << 20):
                        pass
                sound.append(record)
            except zipfile.BadZipFile:
                damaged.append(record)
    return damaged[0] if damaged and sound else ""


def _plain_values() -> list[Any]:
    """Types of torch.load's safe_globals that hold values and run nothing of a file's."""
    kinds = [np.dtype(code) for code in "?bBhHiIlLqQefdFDSU"]
    paths = [pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath]
    plain: list[Any] = [
        argparse.Namespace, types.SimpleNamespace, collections.defaultdict, np.dtype, np.ndarray,
        datetime.datetime, datetime.date, datetime.timedelta,
        *{type(kind) for kind in kinds}, *paths, frozenset, range, slice,
    ]  # fmt: skip
    rebuild, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since numpy 2
        plain += [(rebuild, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    for module in ("pathlib", "pathlib._local"):  # the latter is Python 3.13's
        plain += [(path, f"{module}.{path.__name__}") for path in paths]
        plain.append((pathlib.PureWindowsPath, f"{module}.WindowsPath"))
    return plain


def _refused_objects(path: Path) -> str:
    """Which objects of a file torch refuses to make, as a reason; "" where that is not it."""
    with contextlib.suppress(Exception):
        with torch.serialization.safe_globals(_plain_values()):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if names:
            return (
                f"it holds {', '.join(sorted(names)[:3])}, whose code is not run; save its weights "
                "alone in a file"
            )
    return ""


def refuse_integers(model: nn.Module, state: Mapping[str, Tensor], path: object) -> None:
    """UserError where a parameter of a model would take whole numbers, as of a quantised file,
    which load_state_dict casts without a word. Buffers, such as indices of positions, may."""
    for name, _ in model.named_parameters():
        value = state.get(name)
        if value is not None and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {name} holds {kind}, not floating-point numbers; give weights that are "
                "not quantised (fp32, fp16 or bf16)"
            )


def find_encoder(content: Any, path: Path, *, ema: bool = False) -> Found:
    """The encoder in a file's content. ema: the average that is kept beside the weights.

    UserError where there is none, where ema asks for what is not there, or where two are alike.
    """
    everything = list(_encoders(content, ()))
    averaged = [f for f in everything if not {*EMA}.isdisjoint(f.words)]
    if ema:
        ranks = {_rank(f) for f in everything}
        role = next((r for r in (0, 3) if r in ranks), _ONLINE if 2 in ranks else None)
        chosen = averaged or [f for f in everything if _rank(f) == role]
        if everything and not chosen:
            raise UserError(f"--ema: {path} keeps no average of its weights ({', '.join(EMA[:3])})")
    else:
        chosen = [f for f in everything if f not in averaged] or averaged
    if not chosen:
        if not isinstance(content, dict) or not content:
            what = "an empty dictionary" if content == {} else f"a {type(content).__name__}"
            raise UserError(f"{path}: holds {what}, where weights by their names are expected")
        shown = ", ".join(map(str, list(content)[:3]))
        _refuse_names(content, path)
        raise UserError(
            f"{path}: holds no patch_embed.proj.weight, so no vision transformer under timm's "
            f"names; its first entries are {shown}"
            + (f"; give {FULL_WEIGHTS}" if path.name.endswith(ZERO_PARTS) else "")
        )
    best, *rest = sorted(chosen, key=_order)
    if rest and _order(rest[0]) == _order(best):
        raise UserError(
            f"{path}: holds two encoders, {best.place} and {rest[0].place}; save one of them in a "
            "file of its own"
        )
    check_shapes(best.state, path)
    others = tuple(f.words for f in everything if f is not best)
    return replace(best, others=others)


def _refuse_names(content: Any, path: Path) -> None:
    """UserError for a ViT under names of which no file alone is read here; it says what is."""
    names = list(_names(content, 3))
    if any(_TRANSFORMERS.search(name) for name in names):
        raise UserError(
            f"{path}: has the names of transformers, of which a folder is read; give the folder of "
            "a ViTModel or ViTMAEForPreTraining, with its config.json and model.safetensors"
        )
    if any(name.endswith("conv_proj.weight") for name in names):
        raise UserError(
            f"{path}: has torchvision's names of a vision transformer, which are not read; give a "
            "file with timm's names (patch_embed.proj.weight, blocks.0.attn.qkv.weight, …)"
        )


def _names(content: Any, depth: int) -> Iterator[str]:
    """Names of the tensors in a dictionary and in the dictionaries in it."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, Tensor) and isinstance(name, str):
            yield name
        elif depth:
            yield from _names(value, depth - 1)


def check_shapes(state: Mapping[str, Tensor], path: object) -> None:
    """UserError for weights that are not there, and for those by which an encoder is read where
    they have too few axes."""
    for name, value in state.items():
        if not value.numel():
            raise UserError(
                f"{path}: {name} is empty, as in a rank's part of a ZeRO-3 or FSDP checkpoint; "
                "give the full weights (DeepSpeed's zero_to_fp32.py writes them)"
            )
        if value.ndim < _LEAST_AXES.get(name, 0):
            raise UserError(
                f"{path}: {name} has shape {list(value.shape)}, which no vision transformer has"
            )


_LEAST_AXES = {"patch_embed.proj.weight": 2, "pos_embed": 3}


def _rank(found: Found) -> int:
    parts = (part for word in found.words for part in word.split("_"))
    return min((_ROLES[part] for part in parts if part in _ROLES), default=_ONLINE)


def _order(found: Found) -> tuple[int, int]:
    """By which the first encoder of a file is taken."""
    return _rank(found), len(found.words)


def _encoders(content: Any, words: tuple[str, ...]) -> Iterator[Found]:
    """Every encoder in a dictionary and, three deep, in the dictionaries in it."""
    if not isinstance(content, dict):
        return
    named = {k: v for k, v in content.items() if isinstance(k, str)}
    state = {_unwrapped(k): v for k, v in named.items() if isinstance(v, Tensor)}
    starts = {name[: match.start()] for name in state if (match := _FIRST.search(name))}
    if "conv1.weight" in state and "class_embedding" in state:  # PE; not a convolutional network
        starts.add("")
    for start in sorted(starts, key=len):
        sam = f"{start}neck.0.weight" in state  # timm knows it by the prefix `image_encoder.`
        kept = start.removesuffix("image_encoder.") if sam else start
        outer = start.removesuffix("encoder.")
        inner, place = _below(kept, state), (*words, *start.split(".")[:-1])
        if mmpretrain.FIRST in inner:
            yield Found(mmpretrain.with_timms_names(inner), place, mmpretrain=True)
        else:
            yield Found(inner, place, _below(outer, state))
    if len(words) < 3:
        for name, value in named.items():
            yield from _encoders(value, (*words, name))


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

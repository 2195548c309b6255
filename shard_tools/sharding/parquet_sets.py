"""Which Parquet files of a folder are one split of a data set, as Hugging Face lays them out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from shard_tools.cli import ToolError
from shard_tools.sharding.folders import class_folders, files_in
from shard_tools.sharding.found import HELD_OUT, TRAINING

SUFFIX = ".parquet"
# train-00000-of-00294.parquet, with or without a digest at the end of its name
_PART = re.compile(r"(?P<split>.+)-(?P<part>\d+)-of-(?P<parts>\d+)(-\w+)?\.parquet", re.IGNORECASE)


def is_parquet(name: str) -> bool:
    """True for a file name that Parquet files have."""
    return name.lower().endswith(SUFFIX)


def arrow_hint(name: str) -> str:
    """What to do with a file of `Dataset.save_to_disk`; "" for other files."""
    if not name.lower().endswith(".arrow"):
        return ""
    return "; datasets.load_from_disk(FOLDER)[SPLIT].to_parquet(SPLIT.parquet) makes what is read"


def parquet_sets(root: Path) -> dict[str, tuple[Path, ...]]:
    """Split → its files in order; {} where there are none. They are in `root`, in `root/data` or in
    the only folder of `root`, called `train-00000-of-00002.parquet` or `train.parquet`, or in a
    folder per split. The split of files whose names are numbers is "". ToolError where one of
    several parts is missing."""
    folders = class_folders(root)
    inside = ["data"] if "data" in folders else folders if len(folders) == 1 else []
    for folder in (root, *(root / name for name in inside)):
        if sets := _splits(_files(folder)) or _split_folders(folder):
            return sets
    return {}


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in files_in(folder, is_parquet)]


def _split_folders(root: Path) -> dict[str, tuple[Path, ...]]:
    """Of a folder per split, as Hugging Face's own conversion makes them: train/0000.parquet, …"""
    found = {name: files for name in class_folders(root) if (files := _files(root / name))}
    for name, files in found.items():
        if name.lower().startswith("partial-"):
            raise ToolError(
                f"{root / name}: Hugging Face converted the first gigabytes of {name[8:]} only; "
                f"fetch the data set's own files, or give {root / name} to take this part"
            )
        _splits(files)
    if not {name.lower() for name in found} & (TRAINING | HELD_OUT):
        return {}
    return {name: tuple(files) for name, files in found.items()}


def _splits(files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    splits: dict[str, list[Path]] = {}
    for path in files:
        match = _PART.fullmatch(path.name)
        split = match["split"] if match else path.stem
        splits.setdefault("" if split.isdecimal() else split, []).append(path)
    for paths in splits.values():
        _check_parts(paths)
    return {split: tuple(paths) for split, paths in splits.items()}


def _check_parts(paths: Sequence[Path]) -> None:
    """Of files that say how many they are, each is there once."""
    matches = [match for path in paths if (match := _PART.fullmatch(path.name))]
    numbers = [int(match["part"]) for match in matches]
    if not matches:
        return
    absent = set(range(max(int(match["parts"]) for match in matches))) - set(numbers)
    if absent:
        raise ToolError(f"{paths[0].parent}: part {min(absent)} is missing beside {paths[0].name}")
    if len(paths) > len(set(numbers)):
        raise ToolError(
            f"{paths[0].parent}: has more {SUFFIX} files than the parts that {paths[0].name} names"
        )

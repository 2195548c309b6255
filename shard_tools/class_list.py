"""The classes that other shards or a text file name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from shard_tools.cli import ToolError, read_list
from shard_tools.manifest import read_manifest

_SYNSET_LINE = re.compile(r"(n\d{8})(?:[\s,;].*)?")


def read_classes(path: Path | None) -> tuple[str, ...]:
    """Class order of a shard folder's manifest, or of a text file with one class per line.

    A file of `n01440764 tench, Tinca tinca` lines (LOC_synset_mapping.txt) gives the synsets.
    """
    if path is None:
        return ()
    if path.is_dir():
        classes = read_manifest(path).classes
    elif path.is_file():
        return parse_classes(read_list(path), str(path))
    else:
        raise ToolError(f"{path}: no such file or shard folder to take the classes from")
    return _checked(classes, str(path))


def parse_classes(lines: Iterable[str], path: str) -> tuple[str, ...]:
    """As `read_classes`, of the lines of a text file, which is called `path`."""
    lines = [line.strip() for line in lines if line.strip()]
    synsets = [_SYNSET_LINE.fullmatch(line) for line in lines]
    classes = tuple(match[1] if match else "" for match in synsets)
    return _checked(classes if all(classes) else tuple(lines), path)


def _checked(classes: tuple[str, ...], path: str) -> tuple[str, ...]:
    if not classes or len(set(classes)) != len(classes):
        raise ToolError(f"{path}: holds no classes, or one of them twice")
    return classes

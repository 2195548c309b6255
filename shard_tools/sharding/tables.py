"""A CSV with a header line, or a JSONL, of image paths and labels."""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import naming
from shard_tools.cli import ToolError
from shard_tools.sharding.found import HELD_OUT, LONGEST_IMAGE, TRAINING, Image, Images, too_long

# A class index beyond this is taken for a mistake.
MOST_CLASSES = 1_000_000
# Columns that hold labels in other people's lists: named, so that no label is dropped silently.
LABEL_LIKE = (
    *("labels", "class", "classes", "class_name", "classname", "class_id", "class_index"),
    *("class_idx", "cls", "synset", "synsets", "wnid", "category", "category_id", "target"),
    *("targets", "y", "label_id", "label_name", "label_idx", "label_index", "species", "tag"),
)
_LONGEST_HEADER = 1 << 16  # characters
_NO_VALUE = ("", "none", "null", "nan")
_INTEGER = re.compile(r"0|[1-9][0-9]*")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)

Rows = list[tuple[int, dict[str, Any]]]  # (line or row number for messages, column → value)


def list_table(path: Path, root: Path) -> tuple[Images, list[int | str]]:
    """Images and their labels: class indices, class names, or none at all (an empty list).

    The columns are `path` (relative to `root`; also `file_name`, as Hugging Face's metadata.csv has
    it) and optionally `label`, in any case. UserError names the row where labels are mixed,
    fractional, negative, missing, or contradict each other.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    images = Images(_image(path, number, row, root) for number, row in rows)
    labels = one_kind(path, ((number, row.get("label")) for number, row in rows))
    _check_one_set(path, rows)
    _check_repeats(path, rows, images, labels)
    return images, labels


def label_column(path: Path) -> str:
    """The column of labels of a list of images, by its first line; "" for any other file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            line = file.readline(_LONGEST_HEADER)
        csv_line = path.suffix.lower() == ".csv"
        names = next(csv.reader([line]), []) if csv_line else list(json.loads(line))
    except (OSError, ValueError, TypeError, RecursionError, csv.Error):
        return ""
    columns = _columns([str(name) for name in names])
    called = [name for name in columns if name == "label" or word(name) in LABEL_LIKE]
    return called[0] if "path" in columns and called else ""


def _csv_rows(path: Path) -> Rows:
    with naming(path, "cannot be read"), open(path, newline="", encoding="utf-8-sig") as file:
        try:
            lines = list(csv.reader(file, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ToolError(f"{path}: cannot be read ({error})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ToolError(f"{path}: is empty; it needs a header line with the column `path`")
    header = _columns(lines[0])
    _check_columns(path, header, "the header")
    rows: Rows = []
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(header):
            raise ToolError(
                f"{path}: row {number} has {len(line)} fields where the header has {len(header)}"
            )
        rows.append((number, dict(zip(header, line, strict=True))))
    return rows


def _json_rows(path: Path) -> Rows:
    rows: Rows = []
    with naming(path, "cannot be read"), open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append((number, _json_row(path, number, line)))
        except UnicodeDecodeError as error:
            raise ToolError(f"{path}: cannot be read as UTF-8 ({error})") from error
    return rows


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        pairs = json.loads(line, object_pairs_hook=list)
    except json.JSONDecodeError as error:  # whose own text has a line 1, that of the row
        why = f"{error.msg} at character {error.colno}"
        raise ToolError(f"{path}: row {number} is no JSON ({why})") from error
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{path}: row {number} is no JSON ({error})") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ToolError(f'{path}: row {number} is no JSON object such as {{"path": "a.jpg"}}')
    columns = _columns([name for name, _ in pairs])
    _check_columns(path, columns, f"row {number}")
    return dict(zip(columns, (value for _, value in pairs), strict=True))


def _columns(names: Sequence[str]) -> list[str]:
    """The names in lower case, with `path` for the `file_name` of Hugging Face."""
    columns = [name.strip().lower() for name in names]
    if "path" not in columns:
        return ["path" if name == "file_name" else name for name in columns]
    return columns


def word(column: str) -> str:
    """The name of a column as LABEL_LIKE has it."""
    return re.sub(r"[\s-]+", "_", column)


def _check_columns(path: Path, columns: list[str], where: str) -> None:
    if "path" not in columns:
        raise ToolError(f"{path}: {where} has no column `path`; found {', '.join(columns)[:200]}")
    for name in ("path", "label"):
        if columns.count(name) > 1:
            raise ToolError(f"{path}: {where} has the column `{name}` twice")
    unused = [name for name in columns if word(name) in LABEL_LIKE]
    if unused:
        raise ToolError(
            f"{path}: {where} has a column `{unused[0]}`, which looks like labels and is not used; "
            "call the labels `label`, or remove the column"
        )


def _image(path: Path, number: int, row: dict[str, Any], root: Path) -> Image:
    name = row["path"]
    if not isinstance(name, str) or not name.strip() or set(name) & set("\n\0"):
        raise ToolError(f"{path}: row {number} has no usable path ({name!r})")
    try:
        about = os.stat(root / name)
    except OSError as error:
        raise ToolError(f"{path}: row {number}: {root / name}: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise ToolError(f"{path}: row {number} has no usable path ({name!a})") from error
    if not stat.S_ISREG(about.st_mode):
        raise ToolError(f"{path}: row {number}: {root / name}: is not a regular file")
    if about.st_size > LONGEST_IMAGE:
        raise too_long(f"{path}: row {number}: {root / name}", about.st_size)
    return Image(name, name, 0, about.st_size)


def one_kind(path: Path, rows: Iterable[tuple[int, Any]]) -> list[int | str]:
    """The labels of rows, (row number for messages, value), all as integers or all as names; []
    where no row has one. UserError names the row where they are mixed, fractional, negative or
    missing."""
    values = [(number, _value(path, number, value)) for number, value in rows]
    labels = [label for _, label in values if label is not None]
    if labels and len(labels) < len(values):
        absent = next(number for number, label in values if label is None)
        raise ToolError(f"{path}: row {absent} has no label, others do")
    kinds = [type(label) for label in labels]
    if len(set(kinds)) > 1:
        first = next(i for i, kind in enumerate(kinds) if kind is not kinds[0])
        raise ToolError(
            f"{path}: row {values[first][0]} has the label {labels[first]!r}, row {values[0][0]} "
            f"{labels[0]!r}; labels are all class indices or all names"
        )
    return labels


def _value(path: Path, number: int, value: Any) -> int | str | None:
    """One label as a class index or a name; None where there is none."""
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _NO_VALUE:
            return None
        if not _NUMBER.fullmatch(text):
            return text
        value = int(text) if _INTEGER.fullmatch(text) else text
    if type(value) is not int or not 0 <= value < MOST_CLASSES:
        raise ToolError(
            f"{path}: row {number} has the label {repr(value)[:80]}, which is neither a class "
            f"index (0 to {MOST_CLASSES - 1}) nor a name"
        )
    return value


def _check_one_set(path: Path, rows: Rows) -> None:
    """No column says that some rows are a training set and others a held-out one."""
    for column in sorted({name for _, row in rows for name in row} - {"path", "label"}):
        said = {str(row.get(column)).strip().lower() for _, row in rows}
        if said & TRAINING and said & HELD_OUT:
            sets = ", ".join(sorted(said & (TRAINING | HELD_OUT)))
            raise ToolError(
                f"{path}: its column `{column}` names a training set and a held-out one ({sets}); "
                "give a table of one of them, or one without the column"
            )


def _check_repeats(path: Path, rows: Rows, images: Images, labels: list[int | str]) -> None:
    """An image may come twice, but not with two labels."""
    seen: dict[str, int] = {}
    for i, image in enumerate(images):
        first = seen.setdefault(os.path.normpath(image.file), i)
        if labels and labels[first] != labels[i]:
            raise ToolError(
                f"{path}: row {rows[i][0]} gives {image.name} the label {labels[i]!r}, "
                f"row {rows[first][0]} {labels[first]!r}"
            )

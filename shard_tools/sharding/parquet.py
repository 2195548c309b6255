"""The images of Parquet files, in which Hugging Face keeps data sets: a column of encoded images,
and one of labels. Needs pyarrow.

Pages and compression hide where the bytes of an image are. So all images of a file are copied once,
as a stream, into a plain tar, and are byte ranges of that.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from pipeline.errors import naming
from shard_tools.cli import ToolError, progress
from shard_tools.members import read_members
from shard_tools.sharding.archives import unpacked_tar
from shard_tools.sharding.found import LONGEST_IMAGE, Found, Image, Images, Unskippable, too_long
from shard_tools.sharding.tables import LABEL_LIKE, one_kind, word
from shard_tools.tar import ShardWriter

_ROWS = 16  # images that are in memory at a time
_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True)
class Wanted:
    """labelled: labels are read. images, labels: the columns to take, "" = the only ones."""

    labelled: bool = True
    images: str = ""
    labels: str = ""


@dataclass(frozen=True)
class Columns:
    """The column of images (bytes or, `nested`, structs of bytes and path), and that of labels
    ("": none) with the names of its numbers, where they have names."""

    images: str
    nested: bool
    labels: str
    names: tuple[str, ...]


@dataclass
class Rows:
    """What was found; the label of each image: a class index or a name, and [] where there are no
    labels; the names of the indices, () where they have none."""

    found: Found
    labels: list[int | str]
    names: tuple[str, ...]


def list_parquet(paths: Sequence[Path], unpacked: Path | None, skip: bool, wanted: Wanted) -> Rows:
    """The images of one data set in one or several Parquet files, in the order of their rows. They
    have the names that the rows give them if all do and none comes twice, else those of file and
    row. Which columns are read is said by Hugging Face's description in the file (`Image`,
    `ClassLabel`), or else by their types and names.

    unpacked: folder for the plain tars, None = none may be made. skip: what is damaged, and rows
    without an image, are reported in `Found.missing`. UserError where a column is missing or one of
    several, and for labels that are missing or neither class indices nor names.
    """
    rows, names, columns = Rows(Found(), [], ()), [], None
    if unpacked is not None:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        print(f"{paths[0]}{more}: Parquet; unpacking it into {unpacked}", flush=True)
    shown = progress(len(paths), "Parquet", unit=" files") if len(paths) > 1 else None
    with shown or nullcontext():
        for path in paths:
            with rows.found.catching(path.name, skip):
                here = _columns(path, wanted)
                columns = columns or here
                if here != columns:
                    raise Unskippable(f"{path}: has other columns or classes than {paths[0]}")
                found, given, labels = _list_file(path, columns, unpacked, skip)
                rows.labels += _checked(path, labels, columns)
                rows.found.extend(found)
                names += given
            if shown is not None:
                shown.update()
    rows.names = columns.names if columns else ()
    if len({type(label) for label in rows.labels}) > 1:
        raise ToolError(f"{paths[0].parent}: labels are numbers in one file and names in another")
    if all(names) and len(set(names)) == len(names):
        images = zip(rows.found.images, names, strict=True)
        rows.found.images = Images(image._replace(name=name) for image, name in images)
    return rows


def _list_file(
    path: Path, columns: Columns, unpacked: Path | None, skip: bool
) -> tuple[Found, list[str], list[tuple[int, Any]]]:
    """The images of one file, the names that it gives them ("": none), and (row, label)."""
    copy = partial(_copy_images, path, columns)
    tar = unpacked_tar(path, unpacked, "Parquet", copy, part=f" {columns.images}")
    with _open(path) as table:
        names = _names(table, columns)
        labels = table.read([columns.labels]).column(0).to_pylist() if columns.labels else []
    found, rows = Found(), []
    for row, member in enumerate(read_members(tar)):
        with found.catching(f"{path.name}, row {row}", skip):
            if not member.size:
                only = f", only the name of a file ({names[row]})" if names[row] else ""
                raise ToolError(f"{path}: row {row} holds no image{only}")
            if member.size > LONGEST_IMAGE:
                raise too_long(f"{path}: row {row}", member.size)
            name = f"{path.stem}/{row:08d}"
            found.images.append(Image(name, os.path.abspath(tar), member.offset, member.size))
            rows.append(row)
    return found, [names[row] for row in rows], [(row, labels[row]) for row in rows if labels]


def _copy_images(path: Path, columns: Columns, out: BinaryIO) -> None:
    """Write a tar of all rows, each a member; that of a row without an image is empty."""
    writer = ShardWriter(out.fileno(), checksum=False)
    for row, image in enumerate(_images(path, columns)):
        writer.write(f"{row:08d}", {"image": image})
    writer.close()


def _images(path: Path, columns: Columns) -> Iterator[bytes]:
    leaf = f"{columns.images}.bytes" if columns.nested else columns.images
    with _open(path) as table:
        for batch in table.iter_batches(_ROWS, columns=[leaf], use_threads=False):
            values = batch.column(0)
            for value in values.field("bytes") if columns.nested else values:
                yield value.as_py() or b""


def _names(table: Any, columns: Columns) -> list[str]:
    """The names that the rows give their images, "" where one has none."""
    none = [""] * table.metadata.num_rows
    if not columns.nested or "path" not in _fields(table.schema_arrow.field(columns.images)):
        return none
    column = table.read([f"{columns.images}.path"], use_threads=False).column(0)
    paths = (value["path"] if value else None for value in column.to_pylist())
    names = [path.strip() if isinstance(path, str) else "" for path in paths]
    return none if any(set(name) & set("\n\0") for name in names) else names


def _checked(path: Path, rows: list[tuple[int, Any]], columns: Columns) -> list[int | str]:
    """The labels of (row, label): all class indices that have a name, or all names."""
    withheld = next((row for row, label in rows if label == -1), None)
    if withheld is not None:
        raise Unskippable(
            f"{path}: row {withheld} has the label -1, which says that it is withheld; "
            "--unlabelled takes the images only"
        )
    try:
        labels = one_kind(path, rows)
    except ToolError as error:
        raise Unskippable(str(error)) from error
    if rows and not labels:
        raise Unskippable(f"{path}: its column `{columns.labels}` is empty; see --unlabelled")
    named = [label for label in labels if isinstance(label, int)] if columns.names else []
    if named and max(named) >= len(columns.names):
        raise Unskippable(
            f"{path}: label {max(named)}, but {len(columns.names)} classes have names"
        )
    return labels


def _columns(path: Path, wanted: Wanted) -> Columns:
    """Which columns of a file are read."""
    with _open(path) as table:
        schema = table.schema_arrow
    said = _description(schema)
    images = _one(path, schema, _image_columns(schema, said), wanted.images, "images")
    if not images:
        raise Unskippable(f"{path}: has no column of images; found {_list(schema.names)}")
    _check_binary(path, schema.field(images))
    labels = ""
    if wanted.labelled:
        labels = _one(path, schema, _label_columns(schema, said), wanted.labels, "labels")
    names = tuple(map(str, said.get(labels, {}).get("names") or ()))
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise Unskippable(f"{path}: two classes of its column `{labels}` are called {twice[0]!r}")
    return Columns(images, "bytes" in _fields(schema.field(images)), labels, names)


def _check_binary(path: Path, field: Any) -> None:
    """A column of images, or the bytes in its structs, is one of binary values."""
    types = importlib.import_module("pyarrow").types
    kind = field.type.field("bytes").type if "bytes" in _fields(field) else field.type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (_is_binary(kind) or types.is_fixed_size_binary(kind)):
        raise Unskippable(
            f"{path}: its column `{field.name}` is of the type {str(field.type)[:80]}, not of "
            "encoded images (binary values)"
        )


def _one(path: Path, schema: Any, candidates: list[str], chosen: str, what: str) -> str:
    """The column that was chosen or is the only one, "" where there is none."""
    option = f"--{what.rstrip('s')}-column"
    if chosen and schema.names.count(chosen) != 1:
        raise Unskippable(f"{option} {chosen}: {path} has the columns {_list(schema.names)}")
    if not chosen and len(candidates) > 1:
        raise Unskippable(
            f"{path}: has several columns of {what}, {_list(candidates)}; choose with {option}"
        )
    return chosen or next(iter(candidates), "")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)[:200]


def _image_columns(schema: Any, said: dict[str, Any]) -> list[str]:
    described = [name for name in schema.names if said.get(name, {}).get("_type") == "Image"]
    structs = [field.name for field in schema if "bytes" in _fields(field)]
    bare = [field.name for field in schema if _is_binary(field.type)]
    return described or structs or bare


def _is_binary(kind: Any) -> bool:
    types = importlib.import_module("pyarrow").types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _label_columns(schema: Any, said: dict[str, Any]) -> list[str]:
    described = [name for name in schema.names if said.get(name, {}).get("_type") == "ClassLabel"]
    called = [name for name in schema.names if name.lower() == "label"]
    like = [name for name in schema.names if word(name.lower()) in LABEL_LIKE]
    return described or called or like


def _fields(field: Any) -> list[str]:
    """The names of a struct's fields, [] of any other column."""
    pyarrow = importlib.import_module("pyarrow")
    kind = field.type
    is_struct = pyarrow.types.is_struct(kind)
    return [kind.field(i).name for i in range(kind.num_fields)] if is_struct else []


def _description(schema: Any) -> dict[str, Any]:
    """What Hugging Face's `datasets` says of each column; {} in files of others."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: said for name, said in features.items() if isinstance(said, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A ParquetFile; ToolError where it, or what is read from it, is damaged."""
    pyarrow, parquet = _pyarrow(path), importlib.import_module("pyarrow.parquet")
    with naming(path, "cannot be read"):
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    options = {"buffer_size": _BUFFER, "pre_buffer": False, "page_checksum_verification": True}
    try:
        with file, parquet.ParquetFile(file, **options) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        text = str(error).strip().split("\n")[0][:200]
        raise ToolError(f"{path}: cannot be read as Parquet ({text})") from error


def _pyarrow(path: Path) -> ModuleType:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise Unskippable(
            f"{path}: is Parquet, which needs pyarrow, which is not installed: pip install pyarrow"
        ) from None

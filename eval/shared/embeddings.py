"""A folder of embeddings: written batch by batch by several ranks, resumed after a kill, read.

embeddings.npy       [N, D] or [N, L, D], memory-mappable, in the order of the images
embeddings.parquet   instead: columns key, label, path, embedding
names.txt            key, label and path of each row, tab between them (no line before them)
embeddings.json      what they are of: images, encoder, feature, rows without an image; last
partial/             while it is written: rows, one byte per batch that is done, settings
"""

import fcntl
import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from types import ModuleType
from typing import Any

import numpy as np

from pipeline.errors import UserError, naming, reason
from shard_tools.atomic import fsync, own_files, remove_own, write_atomic, write_json

INFO, ROWS, TABLE, NAMES = (
    "embeddings.json", "embeddings.npy", "embeddings.parquet", "names.txt",
)  # fmt: skip
FILES = {"npy": (NAMES, ROWS), "parquet": (TABLE,)}  # of a --format, beside INFO
PARTIAL, DONE, SETTINGS = "partial", "done.bin", "settings.json"
OWN = (ROWS, TABLE, DONE, SETTINGS)  # in PARTIAL
TODO, FINISHED, DAMAGED = 0, 1, 2  # of a batch; the last: some of its images would not decode

# What the JSON files must have, and of which type.
OF_SETTINGS = {
    "feature": str, "dtype": str, "format": str, "precision": str, "micro_batch": int,
    "on_error": str, "image size": int, "resize": int, "weights": str,
}  # fmt: skip
OF_ENCODER = {"source": str, "arch": str, "options": dict, "random": bool}
OF_INFO = {
    "settings": dict, "encoder": dict, "images": str, "root": str | None, "shape": list,
    "classes": list,
}  # fmt: skip
LATER = ("content of images",)  # settings that earlier versions did not record
MOVE = "; move it away or choose another --output"
AGAIN = "; move the folder away and embed the images again"


def prepare(folder: Path, settings: dict[str, Any], shape: tuple[int, ...], dtype: str) -> bool:
    """Make the files that the ranks write to, or find those of a run that was killed.

    settings: what the rows depend on (JSON). False where all rows are there already. UserError
    where the folder holds embeddings with other settings, damaged ones or files of others, or the
    disk is too small.
    """
    settings, partial = json.loads(json.dumps(settings)), folder / PARTIAL
    with naming(folder, "cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            own_files(partial, OWN, MOVE)
        if (folder / INFO).exists():
            _same(folder, read_info(folder, MOVE)["settings"], settings)
            if _complete(folder, settings["format"], shape, dtype):
                remove_own(partial, OWN, MOVE)  # of a run that was killed as it removed it
                return False
        if (partial / SETTINGS).exists():
            _resume(folder, settings, shape, dtype)
        else:
            _begin(folder, settings, shape, dtype)
    return True


def _complete(folder: Path, kind: str, shape: Sequence[int], dtype: str) -> bool:
    """Whether all files of a --format are there. UserError where the rows are damaged."""
    if not all((folder / name).is_file() for name in FILES[kind]):
        return False
    if kind == "npy":
        open_rows(folder / ROWS, shape, dtype, MOVE)
    return True


def _begin(folder: Path, settings: dict[str, Any], shape: tuple[int, ...], dtype: str) -> None:
    """Make the files of PARTIAL; SETTINGS last."""
    _check_names(folder, settings["format"])
    free = shutil.disk_usage(folder).free
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size > free:
        raise UserError(
            f"{folder}: {shape[0]} embeddings take {size >> 20} MiB where {free >> 20} MiB are "
            "free; choose another --output, --feature or --dtype float16"
        )
    partial = folder / PARTIAL
    remove_own(partial, OWN, MOVE)
    partial.mkdir()
    rows = np.lib.format.open_memmap(partial / ROWS, "w+", dtype=dtype, shape=shape)
    rows.flush()
    (partial / DONE).write_bytes(bytes(_batches(settings, shape)))
    write_json(partial / SETTINGS, settings)


def _resume(folder: Path, settings: dict[str, Any], shape: Sequence[int], dtype: str) -> None:
    """Check what a killed run left in PARTIAL."""
    partial = folder / PARTIAL
    advice = f"; remove {partial} to embed all images again"
    _same(partial, _read_json(partial / SETTINGS, OF_SETTINGS, advice), settings)
    states = (partial / DONE).read_bytes() if (partial / DONE).is_file() else b""
    if len(states) != _batches(settings, shape) or max(states) > DAMAGED:
        raise UserError(f"{partial / DONE}: is missing or damaged{advice}")
    if TODO in states:
        _check_names(folder, settings["format"])
    elif not (partial / ROWS).exists() and (folder / ROWS).exists():  # killed in `finish`
        os.replace(folder / ROWS, partial / ROWS)
    if not (partial / ROWS).exists():
        raise UserError(f"{partial / ROWS}: is missing{advice}")
    open_rows(partial / ROWS, shape, dtype, advice)
    write_json(partial / SETTINGS, settings)


def _batches(settings: dict[str, Any], shape: Sequence[int]) -> int:
    return int(-(-shape[0] // settings["micro_batch"]))


def _check_names(folder: Path, kind: str) -> None:
    """UserError where a file that no run wrote would be overwritten."""
    for name in FILES[kind]:
        if (folder / name).exists() and not (folder / INFO).exists():
            raise UserError(
                f"{folder / name}: is there without {INFO}, so no run of eval/embed.py finished "
                f"it{MOVE}"
            )


def open_rows(path: Path, shape: Sequence[int], dtype: str, advice: str) -> np.memmap:
    """The rows of a file, mapped. UserError where they are not [*shape] of dtype; OSError."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OverflowError, SyntaxError, TokenError) as error:
        raise UserError(f"{path}: is damaged ({reason(error)}){advice}") from error
    if (found := list(rows.shape)) != list(shape) or str(rows.dtype) != dtype:
        raise UserError(
            f"{path}: holds {rows.dtype} {found}, and not {dtype} {list(shape)}{advice}"
        )
    return rows


def read_info(folder: Path, advice: str) -> dict[str, Any]:
    """INFO of a folder. UserError where it is damaged, or of somebody else; OSError."""
    path = folder / INFO
    info = _read_json(path, OF_INFO, advice)
    _check_fields(path, info["settings"], OF_SETTINGS, advice)
    _check_fields(path, info["encoder"], OF_ENCODER, advice)
    return info


def _read_json(path: Path, fields: Mapping[str, Any], advice: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is damaged, or no file of eval/embed.py ({reason(error)}){advice}"
        ) from error
    _check_fields(path, found, fields, advice)
    return dict(found)


def _check_fields(path: Path, found: Any, fields: Mapping[str, Any], advice: str) -> None:
    known = found if isinstance(found, dict) else {}
    for name, kind in fields.items():
        if name not in known or not isinstance(known[name], kind):
            raise UserError(
                f"{path}: is damaged, or no file of eval/embed.py (it says no {name}){advice}"
            )


def _same(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    theirs = {key: ours.get(key) for key in LATER} | theirs
    if theirs["on_error"] == "fail":  # then no row is missing
        theirs = theirs | {"on_error": ours["on_error"]}
    changed = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
    if changed:
        raise UserError(
            f"{folder} holds embeddings with another {', '.join(changed)}; remove it or choose "
            "another --output"
        )


class Writer:
    """Writes rows of batches into a prepared folder; every rank has its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PARTIAL
        array = np.lib.format.open_memmap(self.folder / ROWS, mode="r")
        self.shape, self.dtype, self.start = array.shape, array.dtype, array.offset
        self.row_bytes = array.nbytes // len(array)
        # Not through the mapping: two hosts on one network file system would lose shared pages.
        self.rows = os.open(self.folder / ROWS, os.O_WRONLY | os.O_CLOEXEC)
        self.done = os.open(self.folder / DONE, os.O_RDWR | os.O_CLOEXEC)

    def hold(self) -> None:
        """Keep other runs off (the first rank, until the process ends)."""
        try:
            fcntl.lockf(self.done, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder.parent}: another run writes these embeddings; wait for it or choose "
                "another --output"
            ) from None
        except OSError:  # a file system without locks: nothing is held, nothing is lost
            pass

    def todo(self) -> list[int]:
        """Numbers of the batches that are not written yet."""
        states = os.pread(self.done, os.fstat(self.done).st_size, 0)
        return [number for number, state in enumerate(states) if state == TODO]

    def write(self, batch: int, first: int, rows: np.ndarray, damaged: bool) -> None:
        """Rows [b, …] of a batch, the first of which is row `first`; then note that it is done."""
        data = np.ascontiguousarray(rows, self.dtype).data.cast("B")
        offset = self.start + first * self.row_bytes
        while data:
            count = os.pwrite(self.rows, data, offset)
            data, offset = data[count:], offset + count
        os.fdatasync(self.rows)
        os.pwrite(self.done, bytes([DAMAGED if damaged else FINISHED]), batch)

    def close(self) -> None:
        """Close the files, which frees the folder."""
        os.close(self.rows)
        os.close(self.done)


def damaged_rows(folder: Path, batch_size: int) -> list[int]:
    """Rows of NaN of a folder that is still written, of this start and of those before it."""
    rows = np.load(folder / PARTIAL / ROWS, mmap_mode="r")
    states = (folder / PARTIAL / DONE).read_bytes()
    found = []
    for first in (n * batch_size for n, state in enumerate(states) if state == DAMAGED):
        piece = rows[first : first + batch_size]
        found += [first + n for n, row in enumerate(piece) if np.isnan(row.flat[0])]
    return found


def finish(
    folder: Path,
    names: Sequence[tuple[str, int, str]],
    info: dict[str, Any],
    parquet: ModuleType | None,
) -> Path:
    """All batches are there: give the files their names; INFO last. The file of the rows.

    names: key, label and path of each row. parquet: the module pyarrow, or None for .npy.
    """
    partial = folder / PARTIAL
    with naming(folder, "cannot be written"):
        if parquet is None:
            write_atomic(folder / NAMES, "".join(f"{k}\t{n}\t{p}\n" for k, n, p in names))
        else:
            _write_parquet(parquet, partial / TABLE, names, np.load(partial / ROWS, mmap_mode="r"))
        result = ROWS if parquet is None else TABLE
        fsync(partial / result)
        os.replace(partial / result, folder / result)
        write_json(folder / INFO, info, indent=1)
        remove_own(partial, OWN, MOVE)
    return folder / result


def _write_parquet(
    pyarrow: ModuleType, path: Path, names: Sequence[tuple[str, int, str]], rows: np.ndarray
) -> None:
    """A row group at a time, so that memory does not grow with the set."""
    parquet = importlib.import_module("pyarrow.parquet")
    width = int(np.prod(rows.shape[1:]))
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(rows.dtype), width)
    fields = [("key", pyarrow.string()), ("label", pyarrow.int64()), ("path", pyarrow.string())]
    schema = pyarrow.schema([*fields, ("embedding", kind)])
    step = max(1, (64 << 20) // (width * rows.dtype.itemsize))
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, len(rows), step):
            piece = np.array(rows[first : first + step]).reshape(-1)
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(piece), width)
            columns = [list(column) for column in zip(*names[first : first + step], strict=True)]
            writer.write_table(pyarrow.table([*columns, values.cast(kind)], schema=schema))


@dataclass(frozen=True)
class Embeddings:
    """What a folder holds: rows [N, …] (memory-mapped), their keys, labels and paths, INFO."""

    folder: Path
    rows: np.ndarray
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    paths: tuple[str, ...]
    info: dict[str, Any]


def read_embeddings(folder: str | Path) -> Embeddings:
    """Open a folder that eval/embed.py wrote. UserError where it is none, or not finished."""
    folder = Path(folder)
    if (folder / PARTIAL).is_dir():
        raise UserError(
            f"{folder}: not all embeddings are there; rerun eval/embed.py to finish them"
        )
    with naming(folder, "no embeddings there"):
        info = read_info(folder, AGAIN)
        if info["settings"]["format"] == "parquet":
            raise UserError(
                f"{folder}: no {ROWS}; write the embeddings with --format npy to search them"
            )
        rows = open_rows(folder / ROWS, info["shape"], info["settings"]["dtype"], AGAIN)
        names = _read_names(folder / NAMES)
    if not names or len(names) != len(rows):
        raise UserError(f"{folder / NAMES}: {len(names)} names for {len(rows)} embeddings{AGAIN}")
    keys, labels, paths = zip(*names, strict=True)
    return Embeddings(folder, rows, keys, labels, paths, info)


def _read_names(path: Path) -> list[tuple[str, int, str]]:
    """Key, label and path of each line. UserError for a line that has others; OSError."""
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text ({error}){AGAIN}") from error
    names = []
    for number, line in enumerate(lines, start=1):
        try:
            key, label, where = line.split("\t")
            names.append((key, int(label), where))
        except ValueError:
            raise UserError(
                f"{path}, line {number}: is not a key, label (a whole number) and path with tabs "
                f"between them{AGAIN}"
            ) from None
    return names

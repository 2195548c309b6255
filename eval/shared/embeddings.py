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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pipeline.errors import UserError, naming
from shard_tools.atomic import fsync, write_atomic, write_json

INFO, ROWS, TABLE, NAMES = (
    "embeddings.json", "embeddings.npy", "embeddings.parquet", "names.txt",
)  # fmt: skip
PARTIAL, DONE, SETTINGS = "partial", "done.bin", "settings.json"
TODO, FINISHED, DAMAGED = 0, 1, 2  # of a batch; the last: some of its images would not decode


def prepare(folder: Path, settings: dict[str, Any], shape: tuple[int, ...], dtype: str) -> bool:
    """Make the files that the ranks write to, or find those of a run that was killed.

    settings: what the rows depend on (JSON). False where all rows are there already. UserError
    where the folder holds embeddings with other settings, or the disk is too small.
    """
    settings = json.loads(json.dumps(settings))
    with naming(folder, "cannot be written"):
        (folder / PARTIAL).parent.mkdir(parents=True, exist_ok=True)
        for path in (folder / INFO, folder / PARTIAL / SETTINGS):
            if path.is_file():
                found = json.loads(path.read_text("utf-8"))
                _same(path.parent, found.get("settings", found), settings)
                if path.name == SETTINGS:
                    write_json(path, settings)
                return path.name == SETTINGS
        free = shutil.disk_usage(folder).free
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > free:
            raise UserError(
                f"{folder}: {shape[0]} embeddings take {size >> 20} MiB where {free >> 20} MiB are "
                "free; choose another --output, --feature or --dtype float16"
            )
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        (folder / PARTIAL).mkdir()
        rows = np.lib.format.open_memmap(folder / PARTIAL / ROWS, "w+", dtype=dtype, shape=shape)
        rows.flush()
        batches = -(-shape[0] // settings["micro_batch"])
        (folder / PARTIAL / DONE).write_bytes(bytes(batches))
        write_json(folder / PARTIAL / SETTINGS, settings)
    return True


def _same(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
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
        array = np.load(self.folder / ROWS, mmap_mode="r")
        assert isinstance(array, np.memmap)
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
            rows = np.load(partial / ROWS, mmap_mode="r")
            _write_parquet(parquet, partial / TABLE, names, rows)
        result = ROWS if parquet is None else TABLE
        fsync(partial / result)
        os.replace(partial / result, folder / result)
        write_json(folder / INFO, info, indent=1)
        shutil.rmtree(partial)
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
    place = Path(folder)
    if (place / PARTIAL).is_dir():
        raise UserError(
            f"{place}: not all embeddings are there; rerun eval/embed.py to finish them"
        )
    if (place / INFO).is_file() and not (place / ROWS).is_file():
        raise UserError(
            f"{place}: no {ROWS}; write the embeddings with --format npy to search them"
        )
    with naming(place, "no embeddings there"):
        info = json.loads((place / INFO).read_text("utf-8"))
        rows = np.load(place / ROWS, mmap_mode="r")
        lines = (place / NAMES).read_text("utf-8").split("\n")[:-1]
    columns = [line.split("\t") for line in lines]
    if len(columns) != len(rows) or any(len(c) != 3 for c in columns):
        raise UserError(f"{place / NAMES}: {len(columns)} names for {len(rows)} embeddings")
    keys, labels, paths = zip(*columns, strict=True)
    return Embeddings(place, rows, keys, tuple(map(int, labels)), paths, info)

"""The manifest of a folder of shards: what is where, with checksums.

A shard folder holds plain WebDataset tars and three or four small files:

    manifest.json   shards (name, samples, bytes, sha256), classes, how it was made; written last
    shards.bin      the shards, where there are more than 4096 (see shard_tools/shard_table.py)
    index.bin       one SAMPLE row per sample, in shard order: where its image bytes are, its label
                    (see shard_tools/index_file.py)
    names.bin       the original name of each sample (optional; zlib-compressed UTF-8 lines)

A subset, or tars that others wrote, is a folder that holds only these files; its manifest then says
where the tars are. Every reader goes through `read_manifest`, so subsets need no special case.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import posixpath
import re
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import reason
from shard_tools.atomic import write_together
from shard_tools.index_cache import local_copy
from shard_tools.index_file import (
    SAMPLE,
    Index,
    IndexHeader,
    ManifestError,
    check_rows,
    encode_index,
    index_checksum,
    parse_header,
    reading,
)
from shard_tools.remote import read_url
from shard_tools.shard_table import Shard, ShardTable
from shard_tools.texts import Texts

VERSIONS = (1, 2)  # 2 has its shards in shards.bin
MANIFEST, INDEX, NAMES, SHARDS = "manifest.json", "index.bin", "names.bin", "shards.bin"
SPLITS = ("train", "val")  # folders of shards that make_shards.py writes side by side

_FEW = 1000  # shards whose files one thread looks for; entries of a folder that are looked into
_QUICK = 50e-6  # seconds per file; a file system that takes longer is asked by many threads
_LISTED = 4096  # shards that manifest.json itself lists, at most

# A path of parts that are neither empty nor "..".
_SAFE = re.compile(r"(?!\.\.(/|\Z))[^/\0]+(/(?!\.\.(/|\Z))[^/\0]+)*")

# Image formats by the number stored in SAMPLE["format"].
FORMATS = ("jpeg", "png", "webp", "other")


@dataclass(frozen=True)
class Manifest:
    """Shards, classes and the lazily loaded index of one folder (or of a subset of it)."""

    folder: str  # where the tars are: a path or an fsspec URL
    shards: Sequence[Shard]
    classes: tuple[str, ...] = ()  # index → name (synset); empty where there are no labels
    made: dict[str, Any] = field(default_factory=dict)
    home: str = ""  # where manifest.json itself is; differs from `folder` for a subset
    index_sha256: str = ""
    names_sha256: str = ""  # empty where no names were recorded

    @property
    def samples(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def table(self) -> ShardTable:
        """The shards as a table; its `samples` and `bytes` are arrays."""
        return ShardTable.of(self.shards)

    @property
    def starts(self) -> np.ndarray:
        """Number of the first sample of each shard, then the total: int64 [shards + 1]."""
        return self.table.starts

    @cached_property
    def lazy_index(self) -> Index:
        """The index file, of which only what is asked for is read and checked."""
        where = join(self.home, INDEX)
        path = local_copy(where, self.index_sha256) if is_remote(self.home) else where
        sizes, classes = self.table.bytes, len(self.classes)
        return Index(where, path, self.index_sha256, self.starts, sizes, classes)

    @cached_property
    def index(self) -> np.ndarray:
        """SAMPLE rows [samples] in shard order (memory-mapped, read-only), all of them checked
        against the checksums and the sizes of the shards. Raises ManifestError where they do not
        hold. `rows` and `locate` check only what they return."""
        return self.lazy_index.whole()

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """SAMPLE rows of sample numbers from 0 to samples - 1; same shape."""
        if "index" in self.__dict__:
            return self.index[samples]
        return self.lazy_index.rows(samples)

    @cached_property
    def names(self) -> Texts:
        """Original name of each sample (as given to the sharding tool), in index order; empty
        where none were recorded."""
        if not self.names_sha256:
            return Texts()
        where = join(self.home, NAMES)
        data = read_bytes(where)
        if hashlib.sha256(data).hexdigest() != self.names_sha256:
            raise ManifestError(f"{where}: the checksum does not match the manifest")
        try:
            names = Texts.lines(zlib.decompress(data))
        except (zlib.error, UnicodeDecodeError) as error:
            raise ManifestError(f"{where}: holds no list of names ({error})") from error
        if len(names) != self.samples:
            raise ManifestError(f"{where}: {len(names)} names for {self.samples} samples")
        return names

    def __getstate__(self) -> dict[str, Any]:
        # To another process, which maps the index itself.
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def path(self, shard: int) -> str:
        """Path or URL of shard number `shard`."""
        return join(self.folder, self.shards[shard].name)

    def describe(self, sample: int) -> str:
        """Where a sample is, for messages."""
        shard = int(self.starts.searchsorted(sample, "right")) - 1
        return f"sample {sample} of {self.path(shard)}"

    def locate(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number (int64) and SAMPLE row of each sample number; same shape as `sample`."""
        sample = np.asarray(sample, np.int64)
        if sample.size and (sample.min() < 0 or sample.max() >= self.samples):
            raise ManifestError(
                f"{self.home}: sample numbers run from 0 to {self.samples - 1}, "
                f"not {sample.min()} to {sample.max()}"
            )
        return np.searchsorted(self.starts, sample, side="right") - 1, self.rows(sample)


def read_manifest(folder: str | Path, *, check_shards: bool = True) -> Manifest:
    """Open the manifest of `folder` (a path or any fsspec URL).

    Raises ManifestError: no manifest, unknown version, damaged manifest or index
    header; for tars on a local disk (unless `check_shards` is off) also a missing shard or one of
    the wrong size. The index itself is read and checked at its first use.
    """
    collects = gc.isenabled()
    gc.disable()  # of hundreds of thousands of shards none is garbage before the end
    try:
        return _read_manifest(os.fspath(folder), check_shards)
    finally:
        if collects:
            gc.enable()


def _read_manifest(home: str, check_shards: bool) -> Manifest:
    text = _read_manifest_text(home)
    where = join(home, MANIFEST)
    try:
        content = json.loads(text)
        version, checksum = content["version"], content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{where}: not a manifest of relaxmim shards ({error})") from error
    if version not in VERSIONS:
        raise ManifestError(f"{where}: version {version!r} is not known, this code reads 1 and 2")
    if checksum != _checksum(content):
        raise ManifestError(f"{where}: damaged, its checksum does not match its content")
    try:
        manifest = Manifest(
            folder=_resolve(home, content["folder"]),
            shards=_read_shards(home, content),
            classes=tuple(content["classes"]),
            made=content["made"],
            home=home,
            index_sha256=content["index_sha256"],
            names_sha256=content["names_sha256"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{where}: not a manifest of relaxmim shards ({error})") from error
    _check_types(where, manifest)
    manifest = replace(manifest, shards=manifest.table)
    _check_files(manifest, check_shards)
    return manifest


def _read_shards(home: str, content: dict[str, Any]) -> Sequence[Shard]:
    """The shards that manifest.json lists, or those of the file beside it."""
    if content["version"] == 1:
        return tuple(Shard(**shard) for shard in content["shards"])
    where = join(home, SHARDS)
    data = read_bytes(where)
    if hashlib.sha256(data).hexdigest() != content["shards_sha256"]:
        raise ManifestError(f"{where}: the checksum does not match the manifest")
    return ShardTable.decode(where, data)


def write_manifest(
    folder: str | Path,
    *,
    shards: Sequence[Shard],
    index: np.ndarray,
    classes: Sequence[str] = (),
    made: dict[str, Any] | None = None,
    names: Sequence[str] = (),
    shard_folder: str | Path | None = None,
) -> Manifest:
    """Write index.bin, names.bin and, last, manifest.json into the local `folder`; each one
    atomically. An older manifest is taken away first, so that no mixture is ever readable.

    index: SAMPLE rows in the order of `shards`; names: one per row, or none at all.
    shard_folder: where the tars are, if not in `folder` (stored relative to it when local).
    """
    folder = Path(folder)
    rows = np.ascontiguousarray(index, SAMPLE)
    if len(names) not in (0, len(rows)) or any("\n" in name for name in names):
        raise ManifestError(f"{folder}: names must be one line per sample, or none")
    names = names if isinstance(names, Texts) else Texts(names)
    blob = zlib.compress(names.joined(), 6) if names else b""
    location, encoded = _relative(folder, shard_folder), encode_index(rows)
    table = b"" if len(shards) <= _LISTED else ShardTable.of(shards).encode()
    content: dict[str, Any] = {
        "version": VERSIONS[bool(table)],
        "folder": location,
        "samples": len(rows),
        **_listing(shards, table),
        "classes": list(classes),
        "made": made or {},
        "index_sha256": index_checksum(encoded),
        "names_sha256": hashlib.sha256(blob).hexdigest() if names else "",
    }
    planned = Manifest(_resolve(str(folder), location), tuple(shards), tuple(classes))
    if len(rows) != planned.samples:
        raise ManifestError(f"{folder}: {len(rows)} rows for {planned.samples} samples")
    starts, sizes = planned.starts, planned.table.bytes
    check_rows(str(folder / INDEX), rows, 0, starts, sizes, len(classes))
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=1).encode() + b"\n"
    files = {INDEX: encoded, NAMES: blob, SHARDS: table, MANIFEST: text}
    write_together({folder / name: data for name, data in files.items() if data})
    for name, data in files.items():
        if not data:
            (folder / name).unlink(missing_ok=True)
    return read_manifest(folder)


def _listing(shards: Sequence[Shard], table: bytes) -> dict[str, Any]:
    """The shards in manifest.json, or the checksum of their table in shards.bin."""
    if table:
        return {"shards_sha256": hashlib.sha256(table).hexdigest()}
    return {"shards": [asdict(shard) for shard in shards]}


def is_remote(folder: str) -> bool:
    """True for an fsspec URL such as s3://bucket/folder."""
    return "://" in folder


def join(folder: str, name: str) -> str:
    """`folder`/`name` for a path or a URL."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def read_bytes(where: str) -> bytes:
    """The content of a path or URL; a ManifestError names what could not be read."""
    with reading(where):
        return read_url(where) if is_remote(where) else Path(where).read_bytes()


def _read_manifest_text(home: str) -> bytes:
    if not is_remote(home) and not os.path.isdir(home):
        beside = os.path.dirname(home) or "."
        if os.path.isfile(home) and os.path.isfile(os.path.join(beside, MANIFEST)):
            raise ManifestError(f"{home}: is a file; give the folder of the shards, {beside}")
        if home.endswith(".tar"):
            raise ManifestError(
                f"{home}: shards are given as their folder; where it has no {MANIFEST}, "
                "shard_tools/index_shards.py adopts its tars"
            )
        what = "is a file and no folder" if os.path.exists(home) else "no such folder"
        raise ManifestError(f"{home}: {what}; shards are made by `make shards`")
    if not is_remote(home) and not os.path.isfile(os.path.join(home, MANIFEST)):
        if inside := shards_below(home):
            raise ManifestError(
                f"{home}: holds folders of shards; give one of them, such as {inside}"
            )
        raise ManifestError(
            f"{home}: has no {MANIFEST}; make it with shard_tools/make_shards.py, "
            "or adopt existing tars with shard_tools/index_shards.py"
        )
    return read_bytes(join(home, MANIFEST))


def shards_below(folder: str | Path) -> str:
    """A folder of shards right below one that is none, the training set where it is called so; ""
    where there is none, or the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entry.name for entry in islice(entries, _FEW))
    except OSError:
        return ""
    for name in (*SPLITS, *found):
        if os.path.isfile(os.path.join(folder, name, MANIFEST)):
            return os.path.join(folder, name)
    return ""


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _relative(folder: Path, shard_folder: str | Path | None) -> str:
    if shard_folder is None:
        return "."
    if is_remote(str(shard_folder)):
        return str(shard_folder)
    return os.path.relpath(os.path.realpath(shard_folder), os.path.realpath(folder))


def _resolve(home: str, folder: str) -> str:
    if folder == "." or is_remote(folder):
        return home if folder == "." else folder
    if is_remote(home):
        scheme, _, rest = home.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, folder))}"
    return os.path.normpath(os.path.join(os.path.realpath(home), folder))


def _check_types(where: str, manifest: Manifest) -> None:
    """Every field has its type, and no number is negative."""
    texts = [manifest.index_sha256, manifest.names_sha256, *manifest.classes]
    if not isinstance(manifest.shards, ShardTable):  # whose fields have no other types
        for shard in manifest.shards:
            texts += [shard.name, shard.sha256]
            for number in (shard.samples, shard.bytes):
                if type(number) is not int or not 0 <= number < 2**63:
                    raise ManifestError(
                        f"{where}: {number!r:.80} is not a count of samples or bytes"
                    )
    if not isinstance(manifest.made, dict):
        raise ManifestError(f"{where}: how the shards were made is not recorded as an object")
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise ManifestError(f"{where}: a name, class or checksum is not a text")
    numbers = np.stack([manifest.table.samples, manifest.table.bytes])
    if (numbers < 0).any():
        raise ManifestError(f"{where}: {numbers.min()} is not a count of samples or bytes")
    if sum(manifest.table.samples.tolist()) >= 2**63:
        raise ManifestError(f"{where}: its shards cannot hold that many samples")


def _check_files(manifest: Manifest, check_shards: bool) -> None:
    """Names are safe and occur once, the index belongs to this manifest, local shards exist in
    their size."""
    names = manifest.table.names()
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ManifestError(f"{manifest.home}: lists the shard {twice!r} twice")
    for name in names:
        if not _SAFE.fullmatch(name):
            raise ManifestError(f"{manifest.home}: shard name {name!r} leaves its folder")
    if not is_remote(manifest.home):
        where = join(manifest.home, INDEX)
        if not os.path.isfile(where):
            raise ManifestError(f"{where}: is missing; make the index again")
        with reading(where), open(where, "rb") as file:
            start, size = file.read(IndexHeader.SIZE), os.path.getsize(where)
        head = parse_header(where, start, size)
        if head.rows != manifest.samples or head.checksum.hex() != manifest.index_sha256:
            raise ManifestError(f"{where}: belongs to another manifest than the one beside it")
    if check_shards and not is_remote(manifest.folder):
        listed = list(zip(names, manifest.table.bytes.tolist(), strict=True))
        begun = time.perf_counter()
        _check_shards(manifest.folder, listed[:_FEW])
        if time.perf_counter() - begun < _FEW * _QUICK:
            return _check_shards(manifest.folder, listed[_FEW:])
        # A network file system answers many at a time.
        with ThreadPoolExecutor(16) as threads:
            pieces = (listed[i : i + _FEW] for i in range(_FEW, len(listed), _FEW))
            list(threads.map(partial(_check_shards, manifest.folder), pieces))


def _check_shards(folder: str, listed: list[tuple[str, int]]) -> None:
    """Every (name, bytes) is there in its size."""
    for name, size in listed:
        try:
            found = os.stat(f"{folder}/{name}").st_size
        except FileNotFoundError:
            raise ManifestError(f"{join(folder, name)}: this shard is missing") from None
        except OSError as error:
            where = join(folder, name)
            raise ManifestError(f"{where}: cannot be read ({reason(error, where)})") from error
        if found != size:
            where = join(folder, name)
            raise ManifestError(f"{where}: {found} bytes long where the manifest says {size}")

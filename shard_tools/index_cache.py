"""The index of a remote shard folder, copied once to this node so that it can be memory-mapped."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from filelock import FileLock

from pipeline.errors import reason
from shard_tools.home import expand_home
from shard_tools.index_file import IndexHeader, ManifestError, parse_header, reading
from shard_tools.remote import fetch_url


def cache_folder() -> Path:
    """$RELAXMIM_CACHE, or a folder of this user under the system's temporary one."""
    given = expand_home(os.environ.get("RELAXMIM_CACHE", ""))
    return Path(given or Path(tempfile.gettempdir()) / f"relaxmim-cache-{os.getuid()}")


def local_copy(url: str, checksum: str) -> str:
    """Path of a copy of the index file at `url`, fetched unless there is one with this checksum
    (hex, from the manifest) for a name. Raises ManifestError; whoever maps the file checks it."""
    if not re.fullmatch("[0-9a-f]{64}", checksum):  # it becomes a file name
        raise ManifestError(f"{url}: its manifest has no valid checksum of it")
    folder = cache_folder()
    path = folder / f"{checksum}.index"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".index-lock")):
            if not path.exists():
                _fetch(url, path, checksum)
    except (OSError, NotImplementedError) as error:
        raise ManifestError(f"{path}: no copy of the index there ({reason(error)})") from error
    return str(path)


def _fetch(url: str, path: Path, checksum: str) -> None:
    partial = path.with_suffix(".index-part")
    try:
        with reading(url):
            fetch_url(url, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
            head = parse_header(url, file.read(IndexHeader.SIZE), os.path.getsize(partial))
        if head.checksum.hex() != checksum:
            raise ManifestError(f"{url}: belongs to another manifest than the one beside it")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

"""Remote shards (any fsspec URL) through a bounded cache on the node's disk.

A shard is copied whole under a temporary name, its sha256 compared with the manifest's, and then
renamed: a file with its final name is complete and right. Files are named by their checksum, so
all ranks, workers and runs of a node share one folder; a lock per shard lets one process fetch
while the others wait. When the bound would be passed, the shards unused for longest go first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import reason as why
from pipeline.errors import said_by_backend
from shard_tools.index_cache import cache_folder
from shard_tools.manifest import Manifest, ManifestError
from shard_tools.remote import PAUSE, TRIES, copy_file, pause_before
from shard_tools.tar import read_up_to

log = logging.getLogger(__name__)
GIB = 1 << 30
AT_ONCE = 2  # shards that a process fetches ahead, so that the store's latency costs little
_FULL = "the disk of the cache is full; make room, or set RELAXMIM_CACHE to a folder on another one"


class CacheError(ManifestError):
    """A remote shard that cannot be had, or a cache that cannot hold it."""


class ShardCache:
    """Local copies of a manifest's remote shards, at most `limit` bytes of them in `folder`, and no
    more than its disk has room for.

    The bound holds for the folder as a whole, over all processes that use it with this limit.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: str | Path | None = None,
        limit: int = 100 * GIB,
        pause: float = PAUSE,
    ) -> None:
        self.manifest, self.limit, self.pause = manifest, limit, pause
        self.folder = Path(folder or cache_folder())
        for shard in manifest.shards:
            if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it becomes a file name
                raise CacheError(f"{manifest.home}: {shard.name} has no valid sha256")
        largest = max(manifest.shards, key=lambda shard: shard.bytes)
        self._margin = largest.bytes // 64  # that the file system may need beside a file's bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"{self.folder}: no folder for the cache ({error.strerror})"
            ) from error
        try:
            with FileLock(self.folder / "cache.lock", timeout=0):
                pass
        except Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            raise CacheError(
                f"{self.folder}: no locks for the cache there ({why(error)}); set "
                "RELAXMIM_CACHE to a folder on a local disk"
            ) from error
        if largest.bytes > self.bound():
            raise CacheError(
                f"{self.folder}: a cache of {self.bound()} bytes cannot hold {largest.name} of "
                f"{largest.bytes} bytes; set RELAXMIM_CACHE to a folder on a larger disk"
            )
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_ahead": None}  # threads stay in their process

    def bound(self) -> int:
        """Bytes that the folder may hold: the limit, or what its disk has room for."""
        held = 0
        for path in self.folder.iterdir():
            if path.suffix in (".part", ".tar"):
                with contextlib.suppress(FileNotFoundError):
                    held += path.stat().st_size
        free = shutil.disk_usage(self.folder).free
        return min(self.limit, max(0, held + free - self._margin))

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset` of shard number `shard`, fetched first if need be."""
        while True:
            path = self.fetch(shard)
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # evicted by another process since fetch() returned
            try:  # not kept open: an evicted file would go on filling the disk
                return read_up_to(handle, offset, length)
            finally:
                os.close(handle)

    def fetch(self, shard: int) -> Path:
        """Path of the local copy of a shard. Raises CacheError."""
        path = self._path(shard)
        if _touch(path):
            return path
        with FileLock(path.with_suffix(".lock")):
            if not _touch(path):
                self._download(shard, path)
        return path

    def fetch_ahead(self, shard: int) -> None:
        """Start to fetch a shard that will be read soon; errors come when it is read."""
        if not self._path(shard).exists():
            if self._ahead is None:
                self._ahead = _Ahead(self._fetch_unless_taken)
            self._ahead.add(shard)

    def _fetch_unless_taken(self, shard: int) -> None:
        """Fetch a shard that no other process or thread is fetching."""
        path = self._path(shard)
        with contextlib.suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=0):
            if not path.exists():
                self._download(shard, path)

    def close(self) -> None:
        """Fetch nothing ahead any more; waits some seconds for a shard that is under way."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.manifest.shards[shard].sha256}.tar"

    def _download(self, number: int, path: Path) -> None:
        """Fetch a shard whose lock we hold, with retries."""
        shard, url = self.manifest.shards[number], self.manifest.path(number)
        # Its size is part of the temporary name: that much of the cache is taken from now on.
        partial = path.with_name(f"{path.stem}.{shard.bytes}.part")
        partial.unlink(missing_ok=True)  # left by a process that is gone
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                log.warning("%s: %s; trying again", url, reason)
                pause_before(attempt, self.pause)
            self._reserve(partial, shard.bytes)
            try:
                copy_file(url, partial)
                reason = _fault(partial, shard.bytes, shard.sha256)
                if not reason:
                    os.replace(partial, path)
                    return
            except (FileNotFoundError, PermissionError) as error:
                raise CacheError(f"{url}: cannot be fetched ({why(error, url)})") from error
            except Exception as error:
                if not said_by_backend(error):
                    raise
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise CacheError(f"{self.folder}: {_FULL}") from error
                reason = why(error, url)
            finally:
                partial.unlink(missing_ok=True)
        raise CacheError(f"{url}: cannot be fetched, {TRIES} tries failed, the last one: {reason}")

    def _reserve(self, partial: Path, size: int) -> None:
        """Create `partial` once `size` bytes fit under the bound; evict shards to make them fit."""
        while True:
            with FileLock(self.folder / "cache.lock"):
                if self._make_room(size):
                    partial.touch()
                    return
            time.sleep(0.05)  # all of the bound is being fetched by others; soon it is evictable

    def _make_room(self, size: int) -> bool:
        total, there = size, set()
        for path in self.folder.iterdir():
            if path.suffix == ".part" and not _abandoned(path):
                total += int(path.suffixes[0][1:])
            elif path.suffix in (".part", ".tar"):  # a part that is gone may be complete by now
                there.add(self.folder / f"{path.name.partition('.')[0]}.tar")
        complete = []
        for path in there:
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                complete.append((stat.st_mtime_ns, stat.st_size, path))
        total += sum(length for _, length, _ in complete)
        bound = self.bound()
        for _, length, path in sorted(complete):
            if total <= bound:
                break
            path.unlink(missing_ok=True)
            total -= length
        if total == size > bound:  # there is nothing to wait for
            raise CacheError(f"{self.folder}: {_FULL}")
        return total <= bound


class _Ahead:
    """Threads that fetch shards before they are needed; they end with their process."""

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self.fetch, self.known, self.closed = fetch, set[int](), False
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(AT_ONCE)]
        for thread in self.threads:
            thread.start()

    def add(self, shard: int) -> None:
        if shard not in self.known:
            self.known.add(shard)
            self.queue.put(shard)

    def close(self) -> None:
        self.closed = True
        for _ in self.threads:
            self.queue.put(None)
        for thread in self.threads:
            thread.join(5)

    def _run(self) -> None:
        while (shard := self.queue.get()) is not None and not self.closed:
            try:
                self.fetch(shard)
            except CacheError as error:
                log.warning("%s", error)
            self.known.discard(shard)


def _touch(path: Path) -> bool:
    """Note that `path` was used; False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _abandoned(partial: Path) -> bool:
    """Remove a temporary file whose process is gone (nobody holds its lock)."""
    name = partial.name.partition(".")[0]
    try:
        with FileLock(partial.with_name(f"{name}.lock"), timeout=0):
            partial.unlink(missing_ok=True)
        return True
    except Timeout:
        return False


def _fault(path: Path, size: int, sha256: str) -> str:
    """What is wrong with a file that has just arrived; empty if nothing. It is on disk then."""
    with open(path, "rb") as file:
        arrived = os.fstat(file.fileno()).st_size
        if arrived != size:
            return f"{arrived} of {size} bytes arrived"
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return "its sha256 is not the manifest's"
        os.fsync(file.fileno())
    return ""

"""The images of a folder: an ImageFolder tree, or everything below it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from shard_tools.cli import ToolError
from shard_tools.sharding.found import (
    LONGEST_IMAGE,
    Found,
    Image,
    is_image,
    is_system_folder,
    too_long,
)

_THREADS = 8  # that list; a network file system answers many at a time
_AHEAD = 16  # folders of one folder that are listed before they are needed


def list_folder(top: Path, skip: bool) -> Found:
    """All images below `top`, named by their path in it. Links are followed; hidden and system
    folders are left out and reported. UserError for a loop of links or a link to nothing, which
    `skip` reports in `Found.missing` instead. Threads look into the folders that come next."""
    found = Found()
    with ThreadPoolExecutor(_THREADS) as threads:
        try:
            _walk(top, "", threads.submit(_scan, str(top)), (), found, skip, threads)
        finally:
            threads.shutdown(cancel_futures=True)
    return found


def class_folders(top: Path) -> list[str]:
    """Names of the folders right below `top` that can be classes, sorted."""
    with os.scandir(top) as entries:
        return sorted(entry.name for entry in entries if _kind(entry) == "folder")


def files_in(top: Path, wanted: Callable[[str], bool] = bool) -> list[str]:
    """Names of the regular files right below `top` that are `wanted`, sorted."""
    with os.scandir(top) as entries:
        return sorted(e.name for e in entries if wanted(e.name) and _kind(e) == "file")


def walk_once(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` with links followed, each folder once. OSError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(top, followlinks=True, onerror=fail):
        about = os.stat(here)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        yield here, folders, files


class _Scan(NamedTuple):
    """A folder: its device and inode, and (name, kind, bytes of a file) of what is in it."""

    identity: tuple[int, int]
    entries: list[tuple[str, str, int]]


def _scan(folder: str) -> _Scan:
    about = os.stat(folder)
    listed = []
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = _kind(entry)
            size = entry.stat().st_size if kind == "file" and is_image(entry.name) else 0
            listed.append((entry.name, kind, size))
    return _Scan((about.st_dev, about.st_ino), sorted(listed))


def _walk(
    top: Path, folder: str, scanned: Future[_Scan], above: tuple[tuple[int, int], ...],
    found: Found, skip: bool, threads: ThreadPoolExecutor,
) -> None:  # fmt: skip
    """above: (device, inode) of the folders on the way from `top` to here, against loops."""
    scan = scanned.result()
    if scan.identity in above:
        with found.catching(folder, skip):
            raise ToolError(f"{top / folder}: a loop, this folder is a link to one that holds it")
        return
    inside = f"{folder}/" if folder else ""
    folders = [name for name, kind, _ in scan.entries if kind == "folder"]
    ahead = deque(threads.submit(_scan, f"{top}/{inside}{name}") for name in folders[:_AHEAD])
    following = iter(folders[_AHEAD:])
    for base, kind, size in scan.entries:
        name = inside + base
        if kind == "folder":
            this = ahead.popleft()
            ahead.extend(threads.submit(_scan, f"{top}/{inside}{n}") for n in islice(following, 1))
            _walk(top, name, this, (*above, scan.identity), found, skip, threads)
        elif kind == "system folder":
            found.ignored.append((name, "a hidden or system folder"))
        elif not is_image(base):
            found.ignored.append((name, "not an image by its name"))
        elif kind == "file" and size <= LONGEST_IMAGE:
            found.images.append(Image(name, name, 0, size))
        elif kind == "file":
            with found.catching(name, skip):
                raise too_long(top / name, size)
        else:
            with found.catching(name, skip):
                raise ToolError(f"{top / name}: is {kind}")


def _kind(entry: os.DirEntry[str]) -> str:
    """file, folder, system folder, or why it is none of them. Nothing is opened."""
    try:
        if entry.is_dir():
            return "system folder" if is_system_folder(entry.name) else "folder"
        if entry.is_file():
            return "file"
        if entry.is_symlink() and not os.path.exists(entry.path):
            return "a link to nothing"
        return "a FIFO, device or socket"
    except OSError as error:  # such as a link to itself
        return f"unreadable ({error.strerror})"

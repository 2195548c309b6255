"""The images of a folder: an ImageFolder tree, or everything below it."""

from __future__ import annotations

import os
from pathlib import Path

from shard_tools.cli import ToolError
from shard_tools.sharding.found import Found, Image, is_image, is_system_folder


def list_folder(top: Path, skip: bool) -> Found:
    """All images below `top`, named by their path in it. Links are followed; hidden and system
    folders are left out and reported. UserError for a loop of links or a link to nothing, which
    `skip` reports in `Found.missing` instead."""
    found = Found()
    _walk(top, "", (), found, skip)
    return found


def class_folders(top: Path) -> list[str]:
    """Names of the folders right below `top` that can be classes, sorted."""
    return sorted(e.name for e in _entries(top) if _kind(e) == "folder")


def files_in(top: Path) -> list[str]:
    """Names of the regular files right below `top`, sorted."""
    return sorted(e.name for e in _entries(top) if _kind(e) == "file")


def _walk(
    top: Path, folder: str, above: tuple[tuple[int, int], ...], found: Found, skip: bool
) -> None:
    """above: (device, inode) of the folders on the way from `top` to here, against loops."""
    here = top / folder
    about = os.stat(here)
    if (about.st_dev, about.st_ino) in above:
        with found.catching(folder, skip):
            raise ToolError(f"{here}: a loop, this folder is a link to one that holds it")
        return
    for entry in sorted(_entries(here), key=lambda entry: entry.name):
        name = f"{folder}/{entry.name}" if folder else entry.name
        kind = _kind(entry)
        if kind == "folder":
            _walk(top, name, (*above, (about.st_dev, about.st_ino)), found, skip)
        elif kind == "system folder":
            found.ignored.append((name, "a hidden or system folder"))
        elif not is_image(entry.name):
            found.ignored.append((name, "not an image by its name"))
        elif kind == "file":
            found.images.append(Image(name, name, 0, entry.stat().st_size))
        else:
            with found.catching(name, skip):
                raise ToolError(f"{top / name}: is {kind}")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


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

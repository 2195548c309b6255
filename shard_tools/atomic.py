"""Atomic writes: a file or folder appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, is_url

FILES = "files.json"
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` under a temporary name, fsync, rename, fsync the folder; makes its parents."""
    write_together({path: data})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """`write_atomic` of several files, of which none is renamed, in their order, before all are on
    the disk: where that is full, those that they replace stay."""
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial[path], "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(partial[path], path)
    finally:
        for left in partial.values():
            left.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        fsync(folder)


def fsync(path: Path) -> None:
    """Bring a file to the disk; of a folder its names, so that a rename survives a power cut.

    Some network and FUSE file systems cannot sync a folder and say so; there a rename is as
    durable as that system makes it. An OSError of a file is always raised, with its name.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file atomically. ValueError for NaN and infinity, which JSON does not have."""
    write_atomic(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def seal(temporary: Path, final: Path) -> None:
    """List the files of a temporary folder with their sha256, fsync all, and give it its name.

    All may be read by whom the umask lets read: safetensors makes files of their owner alone.
    """
    paths = sorted(p for p in temporary.rglob("*") if p.is_file())
    files = {str(p.relative_to(temporary)): [p.stat().st_size, file_sha256(p)] for p in paths}
    (temporary / FILES).write_text(json.dumps(files, indent=2) + "\n")
    mode = (temporary / FILES).stat().st_mode
    for path in paths:
        with contextlib.suppress(OSError):  # a file system that has no modes
            path.chmod(mode)
    for path in (*paths, temporary / FILES, temporary):
        fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    fsync(final.parent)


def own_files(folder: Path, names: Collection[str], advice: str = "") -> list[Path]:
    """What is in a folder. UserError where that is anything but files of these names, whole or half
    written by `write_atomic`."""
    found = sorted(folder.iterdir())
    for path in found:
        name = re.sub(r"\A\.(.+)\.\d+\.tmp\Z", r"\1", path.name)
        if name not in names or path.is_dir():
            raise UserError(f"{path}: relaxmim writes no such file there{advice}")
    return found


def remove_own(folder: Path, names: Collection[str], advice: str = "") -> None:
    """Remove a folder of `own_files`, if there is one. UserError where it holds anything else; then
    nothing is removed."""
    if folder.exists():
        for path in own_files(folder, names, advice):
            path.unlink()
        folder.rmdir()


def verify(folder: Path, content: Collection[str] | None = None) -> None:
    """Compare every file of a sealed folder with its list. UserError names the first bad one.

    content: names of the files whose sha256 is computed (None: all); of the others the size counts.
    """
    try:
        listed = json.loads((folder / FILES).read_text())
        files = {name: (size, digest) for name, (size, digest) in listed.items()}
        if not files:
            raise ValueError("it lists nothing")
    except (OSError, ValueError, TypeError, AttributeError) as error:  # no JSON, text or list
        raise UserError(f"{folder}: {FILES} cannot be read ({error})") from None
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path}: missing or of the wrong size")
        if (content is None or name in content) and file_sha256(path) != digest:
            raise UserError(f"{path}: damaged (its sha256 is not that of {FILES})")


def check_writable(
    path: Path, folder: bool = False, what: str = "cannot be written", advice: str = ""
) -> None:
    """UserError `path: what (reason)advice` where a file, or files in a folder, could not be
    written. Nothing is left there."""
    if is_url(path):
        raise UserError(f"{path}: {what} (it is a URL; only local files are written){advice}")
    there = path
    try:
        if path.exists() and path.is_dir() != folder:
            code = errno.ENOTDIR if folder else errno.EISDIR
            raise OSError(code, os.strerror(code))
        there = path if folder else path.parent
        while not there.exists():
            if there.is_symlink() and (folder or there != path):  # a file takes the link's place
                raise OSError(errno.ENOENT, "a link to nothing")
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        where = f"{there}: " if there != path else ""
        reason = f"{where}{error.strerror}"
        raise UserError(f"{path}: {what} ({reason}){advice}") from None


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

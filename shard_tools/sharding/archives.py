"""The images inside tars: class folders, a tar of one tar per class, or a flat tar.

Nothing is extracted to a path that an archive names: an image inside a tar is a byte range of that
tar. A compressed archive has no byte ranges; it is unpacked once, as a stream, into one plain tar.
"""

from __future__ import annotations

import bz2
import fcntl
import glob
import gzip
import hashlib
import lzma
import os
import posixpath
import shutil
import socket
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import naming
from shard_tools.cli import ToolError, progress
from shard_tools.members import Member, TarError, read_members, resolve_links
from shard_tools.sharding.found import (
    LONGEST_IMAGE,
    Found,
    Image,
    Unskippable,
    is_image,
    is_system_file,
    too_long,
)
from shard_tools.sharding.zip_files import copy_zip, read_zip, zip_names
from shard_tools.tar import read_up_to

UNPACKED = "unpacked"  # folder for plain tars of compressed archives, inside PARTS
_TARS = (
    *(".tar", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz"),
    *(".tgz", ".tzst", ".tbz2", ".tbz", ".txz"),
)
_ARCHIVES = (*_TARS, ".zip")
_PIECE = 16 << 20  # bytes unpacked at a time
_ARCHIVES_INSIDE = (*_ARCHIVES, ".7z", ".rar")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
}
_OPEN: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}


def is_archive(name: str) -> bool:
    """True for a file name that tars and zips have."""
    return name.lower().endswith(_ARCHIVES)


def is_archive_file(path: Path) -> bool:
    """True for a tar or zip by its name or its content: downloads are named anyhow."""
    return path.is_file() and bool(
        is_archive(path.name) or compression(path) or tarfile.is_tarfile(path)
    )


def is_tar(name: str) -> bool:
    """True for a file name that tars have, also compressed ones."""
    return name.lower().endswith(_TARS)


def archive_stem(name: str) -> str:
    """File name without folder and archive suffix: the class of a tar of one."""
    base = posixpath.basename(name)
    suffix = next(s for s in sorted(_ARCHIVES, key=len, reverse=True) if base.lower().endswith(s))
    return base[: -len(suffix)]


def list_archive(path: Path, unpacked: Path | None, skip: bool) -> Found:
    """The images of one tar or zip. Image names: `class/file` for a tar of class tars, else the
    name in the archive without the folders that all of it is in.

    unpacked: folder for the plain tar of a compressed archive, None = none may be made. skip: what
    is damaged is reported in `Found.missing` instead of raised (TarError).
    """
    found, plain = Found(), None
    with found.catching(path.name, skip):
        plain = plain_tar(path, unpacked, skip)
    if plain is None:
        return found
    path = plain
    outer = _list(path, path.name, 0, None, found, skip)
    classes = [member for member in outer if is_tar(member.name)]
    loose = [member for member in outer if is_image(member.name)]
    if classes and loose:
        raise ToolError(f"{path}: holds class tars and also loose images, such as {loose[0].name}")
    _report_others(outer, found, but=classes)
    if not classes:
        _take_images(path, loose, found, skip)
        return found.without_wrapping()
    for member in classes:
        if not member.name.lower().endswith(".tar"):
            raise ToolError(f"{path}: {member.name} is compressed inside the archive; unpack it")
        found.extend(_class_tar(path, member, skip))
    return found


def member_names(path: Path, unpacked: Path | None) -> list[str]:
    """The names of what is in a tar or a zip, up to where it is damaged, which is said when it is
    listed. unpacked: as for `list_archive`. TarError for a compressed tar that cannot be unpacked,
    which would take as long once more."""
    names: list[str] = []
    zipped = compression(path) == "zip"
    plain = path if zipped else plain_tar(path, unpacked)
    with suppress(TarError):
        if zipped:
            return zip_names(path)
        for member in read_members(plain):
            names.append(member.name)
    return names


def read_member(path: Path, unpacked: Path | None, name: str) -> bytes:
    """The content of a small member of a tar or a zip."""
    if compression(path) == "zip":
        return read_zip(path, name)
    plain = plain_tar(path, unpacked)
    found = next(member for member in read_members(plain) if member.name == name)
    with open(plain, "rb") as file:
        return read_up_to(file.fileno(), found.offset, found.size)


def list_class_tars(paths: Iterable[Path], unpacked: Path | None, skip: bool) -> Found:
    """The images of a folder of class tars, named `class/file`."""
    found = Found()
    for path in paths:
        inner, name = list_archive(path, unpacked, skip), archive_stem(path.name)
        if all(image.startswith(f"{name}/") for image in inner.images.names):
            inner = inner.without_wrapping(keep_class=False)  # of `tar -cf CLASS.tar CLASS`
        if any("/" in image for image in inner.images.names):
            raise ToolError(f"{path}: is not the tar of one class: it holds folders")
        found.extend(inner.inside(name))
    return found


def _class_tar(path: Path, outer: Member, skip: bool) -> Found:
    """The images of one tar inside another."""
    found = Found()
    name = archive_stem(outer.name)
    members = _list(path, outer.name, outer.offset, outer.size, found, skip)
    _report_others(members, found)
    _take_images(path, [member for member in members if is_image(member.name)], found, skip)
    return found.without_wrapping(keep_class=False).inside(name)


def _list(
    path: Path, name: str, start: int, size: int | None, found: Found, skip: bool
) -> list[Member]:
    """The readable members of the tar in bytes [start, start + size) of `path`."""
    members: list[Member] = []
    with found.catching(name, skip):
        try:
            for member in read_members(path, start, size):
                members.append(member)
        except TarError as error:
            inside = f" in {name}" if start else ""
            raise TarError(f"{error}{inside}; what follows is missing") from error
    ranges, lost = resolve_links(members)
    for member in lost:
        if is_image(member.name):
            with found.catching(member.name, skip):
                raise TarError(f"{path}: member {member.name!r} {member.problem}")
        else:
            found.ignored.append((member.name, member.problem))
    return ranges


def _report_others(members: list[Member], found: Found, but: Sequence[Member] = ()) -> None:
    """List what is no image; `but` are class tars."""
    class_tars = set(but)
    for member in members:
        if is_image(member.name) or member in class_tars:
            continue
        if member.name.lower().endswith(_ARCHIVES_INSIDE) and not is_system_file(member.name):
            raise ToolError(f"{member.name}: is an archive inside an archive; unpack it")
        found.ignored.append((member.name, "not an image by its name"))


def _take_images(path: Path, members: list[Member], found: Found, skip: bool) -> None:
    file = os.path.abspath(path)
    for m in _latest(members, found):
        if m.size <= LONGEST_IMAGE:
            found.images.append(Image(m.name, file, m.offset, m.size))
        else:
            with found.catching(m.name, skip):
                raise too_long(f"{path}: member {m.name!r}", m.size)


def _latest(members: list[Member], found: Found) -> list[Member]:
    """Of members of one name the last, which is what extracting would leave."""
    last = {posixpath.normpath(member.name): member for member in members}
    for member in members:
        if last[posixpath.normpath(member.name)] is not member:
            found.ignored.append((member.name, "a later member of the archive has the same name"))
    return list(last.values())


def compression(path: Path) -> str:
    """gzip, zstd, bzip2, xz or zip by the first bytes of a file, else ""; zip also where it is
    called so and is no tar: a zip may begin with a program, and of another file it is said that it
    is none."""
    with naming(path, "cannot be read"), open(path, "rb") as file:
        head = file.read(6)
        kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
        if not kind and path.name.lower().endswith(".zip") and not tarfile.is_tarfile(path):
            return "zip"
    return kind


def is_compressed(path: Path) -> bool:
    """Whether this is a file that has to be unpacked before its members are known."""
    return path.is_file() and compression(path) not in ("", "zip")


def plain_tar(path: Path, unpacked: Path | None, skip: bool = False) -> Path:
    """`path`, or where it is compressed (gzip, zstd, bzip2, xz) or a zip a plain tar of its content
    in the folder `unpacked`, made at first use (None: a ToolError asks to unpack it). skip: damaged
    images of a zip are empty in it.

    TarError where the stream is damaged or cut, Unskippable where it cannot be unpacked here.
    """
    kind = compression(path)
    if not kind:
        return path
    zipped = kind == "zip"

    def unpack(out: BinaryIO) -> None:
        what = "zip" if zipped else f"{kind}-compressed"
        print(f"{path}: {what}; unpacking it into {unpacked}", flush=True)
        if zipped:
            copy_zip(path, out, skip)
            return
        with progress(None, f"unpacking {path.name}", unit="B", delay=5) as shown:
            for piece in _pieces(path, kind):
                out.write(piece)
                shown.update(len(piece))

    return unpacked_tar(path, unpacked, "a zip" if zipped else "compressed", unpack)


def unpacked_tar(
    path: Path, unpacked: Path | None, what: str, unpack: Callable[[BinaryIO], None], part: str = ""
) -> Path:
    """The plain tar of the content of `path`, or of a `part` of it, in the folder `unpacked`, where
    `unpack` writes it at first use. None: a ToolError says that the file is `what` ("compressed").

    Unskippable where it cannot be written; errors of `unpack` that are no OSError go through.
    """
    with naming(path, "cannot be read"):
        about = path.stat()
    if unpacked is None:
        raise Unskippable(
            f"{path}: is {what} and must be unpacked first; shard_tools/make_shards.py, without "
            "--num-tasks, makes shards of it"
        )
    mark = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}{part}"
    target = unpacked / f"{path.name}-{hashlib.sha256(os.fsencode(mark)).hexdigest()[:16]}.tar"
    if target.is_file():
        return target
    partial = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        unpacked.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        try:
            with open(partial, "wb") as out:
                _lock(out)
                unpack(out)
                out.flush()
                os.fsync(out.fileno())  # or a power cut could leave zeros under its final name
            os.utime(partial, ns=(about.st_atime_ns, about.st_mtime_ns))  # see file_times
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise Unskippable(f"{target}: cannot be written ({error.strerror})") from error
    return target


def _remove_abandoned(target: Path) -> None:
    """Take away what processes that were killed had written of `target`; those alive hold a lock.
    Where the file system has no locks it stays until the job is done."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with suppress(FileNotFoundError), open(partial, "r+b") as left:
            if _lock(left):
                partial.unlink()


def _lock(file: BinaryIO) -> bool:
    """Whether this process has a lock on an open file now."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _pieces(path: Path, kind: str) -> Iterator[bytes]:
    """The content of a compressed file; no error of whoever takes it passes through here."""
    with _decompressed(path, kind) as stream:
        while piece := stream.read(_PIECE):
            yield piece


@contextmanager
def _decompressed(path: Path, kind: str) -> Iterator[Any]:
    """The content of a compressed file as a stream. TarError where it is damaged or cut."""
    try:
        if kind == "zstd":
            with _zstd(path) as stream:
                yield stream
        else:
            with _OPEN[kind](path) as stream:
                yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError) as error:
        raise TarError(f"{path}: damaged or cut {kind} stream ({error})") from error
    except OSError as error:
        if error.errno is None:  # bz2 says "Invalid data stream" in this way
            raise TarError(f"{path}: damaged {kind} stream ({error})") from error
        raise TarError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def _zstd(path: Path) -> Iterator[Any]:
    """Through Python's own module (3.14), or the program zstd."""
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        program = shutil.which("zstd")
        if program is None:
            raise Unskippable(f"{path}: is zstd-compressed; install zstd, or unpack it") from None
    else:
        with zstd.open(path) as stream:
            yield stream
        return
    with subprocess.Popen(
        [program, "--decompress", "--stdout", "--quiet", "--", str(path.absolute())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as process:
        assert process.stdout
        assert process.stderr
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        message = process.stderr.read().decode(errors="replace").strip().split("\n")[-1]
        if process.wait():
            raise TarError(f"{path}: damaged or cut zstd stream ({message})")

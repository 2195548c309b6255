"""The content of a zip as a plain tar, in which each image is a range of bytes."""

from __future__ import annotations

import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shard_tools.cli import progress
from shard_tools.members import TarError
from shard_tools.sharding.found import LONGEST_IMAGE, Unskippable, is_image, too_long

_LONGEST_LINK = 4096  # bytes of a path, on Linux
_UTF8 = 0x800  # flag of a member whose name is UTF-8
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, OSError)


def copy_zip(path: Path, out: BinaryIO, skip: bool) -> None:
    """Write the files of a zip as a tar, in its order and with its names. Of a file that is neither
    an image nor a link only the name is kept, since it is not read. skip: an image that is damaged
    is printed and becomes an empty member, which no image can be.

    TarError where the zip is damaged, Unskippable where a member is encrypted or compressed in a
    way that Python does not read.
    """
    with _open(path) as archive, tarfile.open(fileobj=out, mode="w|") as tar:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        with progress(len(infos), f"unpacking {path.name}", unit=" files", delay=5) as shown:
            for info in infos:
                _copy(path, archive, info, tar, skip)
                shown.update()


def zip_names(path: Path) -> list[str]:
    """The names of the files in a zip. TarError where it is damaged."""
    with _open(path) as archive:
        return [_name(info) for info in archive.infolist() if not info.is_dir()]


def read_zip(path: Path, name: str) -> bytes:
    """The content of the file `name`. TarError where it is damaged."""
    with _open(path) as archive:
        info = next(info for info in archive.infolist() if _name(info) == name)
        return _read(path, archive, info, LONGEST_IMAGE)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise TarError(f"{path}: damaged or cut zip ({error})") from error


def _name(info: zipfile.ZipInfo) -> str:
    """The name of a member. `zip` on Linux and macOS write UTF-8 without the flag that says so, and
    Python reads it as cp437."""
    name = info.filename
    if not info.flag_bits & _UTF8:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")  # as some programs of Windows write it


def _copy(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, tar: tarfile.TarFile, skip: bool
) -> None:
    name = _name(info)
    member = tarfile.TarInfo(name)
    content = b""
    if stat.S_ISLNK(info.external_attr >> 16):
        member.type = tarfile.SYMTYPE
        member.linkname = _read(path, archive, info, _LONGEST_LINK).decode(errors="replace")
    elif is_image(name):
        try:
            content = _read(path, archive, info, LONGEST_IMAGE)
        except TarError as error:
            if not skip:
                raise
            print(error, flush=True)
    elif name.lower().endswith(".tar"):
        raise Unskippable(f"{path}: holds the tar {name}; unpack the zip and give the folder")
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _read(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    """The content of a member, whose checksum is right."""
    name = _name(info)
    if info.flag_bits & 1:
        raise Unskippable(f"{path}: {name} is encrypted; unpack it with its password")
    if info.file_size > most:
        raise TarError(str(too_long(f"{path}: member {name!r}", info.file_size)))
    try:
        with archive.open(info) as file:
            content = file.read(info.file_size)  # no more is inflated, whatever is there
    except NotImplementedError as error:  # such as deflate64, which Windows uses beyond 2 GB
        raise Unskippable(
            f"{path}: {name} is packed in a way that Python does not read ({error}); "
            "unpack the zip and give the folder"
        ) from error
    except _DAMAGE as error:
        raise TarError(f"{path}: member {name!r} is damaged ({error})") from error
    if len(content) != info.file_size:
        raise TarError(
            f"{path}: member {name!r} is damaged ({len(content)} bytes, not the "
            f"{info.file_size} of its header)"
        )
    return content

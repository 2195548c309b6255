"""The content of a zip as a plain tar, in which each image is a range of bytes."""

from __future__ import annotations

import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shard_tools.cli import counted, progress
from shard_tools.members import TarError
from shard_tools.sharding.found import LONGEST_IMAGE, Unskippable, is_image, too_long

_LONGEST_LINK = 4096  # bytes of a path, on Linux
_UTF8 = 0x800  # flag of a member whose name is UTF-8
_UNICODE_PATH = 0x7075  # extra field: version 1, CRC-32 of the name in the header, name in UTF-8
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, OSError)


def copy_zip(path: Path, out: BinaryIO, skip: bool) -> None:
    """Write the files of a zip as a tar, in its order and with its names. Of a file that is neither
    an image nor a link only the name is kept, since it is not read. skip: an image that is damaged
    is printed and becomes an empty member, which no image can be.

    TarError where the zip is damaged, Unskippable where a member is encrypted or compressed in a
    way that Python does not read.
    """
    with _open(path) as archive, tarfile.open(fileobj=out, mode="w|") as tar:
        infos, names = _files(archive)
        _say_cp437(path, infos, names)
        with progress(len(infos), f"unpacking {path.name}", unit=" files", delay=5) as shown:
            for info, name in zip(infos, names, strict=True):
                _copy(path, archive, info, name, tar, skip)
                shown.update()


def zip_names(path: Path) -> list[str]:
    """The names of the files in a zip. TarError where it is damaged."""
    with _open(path) as archive:
        return _files(archive)[1]


def read_zip(path: Path, name: str) -> bytes:
    """The content of the file `name`. TarError where it is damaged."""
    with _open(path) as archive:
        infos, names = _files(archive)
        return _read(path, archive, infos[names.index(name)], name, LONGEST_IMAGE)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise TarError(f"{path}: damaged or cut zip ({error})") from error


def _files(archive: zipfile.ZipFile) -> tuple[list[zipfile.ZipInfo], list[str]]:
    """The files of a zip and their names.

    `zip` on Linux and macOS write UTF-8 without the flag that says so. A name in another encoding
    can be UTF-8 by chance (GBK's for cat is), so that is what they are where all names are.
    """
    infos = [info for info in archive.infolist() if not info.is_dir()]
    raw = [info.orig_filename.split("\0")[0] for info in infos]  # read as UTF-8 or cp437
    told = [_told_name(info) for info in infos]
    untold = [number for number, name in enumerate(told) if name is None]
    names = [name or before for name, before in zip(told, raw, strict=True)]
    with suppress(UnicodeError):
        decoded = [raw[number].encode("cp437").decode() for number in untold]
        for number, name in zip(untold, decoded, strict=True):
            names[number] = name
    return infos, [_slashes(name) for name in names]


def _told_name(info: zipfile.ZipInfo) -> str | None:
    """The name of a member whose encoding is known: by its flag, or by Info-ZIP's field of the name
    in UTF-8, which does not count where the name in the header was changed since (its CRC)."""
    name = info.orig_filename.split("\0")[0]
    if info.flag_bits & _UTF8 or name.isascii():
        return name
    extra = info.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        crc = zlib.crc32(info.orig_filename.encode("cp437"))
        if kind == _UNICODE_PATH and field[:5] == struct.pack("<BL", 1, crc):
            with suppress(UnicodeError):
                return field[5:].decode() or None
    return None


def _slashes(name: str) -> str:
    r"""Some programs of Windows write \ only. Beside a / it is half a character of Shift-JIS."""
    return name if "/" in name else name.replace("\\", "/")


def _say_cp437(path: Path, infos: Sequence[zipfile.ZipInfo], names: Sequence[str]) -> None:
    """A line where names are read in an encoding of which nothing is known."""
    guessed = [
        name
        for info, name in zip(infos, names, strict=True)
        if is_image(name) and _told_name(info) is None and name == _slashes(info.orig_filename)
    ]
    if guessed:
        print(
            f"{path}: does not say the encoding of {counted(len(guessed), 'name')}, such as "
            f"{guessed[0]}, and they are no UTF-8, so they are read as cp437; if that is wrong, "
            "unpack it with a program that knows their encoding and give the folder",
            flush=True,
        )


def _copy(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, tar: tarfile.TarFile,
    skip: bool,
) -> None:  # fmt: skip
    member = tarfile.TarInfo(name)
    content = b""
    if stat.S_ISLNK(info.external_attr >> 16):
        member.type = tarfile.SYMTYPE
        member.linkname = _read(path, archive, info, name, _LONGEST_LINK).decode(errors="replace")
    elif is_image(name):
        try:
            content = _read(path, archive, info, name, LONGEST_IMAGE)
        except TarError as error:
            if not skip:
                raise
            print(error, flush=True)
    elif name.lower().endswith(".tar"):
        raise Unskippable(f"{path}: holds the tar {name}; unpack the zip and give the folder")
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _read(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, most: int
) -> bytes:
    """The content of a member, whose checksum is right."""
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

"""Bring CIFAR-10 in any of its forms into two tars of class folders: DEST/train.tar, DEST/val.tar.

    python shard_tools/cifar_images.py cifar-10-python.tar.gz data/cifar10/images
    python shard_tools/make_shards.py data/cifar10/images/train.tar data/cifar10/shards/train

SOURCE is the official python or binary archive (or its unpacked folder), whose pickles are read
without running them, or images in ImageFolder layout, `train/<class>/…` and `test/<class>/…` (or
val), as a folder, zip or tar. Raw pixels become PNG files, which lose nothing (make_shards then
encodes them as JPEG of quality 95, as every PNG); image files are copied as they are. Equal input
gives equal tars.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pipeline.errors import naming, not_there
from pipeline.help_text import HelpFormatter
from shard_tools.atomic import check_writable, fsync
from shard_tools.cifar_batches import (
    LARGEST,
    binary_batch,
    binary_classes,
    python_batch,
    python_classes,
)
from shard_tools.cli import ToolError, parse, run
from shard_tools.sharding.folders import walk_once
from shard_tools.sharding.found import is_image, is_system_file
from shard_tools.tar import header, padding

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation"), "val"),
}
BATCH = re.compile(r"(data_batch_([1-9]\d*)|test_batch)(\.bin)?")
META = ("batches.meta", "batches.meta.txt")
OFFICIAL = {"train": 50_000, "val": 10_000}  # images
MOST_CLASSES = 10
MOST_BYTES = 6 * LARGEST  # of all batches together, which are held in memory
HUNDRED = ({"train", "test", "meta"}, {"fine_label_names.txt"})  # files of CIFAR-100's archives
# What the libraries raise for damaged archives.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, ValueError,
           LookupError, OverflowError, RuntimeError, NotImplementedError, struct.error)  # fmt: skip


class Member(NamedTuple):
    """A file inside the source: its path there, its bytes, and a function that reads it."""

    name: str
    size: int
    read: Callable[[], bytes]


class Picture(NamedTuple):
    """An image file: train or val, its class, its name, its bytes."""

    split: str
    label: str
    name: str
    data: bytes


@contextmanager
def members(source: Path) -> Iterator[Iterator[Member]]:
    """The regular files of a folder, zip or tar. ToolError where it cannot be read as one."""
    try:
        with naming(source, "cannot be read"):
            if source.is_dir():
                yield _of_folder(source)
            elif not source.is_file():
                raise ToolError(not_there(source))
            elif zipfile.is_zipfile(source):
                with zipfile.ZipFile(source) as archive:
                    yield _of_zip(archive)
            else:
                with tarfile.open(source) as tar:
                    yield _of_tar(tar, source)
    except DAMAGED as error:
        text = str(error).split("\n")[0].rstrip(":") or type(error).__name__
        raise ToolError(f"{source}: is damaged, or no folder, zip or tar ({text})") from error


def _of_folder(root: Path) -> Iterator[Member]:
    """Links are followed, each folder is read once."""
    for folder, folders, names in walk_once(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            inside = path.relative_to(root).as_posix()
            if path.is_file():
                yield Member(inside, path.stat().st_size, path.read_bytes)
            elif not path.exists():
                raise ToolError(f"{root}: {inside} is a link to nothing; mend or remove it")


def _of_zip(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        if not info.is_dir():
            name = info.filename.replace("\\", "/")  # as some programs of Windows write it
            yield Member(name, info.file_size, partial(_read_zip, archive, info))


def _read_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Reading all of it at once would first inflate what goes beyond the size that it declares."""
    with archive.open(info) as file:
        return file.read(info.file_size + 1)  # a byte more, for its checksum to be looked at


def _of_tar(tar: tarfile.TarFile, source: Path) -> Iterator[Member]:
    for info in tar:
        if info.isfile():
            yield Member(info.name, info.size, partial(_read, tar, info))
        elif not info.isdir() and is_wanted(info.name):
            raise ToolError(f"{source}: {info.name} is a link and not a file; pack the files")
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header, or none, for the end of an archive, and reads no checksum of
    a compressed one. EOFError where the end is no block of zeros."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):
        raise EOFError(f"neither a member nor the end is at byte {tar.offset}")
    while tar.fileobj.read(1 << 20):
        pass


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    data = b"" if file is None else file.read()
    if len(data) != info.size:
        raise EOFError(f"{info.name} ends early")
    return data


def pictures(source: Path, left_out: list[str] | None = None) -> Iterator[Picture]:
    """Every image of a source, in a fixed order; left_out gets the names of image files that are
    in no class folder. ToolError where two would have one name, or the source is of another kind.
    """
    batches: dict[str, bytes] = {}
    others: set[str] = set()
    seen: set[tuple[str, str, str]] = set()
    held_out: set[str] = set()
    with members(source) as found:
        for member in found:
            base = member.name.rsplit("/", 1)[-1].lower()
            if is_system_file(member.name):
                continue
            if BATCH.fullmatch(base) or base in META:
                if base in batches:
                    raise ToolError(f"{source}: holds {base} more than once")
                batches[base] = _small(member, source)
                if sum(map(len, batches.values())) > MOST_BYTES:
                    raise ToolError(
                        f"{source}: has over {MOST_BYTES} bytes of batches; CIFAR-10 has 184 MB"
                    )
            elif place := image_place(member.name):
                _check_place(member.name, place, source, seen, held_out)
                yield Picture(*place, _small(member, source))
            elif is_image(member.name):
                if ".." in member.name.split("/"):
                    raise ToolError(f"{source}: {member.name} leads out of the archive")
                if left_out is not None:
                    left_out.append(member.name)
            else:
                others.add(base)
    if seen and batches:
        raise ToolError(f"{source}: holds image files and batches of CIFAR-10; give one of them")
    if not seen and not batches and any(files <= others for files in HUNDRED):
        raise ToolError(f"{source}: is CIFAR-100; give CIFAR-10")
    if batches:
        yield from official(batches, source)


def _check_place(
    name: str,
    place: tuple[str, str, str],
    source: Path,
    seen: set[tuple[str, str, str]],
    held_out: set[str],
) -> None:
    """ToolError for a second image of one name, and for a second set of held-out images."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ToolError(f"{source}: the name {name!r} is not UTF-8") from error
    if place[0] == "val":
        held_out.add(_split(name.split("/")))
    if len(held_out) > 1:
        both = " and ".join(sorted(held_out))
        raise ToolError(f"{source}: holds {both}; give one of them as the test images")
    if place in seen:
        raise ToolError(f"{source}: holds {'/'.join(place[1:])} of {place[0]} more than once")
    seen.add(place)


def is_wanted(name: str) -> bool:
    """Whether a member is an image or a batch by its name, and no leftover of a system."""
    base = name.rsplit("/", 1)[-1].lower()
    batch = BATCH.fullmatch(base) is not None or base in META
    return is_image(name) or (batch and not is_system_file(name))


def _small(member: Member, source: Path) -> bytes:
    if member.size > LARGEST:
        raise ToolError(f"{source}: {member.name} has {member.size} bytes, at most {LARGEST} fit")
    return member.read()


def image_place(name: str) -> tuple[str, str, str] | None:
    """(split, class, file name) of `…/train/<class>/…/file.jpg`, None for another file. Of several
    folders that are called as a split the innermost counts: a copy may be in a folder `test`."""
    if not is_image(name):
        return None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    split = _split(parts)
    if not split or ".." in parts:
        return None
    at = max(n for n, part in enumerate(parts[:-2]) if part.lower() == split)
    return SPLITS[split], parts[at + 1], "_".join(parts[at + 2 :])


def _split(parts: list[str]) -> str:
    """The innermost folder that is called as a split, in lower case, or ""."""
    return next((p.lower() for p in reversed(parts[:-2]) if p.lower() in SPLITS), "")


def official(batches: dict[str, bytes], source: Path) -> Iterator[Picture]:
    """The images of the official batches, as PNG files."""
    names = sorted(name for name in batches if name not in META)
    kinds = {name.endswith(".bin") for name in names}
    if len(kinds) != 1:
        raise ToolError(f"{source}: should hold batches of the python or of the binary version")
    binary = kinds.pop()
    meta = META[binary]
    wanted = {"test_batch" + ".bin" * binary, meta}
    for number in range(1, max(2, len(names))):  # one of the names is the test batch's
        wanted.add(f"data_batch_{number}" + ".bin" * binary)
    if missing := sorted(wanted - batches.keys()):
        raise ToolError(f"{source}: lacks {', '.join(missing)} of CIFAR-10")
    first: dict[bytes, str] = {}
    for name in names:
        if (other := first.setdefault(batches[name], name)) != name:
            raise ToolError(f"{source}: {name} is the same as {other}")
    classes = (binary_classes if binary else python_classes)(batches[meta], f"{source}, {meta}")
    read = binary_batch if binary else python_batch
    for name in names:
        batch = read(batches[name], f"{source}, {name}", len(classes))
        part = name.removesuffix(".bin")
        split = "val" if part == "test_batch" else "train"
        for number, (image, label) in enumerate(zip(*batch, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            yield Picture(split, classes[label], f"{part}-{number:05d}.png", buffer.getvalue())


class Written(NamedTuple):
    """What write_tars has written: images of train and val, their classes, and the image files of
    the source that are in no class folder."""

    images: dict[str, int]
    classes: int
    left_out: list[str]


def write_tars(source: Path, dest: Path) -> Written:
    """Write DEST/train.tar and DEST/val.tar, each under its name only once both are complete.

    ToolError where the source lacks one, their classes differ, or there are over ten.
    """
    temporary = {split: dest / f".{split}.tar.{os.getpid()}.tmp" for split in ("train", "val")}
    count, left_out = dict.fromkeys(temporary, 0), list[str]()
    classes: dict[str, set[str]] = {split: set() for split in temporary}
    check_writable(dest, folder=True)
    with naming(dest, "cannot be written"):
        dest.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as stack:
                files = {s: stack.enter_context(p.open("wb")) for s, p in temporary.items()}
                for split, label, name, data in pictures(source, left_out):
                    files[split].write(header(f"{label}/{name}".encode(), len(data)))
                    files[split].write(data + padding(len(data)))
                    classes[split].add(label)
                    count[split] += 1
                for file in files.values():
                    file.write(bytes(1024))  # the end of a tar
            _check(source, classes)
            for split, path in temporary.items():
                fsync(path)
                os.replace(path, dest / f"{split}.tar")
            fsync(dest)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)
    return Written(count, len(classes["train"]), left_out)


def _check(source: Path, classes: dict[str, set[str]]) -> None:
    for split, what in (("train", "training"), ("val", "test")):
        if not classes[split]:
            raise ToolError(
                f"{source}: holds no {what} images; should be CIFAR-10's python or binary archive, "
                "or train/<class>/… and test/<class>/… with image files"
            )
    odd = sorted(classes["train"] ^ classes["val"])
    if odd or len(classes["train"]) < 2:
        raise ToolError(
            f"{source}: the training and test images should be of the same two classes or more, "
            + (f"and {odd[0]!r} is in one of them only" if odd else "and there is one class")
        )
    if len(classes["train"]) > MOST_CLASSES:
        raise ToolError(
            f"{source}: has {len(classes['train'])} classes, CIFAR-10 has {MOST_CLASSES}"
        )


def convert(options: argparse.Namespace) -> int:
    """The command."""
    count, classes, left_out = write_tars(options.source, options.dest)
    if left_out:
        print(
            f"warning: {options.source}: {len(left_out)} image files are not in train/<class>/ or "
            f"test/<class>/ and were left out, such as {left_out[0]}",
            file=sys.stderr,
        )
    found = f"{count['train']} training and {count['val']} test images of {classes} classes"
    if (count, classes) != (OFFICIAL, MOST_CLASSES):
        print(
            f"warning: {options.source}: has {found}; CIFAR-10 has {OFFICIAL['train']} and "
            f"{OFFICIAL['val']} of {MOST_CLASSES}",
            file=sys.stderr,
        )
    print(f"{options.dest}: {found}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="CIFAR-10 as two tars of class folders, which make_shards.py takes.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="the official python or binary archive, or a folder, zip or tar of class folders with "
        "train and test",
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder for train.tar and val.tar")
    return run(convert, parse(parser, arguments))


if __name__ == "__main__":
    sys.exit(main())

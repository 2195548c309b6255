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
import os
import re
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

from pipeline.errors import naming
from shard_tools.atomic import check_writable, fsync
from shard_tools.cifar_batches import (
    LARGEST,
    binary_batch,
    binary_classes,
    python_batch,
    python_classes,
)
from shard_tools.cli import HelpFormatter, ToolError, parse, run
from shard_tools.sharding.found import is_image, is_system_file
from shard_tools.tar import header, padding

SPLITS = {"train": "train", "test": "val", "val": "val", "valid": "val", "validation": "val"}
BATCH = re.compile(r"(data_batch_([1-9]\d*)|test_batch)(\.bin)?")
META = ("batches.meta", "batches.meta.txt")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError,
           NotImplementedError)  # fmt: skip


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
                raise ToolError(f"{source}: no such file or folder")
            elif zipfile.is_zipfile(source):
                with zipfile.ZipFile(source) as archive:
                    yield _of_zip(archive)
            else:
                with tarfile.open(source) as tar:
                    yield _of_tar(tar)
    except DAMAGED as error:
        text = str(error).split("\n")[0] or type(error).__name__
        raise ToolError(f"{source}: is damaged, or no folder, zip or tar ({text})") from error


def _of_folder(root: Path) -> Iterator[Member]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():
                inside = path.relative_to(root).as_posix()
                yield Member(inside, path.stat().st_size, path.read_bytes)


def _of_zip(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        if not info.is_dir():
            yield Member(info.filename, info.file_size, partial(archive.read, info))


def _of_tar(tar: tarfile.TarFile) -> Iterator[Member]:
    for info in tar:
        if info.isfile():
            yield Member(info.name, info.size, partial(_read, tar, info))


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    data = b"" if file is None else file.read()
    if len(data) != info.size:
        raise EOFError(f"{info.name} ends early")
    return data


def pictures(source: Path) -> Iterator[Picture]:
    """Every image of a source, in a fixed order."""
    batches: dict[str, bytes] = {}
    images = False
    with members(source) as found:
        for member in found:
            base = member.name.rsplit("/", 1)[-1]
            if is_system_file(member.name):
                continue
            if BATCH.fullmatch(base) or base in META:
                if base in batches:
                    raise ToolError(f"{source}: holds {base} more than once")
                batches[base] = _small(member, source)
            elif place := image_place(member.name):
                images = True
                yield Picture(*place, _small(member, source))
    if images and batches:
        raise ToolError(f"{source}: holds image files and batches of CIFAR-10; give one of them")
    if batches:
        yield from official(batches, source)


def _small(member: Member, source: Path) -> bytes:
    if member.size > LARGEST:
        raise ToolError(f"{source}: {member.name} has {member.size} bytes, at most {LARGEST} fit")
    return member.read()


def image_place(name: str) -> tuple[str, str, str] | None:
    """(split, class, file name) of `…/train/<class>/…/file.jpg`, None for another file."""
    if not is_image(name):
        return None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    at = next((n for n, part in enumerate(parts[:-2]) if part in SPLITS), None)
    if at is None or ".." in parts:
        return None
    return SPLITS[parts[at]], parts[at + 1], "_".join(parts[at + 2 :])


def official(batches: dict[str, bytes], source: Path) -> Iterator[Picture]:
    """The images of the official batches, as PNG files."""
    names = sorted(name for name in batches if name not in META)
    kinds = {name.endswith(".bin") for name in names}
    if len(kinds) != 1:
        raise ToolError(f"{source}: should hold batches of the python or of the binary version")
    binary = kinds.pop()
    meta = META[binary]
    wanted = {"test_batch" + ".bin" * binary, meta}
    missing = sorted(wanted - batches.keys())
    if missing or len(names) < 2:
        raise ToolError(f"{source}: lacks {', '.join(missing) or 'data_batch_1'} of CIFAR-10")
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


def write_tars(source: Path, dest: Path) -> dict[str, int]:
    """Write DEST/train.tar and DEST/val.tar, each under its name only once both are complete.

    Returns the images of each. ToolError where the source lacks one, or their classes differ.
    """
    temporary = {split: dest / f".{split}.tar.{os.getpid()}.tmp" for split in ("train", "val")}
    count = dict.fromkeys(temporary, 0)
    classes: dict[str, set[str]] = {split: set() for split in temporary}
    check_writable(dest, folder=True)
    with naming(dest, "cannot be written"):
        dest.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as stack:
                files = {s: stack.enter_context(p.open("wb")) for s, p in temporary.items()}
                for split, label, name, data in pictures(source):
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
    return count


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


def convert(options: argparse.Namespace) -> int:
    """The command."""
    count = write_tars(options.source, options.dest)
    print(f"{options.dest}: {count['train']} training and {count['val']} test images")
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

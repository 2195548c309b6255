"""Images wherever they are, as a Manifest: shards, a folder, a tar, a table or a list of paths.

What reads shards then reads all of them: an image file counts as a shard of one sample.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from eval.shared.labels import LIST, TABLES, listed_in
from pipeline.data.batch import Batch
from pipeline.data.crops import CentreCrop
from pipeline.data.jpeg import decoder
from pipeline.data.loader import Loader
from pipeline.data.reader import Reader, SampleError
from pipeline.data.shard_cache import ShardCache
from pipeline.errors import UserError, naming
from shard_tools.image_file import ImageFault
from shard_tools.index_file import ListedIndex
from shard_tools.manifest import MANIFEST, SAMPLE, Manifest, Shard, is_remote, read_manifest
from shard_tools.sharding.items import Item, Items, file_times
from shard_tools.sharding.sources import Listing, Source, open_source

MODIFIED = "modified"  # in FileManifest.made: a digest of when its files were modified


@dataclass(frozen=True)
class FileManifest(Manifest):
    """A manifest of image files that nobody sharded; its index and names are in memory."""

    listed: np.ndarray = field(default_factory=lambda: np.zeros(0, SAMPLE))
    keys: tuple[str, ...] = ()

    @cached_property
    def lazy_index(self) -> ListedIndex:
        """SAMPLE rows; of the pictures' sizes nothing is known."""
        return ListedIndex(self.listed)

    @cached_property
    def names(self) -> Sequence[str]:  # type: ignore[override]
        """Name of each image: its path in the folder, member of the tar, or line of the list."""
        return self.keys

    def describe(self, sample: int) -> str:
        """The image file, or the member of a tar."""
        path, name = paths(self)[sample], self.keys[sample]
        return path if path.endswith(name) else f"{name} of {path}"


def open_images(where: str | Path, root: Path | None = None, skip: bool = False) -> Manifest:
    """The images of shards (a folder or URL), of a folder (all below it), of a tar, of a CSV or
    JSONL, or of a .txt with one path per line; labels as the source has them, -1 = none.

    root: where the relative paths of a table or list start (default: its folder). In a folder
    whose images are all in folders, the folder right below it is an image's class, in sorted
    order. UserError where nothing can be listed, or a file is missing or damaged; with `skip` such
    files are left out, and listed in `made["left_out"]` with the reason.
    """
    path = Path(where)
    if is_remote(str(where)) or (path / MANIFEST).is_file():
        return read_manifest(where)
    suffix = path.suffix.lower()
    if suffix == LIST:
        return of_files(listed_in(path), root or path.parent)
    if path.is_dir() and (path / "train" / MANIFEST).is_file():
        raise UserError(f"{path}: holds folders of shards; give one of them, such as {path}/train")
    table = suffix in TABLES
    takes = f"shards, a folder, a tar nor a list ({' '.join((*TABLES, LIST))})"
    source = open_source(path, Listing(unlabelled=not table, root=root, skip=skip, takes=takes))
    return _as_manifest(source if table else _by_folder(source))


def paths(manifest: Manifest) -> list[str]:
    """The file that holds each sample, an image file or the tar that it is in: an absolute path, or
    a URL."""
    counts = [shard.samples for shard in manifest.shards]
    files = [absolute(manifest.path(number)) for number in range(len(counts))]
    return [file for file, count in zip(files, counts, strict=True) for _ in range(count)]


def absolute(path: str) -> str:
    """A path that holds in every folder; a URL as it is."""
    return path if is_remote(path) else str(Path(path).absolute())


def keys(manifest: Manifest) -> Sequence[str]:
    """A name for each sample: its original one, or its number where none was recorded."""
    return manifest.names or tuple(f"{number:08d}" for number in range(manifest.samples))


def reader(manifest: Manifest, size: int) -> Reader:
    """Reads samples of a manifest as centre crops of `size` pixels."""
    remote = is_remote(manifest.folder)
    return Reader(manifest, size, "bicubic", "auto", ShardCache(manifest) if remote else None)


def read_crop(path: str | Path, crop: CentreCrop) -> np.ndarray:
    """The crop of an image file, uint8 [size, size, 3]. UserError where it cannot be read, or is
    none that training would take."""
    with naming(path, "cannot be read"):
        data = Path(path).read_bytes()
    pixels = np.empty((crop.image_size, crop.image_size, 3), np.uint8)
    try:
        decoder()[1](data, crop, pixels, "bicubic")
    except ImageFault as error:
        raise UserError(f"{path} will not decode: {error}") from None
    return pixels


def load_batches(
    manifest: Manifest, crop: CentreCrop, tasks: list[int], batch_size: int, workers: int, *,
    skip: bool, pin_memory: bool = False,
) -> Loader:  # fmt: skip
    """Batches number `tasks` of `batch_size` crops each, in manifest order.

    An image that will not decode raises SampleError; with `skip` it is a black one, and its
    number is in Batch.key as -1 - sample.
    """
    source = reader(manifest, crop.image_size)
    dataset = _Batches(source, crop, batch_size, skip)
    return Loader(dataset, tasks, workers, pin_memory, source)  # type: ignore[arg-type]


class _Batches(Dataset):
    def __init__(self, source: Reader, crop: CentreCrop, batch_size: int, skip: bool) -> None:
        self.reader, self.crop, self.batch_size, self.skip = source, crop, batch_size, skip
        self.images = batch_size  # of a batch, which Loader asks for

    def __getitem__(self, task: int) -> Batch | Exception:
        first, total = task * self.batch_size, self.reader.manifest.samples
        samples = np.arange(first, min(first + self.batch_size, total))
        image, key, faults = self.reader.empty(len(samples)), samples.copy(), []
        pixels = image.numpy()
        for row, sample in enumerate(samples.tolist()):
            try:
                self.reader.decode(sample, self.crop, pixels[row])
            except SampleError as error:
                if not self.skip:
                    return error
                pixels[row], key[row] = 0, -1 - sample
                faults.append(str(error))
            except UserError as error:
                return error
        labels, numbers = self.reader.labels(samples), torch.from_numpy(samples)
        bad = len(faults)
        return Batch(image, labels, numbers, torch.from_numpy(key), 0, task, bad, tuple(faults))


def of_files(files: Sequence[str], root: Path = Path()) -> FileManifest:
    """The image files that are named, in that order, without labels."""
    items = Items()
    for name in files:
        file = root / name
        with naming(file, "cannot be read"):
            items.append(Item(name, -1, str(file.absolute()), 0, file.stat().st_size))
        if not file.is_file():
            raise UserError(f"{file}: is not an image file")
    return _as_manifest(Source(str(root), items))


def _by_folder(source: Source) -> Source:
    """The folder right below the top as the class, where every image is in one."""
    if not all("/" in item.name for item in source.items):
        return source
    classes = sorted({item.name.split("/")[0] for item in source.items})
    number = {name: label for label, name in enumerate(classes)}
    items = Items(item._replace(label=number[item.name.split("/")[0]]) for item in source.items)
    return Source(source.root, items, tuple(classes), source.ignored, source.missing)


def _as_manifest(source: Source) -> FileManifest:
    shards: list[list[Any]] = []  # file, samples, bytes: an archive's images follow each other
    for item in source.items:
        if shards and shards[-1][0] == item.file:
            shards[-1][1] += 1
        elif item.offset:  # of an archive, whose size is not known
            with naming(item.file, "cannot be read"):
                size = os.stat(os.path.join(source.root, item.file)).st_size
            shards.append([item.file, 1, size])
        else:
            shards.append([item.file, 1, item.size])
    rows = np.zeros(len(source.items), SAMPLE)
    rows["offset"] = [item.offset for item in source.items]
    rows["length"] = [item.size for item in source.items]
    rows["label"] = [item.label for item in source.items]
    files = tuple(Shard(file, count, size, "") for file, count, size in shards)
    names = tuple(item.name for item in source.items)
    made = {"left_out": dict(source.missing), MODIFIED: file_times(source.root, source.items)}
    folder = str(Path(source.root).absolute())
    return FileManifest(folder, files, source.classes, made, folder, listed=rows, keys=names)

"""Training and held-out set among the folders of images."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence

from shard_tools.cli import ToolError
from shard_tools.members import plain_name
from shard_tools.sharding.found import HELD_OUT, TRAINING, Found, Images


def split_folders(names: Iterable[str]) -> tuple[str, list[str]] | None:
    """("" or the folder with a final slash, the names of the folders in it) where all images are
    in that folder, and there in those of a training set, of a held-out one and perhaps of others;
    None where they are not."""
    folders = {tuple(plain_name(name).split("/")[:-1]) for name in names}
    above, level = "", 0
    while True:
        here = sorted({folder[level] for folder in folders if len(folder) > level})
        called = {name.lower() for name in here}
        if called & TRAINING and called & HELD_OUT:
            return above, here
        if len(here) != 1:
            return None
        above, level = f"{above}{here[0]}/", level + 1


def training_and_held_out(folders: Iterable[str]) -> tuple[str, str]:
    """The training set among `folders`, which has one, and the validation set, or else the test
    set."""
    train = [name for name in folders if name.lower() in TRAINING]
    held_out = [name for name in folders if name.lower() in HELD_OUT]
    held_out.sort(key=lambda name: name.lower().startswith("test"))
    return train[0], held_out[0]


def divided(found: Found, folders: Sequence[str]) -> list[Found]:
    """What is in each of the folders, with names as in that folder; what is known of files outside
    them is in the first, and images that are in no folder beside them are `ignored`."""
    parts = [Found() for _ in folders]

    def of(name: str) -> int:
        path = "/" + posixpath.normpath(name)
        inside = (number for number, folder in enumerate(folders) if f"/{folder}/" in path)
        return next(inside, 0)

    for part, folder in zip(parts, folders, strict=True):
        cut = len(folder) + 1
        part.images = Images(
            image._replace(name=image.name[cut:])
            for image in found.images
            if image.name.startswith(f"{folder}/")
        )
    depth = folders[0].count("/")
    loose = [name for name in found.images.names if name.count("/") <= depth]
    parts[0].ignored += [(name, "in none of the sets") for name in loose]
    for name, reason in found.ignored:
        parts[of(name)].ignored.append((name, reason))
    for name, reason in found.missing:
        parts[of(name)].missing.append((name, reason))
    return parts


def check_splits(found: Found, where: str, advice: str) -> None:
    """UserError where the folders are no classes, but a training set and a held-out one."""
    if sets := split_folders(found.images.names):
        above, folders = sets
        raise splits_error(f"{where}/{above}".rstrip("/"), folders, advice)


def splits_error(where: str, folders: Sequence[str], advice: str) -> ToolError:
    """The error of folders or files that are sets and no classes."""
    return ToolError(f"{where}: holds {' and '.join(folders)}, which are not classes; {advice}")

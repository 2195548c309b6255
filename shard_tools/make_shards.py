"""Turn images into WebDataset shards with a manifest.

    python shard_tools/make_shards.py SOURCE DEST

A sample has the fields jpg, cls (class index in ASCII; absent without labels) and json (original
name, synset, width, height), or fewer (--fields). Equal input and options give equal tars at any
number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import check_range, naming
from pipeline.help_text import HelpFormatter
from shard_tools.class_list import read_classes
from shard_tools.cli import ToolError, images_of, parse, run, seed_number, shard_bytes, worker_count
from shard_tools.cores import cores
from shard_tools.image_file import CAN_CUT, Conversion
from shard_tools.sharding.archives import UNPACKED, is_archive, is_archive_file, is_compressed
from shard_tools.sharding.folders import walk_once
from shard_tools.sharding.found import naming_skip
from shard_tools.sharding.imagenet import Layout, open_splits, recognise
from shard_tools.sharding.images import ImageSettings
from shard_tools.sharding.job import (
    Execution,
    at_work,
    check_destination,
    check_plan,
    check_room,
    find_plan,
    is_finished,
    is_made_by,
    merge,
    planning,
    run_job,
    say_modified,
    store_plan,
)
from shard_tools.sharding.labels import read_labels
from shard_tools.sharding.layout import ALL_FIELDS, FIELDS, LAYOUT, PARTS, PLAN, Settings, make_plan
from shard_tools.sharding.merge import remove_unpacked
from shard_tools.sharding.parquet_sets import is_parquet
from shard_tools.sharding.sources import Listing, Source, open_source
from shard_tools.sharding.statistics import drop_duplicates


@dataclass(frozen=True)
class Split:
    """One folder of shards to make: from which paths, and where. together: the other set is in the
    same archive."""

    dest: Path
    paths: tuple[Path, ...]
    source: Source
    together: bool = False


def make_shards(options: argparse.Namespace) -> int:
    """The command: list, plan and check everything, then write it."""
    dest: Path = options.dest
    if options.merge:
        for folder in job_folders(dest):
            merge(folder)
        return 0
    settings, how = settings_of(options), execution_of(options)
    if options.resume and is_made(options):
        for folder in job_folders(dest):
            run_job(folder, how)  # which says so
        return 0
    unpacked = dest / PARTS / UNPACKED if how.tasks == 1 else None
    with naming(options.source, "cannot be read"):
        if is_compressed(options.source):
            for folder in (dest, dest / "train"):
                check_destination(folder, [options.source], how)
        layout = None if options.unlabelled else recognise(options.source, unpacked)
    folders = destinations(options, layout, how)
    request = request_of(options)
    with ExitStack() as held:
        with planning(folders[0], how):
            if all(find_plan(folder, request, how) for folder in folders):
                held.enter_context(at_work(folders, how))
            else:
                plan_splits(options, layout, folders, settings, how, request, held)
        for folder in folders:
            run_job(folder, how)
    remove_unpacked(options.dest)
    return 0


def plan_splits(
    options: argparse.Namespace, layout: Layout | None, folders: list[Path], settings: Settings,
    how: Execution, request: str, held: ExitStack,
) -> None:  # fmt: skip
    """List and plan everything, and check it before the first plan is written; from then on the
    folders are `held`."""
    listing = Listing(
        classes=read_classes(options.classes_from),
        labels=read_labels(options.synsets, options.devkit),
        root=options.root,
        unlabelled=options.unlabelled,
        unpacked=options.dest / PARTS / UNPACKED if how.tasks == 1 else None,
        skip=options.on_error == "skip",
        image_column=options.image_column,
        label_column=options.label_column,
    )
    with naming_skip():
        splits = find_splits(options.source, layout, folders, listing)
    if options.drop_duplicates:
        splits = [
            replace(split, source=drop_duplicates(split.source, how.workers)) for split in splits
        ]
    plans = [make_plan(split.source, settings) for split in splits]
    for split, plan in zip(splits, plans, strict=True):
        announce(split)
        if check_plan(split.dest, plan, how):
            say_modified(split.dest, plan)
        else:
            check_room(split.dest, plan)
    held.enter_context(at_work(folders, how))
    for split, plan in zip(splits, plans, strict=True):
        check_plan(split.dest, plan, how)  # another call may have begun in the meantime
    note = note_of(options, len(splits))
    for split, plan in zip(splits, plans, strict=True):
        store_plan(split.dest, plan, split.paths[0].name, how, request, note)


def note_of(options: argparse.Namespace, sets: int) -> dict[str, Any]:
    """What the manifests of an archive or Parquet file, or of a folder of them, say of the call
    that made them: their content is the same where sizes and times are. Nothing of other sources,
    which are listed quickly."""
    with naming(options.source, "cannot be read"):
        files = packed_files(options.source)
        about = [(os.path.relpath(file, options.source), file.stat()) for file in files]
    if not files:
        return {}
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in about]
    text = f"{request_of(options, anywhere=True)} {states!r}"
    return {"request": hashlib.sha256(text.encode()).hexdigest(), "sets": sets}


def packed_files(source: Path) -> list[Path]:
    """`source`, where it is an archive or a Parquet file; of a folder that holds such, or whose
    folders do, all files that are in it."""
    if not source.is_dir():
        return [source] if is_archive_file(source) or is_parquet(source.name) else []
    inside = (path.name for pattern in ("*", "*/*") for path in source.glob(pattern))
    if not any(is_archive(name) or is_parquet(name) for name in inside):
        return []
    found = (Path(here, name) for here, _, names in walk_once(source) for name in names)
    return sorted(path for path in found if path.exists())


def is_made(options: argparse.Namespace) -> bool:
    """Whether such files were made into the shards that are there by a call like this one, so that
    they need not be unpacked to see that it is finished."""
    folders = job_folders(options.dest)
    note = note_of(options, len(folders))
    return bool(note) and all(is_made_by(folder, note) for folder in folders)


def request_of(options: argparse.Namespace, anywhere: bool = False) -> str:
    """What all tasks of one call have in common: the options that decide the plan, and the state of
    the files that they name. anywhere: without the folders of the files."""
    private = ("dest", "workers", "resume", "on_error", "num_tasks", "task_id", "merge")
    given = {name: value for name, value in vars(options).items() if name not in private}
    states = {}
    for name, value in given.items():
        if isinstance(value, Path) and value.exists():
            about = value.stat()
            states[name] = (about.st_size, about.st_mtime_ns)
    if anywhere:
        given |= {name: value.name for name, value in given.items() if isinstance(value, Path)}
    where = "" if anywhere else os.getcwd()
    text = f"{LAYOUT} {where} {sorted(given.items())} {sorted(states.items())}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def destinations(options: argparse.Namespace, layout: Layout | None, how: Execution) -> list[Path]:
    """The folders to be written, checked."""
    dest: Path = options.dest
    if layout is None:
        dest = dest / "train" if options.splits else dest
        check_destination(dest, [options.source], how)
        return [dest]
    folders = [dest / "train", dest / "val"]
    for folder, paths in zip(folders, (layout.train, layout.val), strict=True):
        check_destination(folder, list(paths), how)
    return folders


def find_splits(
    source: Path, layout: Layout | None, folders: list[Path], listing: Listing
) -> list[Split]:
    """What is to be made of the source, listed and checked."""
    if layout is None:
        return [Split(folders[0], (source,), open_source(source, listing))]
    if listing.classes:
        raise ToolError(
            f"{source}: the validation set takes the classes of the training set, so "
            "--classes-from does nothing"
        )
    print(f"{source}: {layout.what}", flush=True)
    train, val = open_splits(layout, listing)
    return [
        Split(folders[0], layout.train, train, layout.together),
        Split(folders[1], layout.val, val, layout.together),
    ]


def announce(split: Split) -> None:
    """One line about a listed source."""
    source = split.source
    remarks = [images_of(len(source.items), len(source.classes))]
    there = set(source.items.labels)
    if empty := [name for number, name in enumerate(source.classes) if number not in there]:
        shown = ", ".join(empty[:3]) + (", …" if len(empty) > 3 else "")
        remarks.append(f"no image of {len(empty)} of them ({shown})")
    if source.missing:
        remarks.append(f"{len(source.missing)} missing or damaged")
    if source.remark:
        remarks.append(source.remark)
    more = f" and {len(split.paths) - 1} more" if len(split.paths) > 1 else ""
    part = f", {split.dest.name}" if split.together else ""
    print(f"{split.paths[0]}{more}{part}: {'; '.join(remarks)}", flush=True)


def job_folders(dest: Path) -> list[Path]:
    """`dest`, or the folders of the train and validation set in it."""
    inside = [dest / name for name in ("train", "val")]
    found = [folder for folder in inside if is_finished(folder) or (folder / PARTS).is_dir()]
    here = is_finished(dest) or (dest / PARTS / PLAN).is_file()
    return [dest] if here or not found else found


def execution_of(options: argparse.Namespace) -> Execution:
    """Check the options that say how the job runs."""
    check_range("--num-tasks", options.num_tasks, at_least=1)
    if not 0 <= options.task_id < options.num_tasks:
        raise ToolError(
            f"--task-id {options.task_id}: must be between 0 and --num-tasks - 1 = "
            f"{options.num_tasks - 1}"
        )
    return Execution(
        options.workers, options.on_error, options.resume, options.num_tasks, options.task_id
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Check the options and gather those that decide the bytes."""
    limits = {"--resize-shorter": options.resize_shorter, "--max-side": options.max_side}
    for flag, value in limits.items():
        check_range(flag, value, at_least=1)
    check_range("--quality", options.quality, at_least=1, at_most=100)
    if not options.name or set(options.name) & set("/.\0"):
        raise ToolError(f"--name {options.name!r}: must be a plain word without dots")
    conversion = Conversion(options.gray16, options.alpha)
    if options.restart_markers and not CAN_CUT:
        raise ToolError(
            "--restart-markers needs shard_tools/image_file/_jpegmarkers.c, which is not built: "
            "install a C compiler and libjpeg-dev, then run make setup"
        )
    image = ImageSettings(
        options.resize_shorter, options.max_side, options.quality, options.check, conversion,
        options.restart_markers,
    )  # fmt: skip
    return Settings(options.name, options.seed, options.shard_size, image, options.fields)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Turn images into WebDataset shards with a manifest. SOURCE is an ImageFolder "
        "tree; a folder of images without labels; a tar of class folders, of class tars as "
        "ImageNet's, or flat (gzip and zstd too); a zip; a folder of class tars; Hugging Face's "
        "Parquet files; a CSV or JSONL of path and label. A folder or archive of ImageNet's train "
        "and validation set, in any of the layouts in which they come, becomes DEST/train and "
        "DEST/val.",
        epilog="On a Slurm array: --num-tasks N --task-id $SLURM_ARRAY_TASK_ID in every task "
        "(add --resume to requeue), then once --merge.",
        formatter_class=HelpFormatter,
    )
    p.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder, tar, zip, Parquet, CSV or JSONL, see above",
    )
    p.add_argument("dest", type=Path, metavar="DEST", help="folder for the shards")
    _shard_options(p.add_argument_group("shards"))
    _image_options(p.add_argument_group("images"))
    _label_options(p.add_argument_group("labels and splits"))
    _job_options(p.add_argument_group("the job"))
    return p


def _shard_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a("--name", default="shard", help="shards are called NAME-000000.tar")
    a(
        "--shard-size", type=shard_bytes, metavar="BYTES", default="256MiB",
        help="largest size of a shard, such as 64MiB",
    )  # fmt: skip
    a("--seed", type=seed_number, metavar="N", default=0, help="seed of the shuffle")
    a(
        "--fields", choices=tuple(FIELDS), default=ALL_FIELDS, metavar="FIELDS",
        help="what a sample has: jpg,cls,json, or jpg,cls or jpg,json (the label is in the json); "
        "each field takes 1 KiB of the tar, its header and padding, which counts for small images "
        "(CIFAR-10's 46 MB of JPEGs make tars of 180 MB, 128 MB without one of the two)",
    )  # fmt: skip


def _image_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a("--on-error", choices=("fail", "skip"), default="fail", help="images that cannot be used")
    a("--check", choices=("decode", "headers"), default="decode", help="how each image is checked")
    a("--drop-duplicates", action="store_true", help="of files with equal bytes keep the first")
    a("--resize-shorter", type=int, metavar="PX", help="shrink to this shorter side")
    a("--max-side", type=int, metavar="PX", help="shrink to this longer side")
    a("--quality", type=int, metavar="Q", help="re-encode every image as JPEG of quality Q")
    a("--gray16", choices=("full", "fit"), help="scale more than 8 bits: by full or image's range")
    a("--alpha", choices=("drop", "white", "black"), help="what is under transparent pixels")
    a(
        "--restart-markers", action="store_true",
        help="put restart markers into the rows of baseline JPEGs, by which training reads only "
        "what a crop needs: files grow by 1 %% (3 %% at most), their pixels stay the same in every "
        "decoder; other images are left unchanged",
    )  # fmt: skip


def _label_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a("--classes-from", type=Path, metavar="PATH", help="class order: a shard folder or a list")
    a(
        "--synsets", type=Path, metavar="FILE",
        help="labels of a flat folder or tar (val): `synset` lines in name order, `name synset` "
        "lines, or LOC_val_solution.csv",
    )  # fmt: skip
    a("--devkit", type=Path, metavar="PATH", help="labels of a flat val: ILSVRC2012_devkit_t12")
    a("--unlabelled", action="store_true", help="every image below SOURCE, without labels")
    a("--splits", action="store_true", help="write DEST/train also where SOURCE has no val")
    a("--image-column", default="", metavar="NAME", help="of Parquet files with several")
    a("--label-column", default="", metavar="NAME", help="of Parquet files with several")
    a("--root", type=Path, metavar="FOLDER", help="where relative paths of a CSV or JSONL start")


def _job_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a(
        "--workers", type=worker_count, default=cores(), metavar="N",
        help="worker processes; 0 = none",
    )  # fmt: skip
    a(
        "--resume", action="store_true",
        help="resume an unfinished job; do nothing for a finished one",
    )  # fmt: skip
    a("--num-tasks", type=int, default=1, metavar="N", help="split the job over N tasks")
    a("--task-id", type=int, default=0, metavar="I", help="this task, from 0")
    a("--merge", action="store_true", help="write the manifest once all tasks are done")


def main(arguments: list[str] | None = None) -> int:
    return run(make_shards, parse(parser(), arguments))


if __name__ == "__main__":
    sys.exit(main())

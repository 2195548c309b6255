"""Turn images into WebDataset shards with a manifest.

    python shard_tools/make_shards.py SOURCE DEST

SOURCE is an ImageFolder tree, a folder of images without labels, ImageNet's original archives
(ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar), or a CSV or JSONL of path and label. A sample
has the fields jpg, cls (class index in ASCII; absent without labels) and json (original name,
synset, width, height). Equal input and options give equal tars at any number of workers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pipeline.errors import naming
from shard_tools.atomic import write_atomic
from shard_tools.cli import HelpFormatter, ToolError, cores, read_list, run
from shard_tools.image_file import Conversion
from shard_tools.manifest import MANIFEST, read_manifest
from shard_tools.sharding.images import ImageSettings
from shard_tools.sharding.layout import (
    PARTS,
    PLAN,
    Plan,
    Settings,
    make_plan,
    plan_record,
    read_part,
    read_plan_record,
)
from shard_tools.sharding.merge import clean_up, merge_parts, remove_leftovers
from shard_tools.sharding.sources import open_source
from shard_tools.sharding.writer import write_shards

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def byte_size(text: str) -> int:
    """A size such as 256MiB, 64M or 1000000 in bytes."""
    number = text.upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in ("K", "M", "G") else ""
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256MiB") from None


def read_classes(path: Path | None) -> tuple[str, ...]:
    """Class order of a shard folder's manifest, or of a text file with one name per line."""
    if path is None:
        return ()
    if path.is_dir():
        classes = read_manifest(path).classes
    elif path.is_file():
        classes = tuple(line.strip() for line in read_list(path))
    else:
        raise ToolError(f"{path}: no such file or shard folder to take the classes from")
    if not classes or len(set(classes)) != len(classes):
        raise ToolError(f"{path}: holds no classes, or one of them twice")
    return classes


def make_shards(options: argparse.Namespace) -> int:
    """The command: plan, write this task's shards, merge where nobody else is at work."""
    dest: Path = options.dest
    if options.merge:
        return merge(dest)
    if finished(dest) and not options.resume:
        raise ToolError(f"{dest}: already holds shards; give another folder or --resume")
    classes = read_classes(options.classes_from)
    with naming(options.source, "cannot be read"):
        source = open_source(
            options.source,
            classes=classes,
            synsets=options.synsets,
            devkit=options.devkit,
            root=options.root,
        )
    plan = make_plan(source, settings_of(options))
    if finished(dest) and read_manifest(dest).made.get("plan") == plan.digest:
        clean_up(dest)  # a job killed after its manifest leaves its parts
        print(f"{dest}: already finished, nothing to do")
        return 0
    with naming(dest, "cannot be written"):
        prepare(dest, plan, options)
    mine = range(options.task_id, plan.shards, options.num_tasks)
    todo = [i for i in mine if not options.resume or read_part(dest, i, plan.digest) is None]
    write_shards(
        plan,
        dest,
        todo,
        workers=options.workers,
        on_error=options.on_error,
        finished=sum(plan.starts[i + 1] - plan.starts[i] for i in mine)
        - sum(plan.starts[i + 1] - plan.starts[i] for i in todo),
    )
    if options.num_tasks > 1:
        print(f"{dest}: task {options.task_id} of {options.num_tasks} done; finish with --merge")
        return 0
    return merge(dest)


def finished(dest: Path) -> bool:
    return (dest / MANIFEST).is_file()


def prepare(dest: Path, plan: Plan, options: argparse.Namespace) -> None:
    """Record the plan in DEST, or check that the job under way there follows the same plan."""
    if finished(dest):
        raise ToolError(
            f"{dest}: holds shards of another source or of other options; remove it or give "
            "another folder"
        )
    if dest.resolve().is_relative_to(options.source.resolve()):
        raise ToolError(f"{dest}: lies inside {options.source} and would become part of it")
    # Tasks of an array start together: a plan is always there before the first tar.
    has_tars = dest.is_dir() and any(dest.glob("*.tar"))
    record = read_plan_record(dest)
    if record is None:
        if has_tars:
            raise ToolError(f"{dest}: already holds tars that this job did not write")
        (dest / PARTS).mkdir(parents=True, exist_ok=True)
        content = plan_record(plan, options.source.name)
        write_atomic(dest / PARTS / PLAN, json.dumps(content).encode())
    elif record["digest"] != plan.digest:
        raise ToolError(
            f"{dest}: an unfinished job lies here, of another source or other options; finish it "
            "with the same options and --resume, or remove the folder"
        )
    elif not options.resume and options.num_tasks == 1:
        raise ToolError(f"{dest}: has an unfinished job; resume it with --resume")
    if options.num_tasks == 1:
        remove_leftovers(dest)


def merge(dest: Path) -> int:
    """Write the manifest from the finished parts and say what was made."""
    if finished(dest):
        clean_up(dest)
        print(f"{dest}: already merged, nothing to do")
        return 0
    with naming(dest, "cannot be written"):
        manifest = merge_parts(dest)
    size = sum(shard.bytes for shard in manifest.shards)
    counts = ", ".join(f"{n} {what}" for what, n in manifest.made["report"].items() if n)
    print(
        f"{dest}: {manifest.samples} images of {len(manifest.classes)} classes in "
        f"{len(manifest.shards)} shards, {size / 1e6:.1f} MB"
        + (f"; {counts} (see {dest / 'report.jsonl'})" if counts else "")
    )
    return 0


def settings_of(options: argparse.Namespace) -> Settings:
    """Check the options and gather those that decide the bytes."""
    limits = {"--resize-shorter": options.resize_shorter, "--max-side": options.max_side}
    for flag, value in limits.items():
        if value is not None and value < 1:
            raise ToolError(f"{flag} must be at least 1 pixel, not {value}")
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise ToolError(f"--quality must lie between 1 and 100, not {options.quality}")
    if options.shard_size < 1 << 10 or options.workers < 1 or options.seed < 0:
        raise ToolError("--shard-size must be at least 1KiB, --workers at least 1, --seed 0 or up")
    if not 0 <= options.task_id < options.num_tasks:
        raise ToolError(
            f"--task-id must lie between 0 and --num-tasks - 1 = {options.num_tasks - 1}, "
            f"not {options.task_id}"
        )
    if not options.name or set(options.name) & set("/.\0"):
        raise ToolError(f"--name must be a plain word without dots, not {options.name!r}")
    conversion = Conversion(options.gray16, options.alpha)
    image = ImageSettings(
        options.resize_shorter, options.max_side, options.quality, options.check, conversion
    )
    return Settings(options.name, options.seed, options.shard_size, image)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Turn images into WebDataset shards with a manifest.",
        epilog="On a Slurm array: --num-tasks N --task-id $SLURM_ARRAY_TASK_ID in every task "
        "(add --resume to requeue), then once --merge.",
        formatter_class=HelpFormatter,
    )
    a = p.add_argument
    a("source", type=Path, metavar="SOURCE", help="ImageFolder tree, ImageNet tar, CSV or JSONL")
    a("dest", type=Path, metavar="DEST", help="folder for the shards")
    a("--name", default="shard", help="shards are called NAME-000000.tar")
    a("--shard-size", type=byte_size, default="256MiB", help="bytes per shard, at most")
    a("--seed", type=int, default=0, help="seed of the shuffle")
    a("--workers", type=int, default=cores(), help="processes")
    a(
        "--resume",
        action="store_true",
        help="resume an unfinished job; do nothing for a finished one",
    )
    a("--on-error", choices=("fail", "skip"), default="fail", help="images that cannot be used")
    a("--check", choices=("decode", "headers"), default="decode", help="how each image is tested")
    a("--resize-shorter", type=int, metavar="PX", help="shrink to this shorter side")
    a("--max-side", type=int, metavar="PX", help="shrink to this longer side")
    a("--quality", type=int, metavar="Q", help="re-encode every image as JPEG of quality Q")
    a("--gray16", choices=("full", "fit"), help="scale more than 8 bits: by full or own range")
    a("--alpha", choices=("drop", "white", "black"), help="what shows where pixels are transparent")
    a("--classes-from", type=Path, metavar="PATH", help="class order: a shard folder or a list")
    a("--synsets", type=Path, metavar="FILE", help="labels of a flat tar (val): synset per line")
    a("--devkit", type=Path, metavar="PATH", help="labels of a flat tar: ILSVRC2012_devkit_t12")
    a("--root", type=Path, metavar="DIR", help="where relative paths of a CSV or JSONL start")
    a("--num-tasks", type=int, default=1, metavar="N", help="split the job over N tasks")
    a("--task-id", type=int, default=0, metavar="I", help="this task, from 0")
    a("--merge", action="store_true", help="write the manifest once all tasks are done")
    return p


def main(arguments: list[str] | None = None) -> int:
    return run(make_shards, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())

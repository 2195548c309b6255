"""One sharding job in one folder: look at what is there, write this task's shards, merge."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.errors import UserError, naming
from shard_tools.atomic import check_writable, write_atomic
from shard_tools.cli import ToolError, counted, images_of
from shard_tools.manifest import MANIFEST, read_manifest
from shard_tools.sharding.archives import UNPACKED
from shard_tools.sharding.items import file_times, modified_at
from shard_tools.sharding.layout import (
    PARTS,
    PLAN,
    Plan,
    plan_record,
    read_part,
    read_plan_record,
    shard_name,
)
from shard_tools.sharding.merge import clean_up, merge_parts, remove_leftovers
from shard_tools.sharding.plan_file import PLAN_FILE, StoredPlan, read_plan, write_plan
from shard_tools.sharding.writer import write_shards

_LOCK = "job.lock"  # in PARTS, held while a job is at work
_THREADS = 8  # that look at the sources of finished shards


@dataclass(frozen=True)
class Execution:
    """How a job runs; nothing of this changes what it writes, but for images that cannot be used:
    on_error "fail" stops at the first, "skip" leaves them out and reports them.

    This is task `task` of `tasks`; workers: processes, 0 = this one.
    """

    workers: int = 1
    on_error: str = "fail"
    resume: bool = False
    tasks: int = 1
    task: int = 0


def is_finished(dest: Path) -> bool:
    """True where a job has written its manifest."""
    return (dest / MANIFEST).is_file()


def check_destination(dest: Path, sources: list[Path], how: Execution) -> None:
    """Before anything is listed: `dest` can be written, is no part of what is read, and is not
    finished."""
    if is_finished(dest) and not how.resume:
        raise ToolError(f"{dest}: already holds shards; give another folder or --resume")
    for source in sources:
        if Path(os.path.realpath(dest)).is_relative_to(os.path.realpath(source)):
            raise ToolError(f"{dest}: is inside {source} and would become part of it")
    check_writable(dest, folder=True)


def check_plan(dest: Path, plan: Plan, how: Execution) -> bool:
    """Compare the plan with what is in `dest`; True where it is finished already."""
    if is_finished(dest):
        if read_manifest(dest).made.get("plan") == plan.digest:
            return True
        raise ToolError(
            f"{dest}: holds shards of another source or of other options; remove it or give "
            "another folder"
        )
    record = read_plan_record(dest)
    if record is None:
        # Tasks of an array start together: a plan is always there before the first tar.
        if dest.is_dir() and any(dest.glob("*.tar")):
            raise ToolError(f"{dest}: already holds tars that this job did not write")
    elif record["digest"] != plan.digest:
        raise ToolError(
            f"{dest}: has an unfinished job, of another source or other options; finish it "
            "with the same options and --resume, or remove the folder"
        )
    elif not how.resume and how.tasks == 1:
        raise ToolError(f"{dest}: has an unfinished job; resume it with --resume")
    return False


def check_room(dest: Path, plan: Plan) -> None:
    """ToolError where the JPEGs that are copied as they are would not fit on the disk of `dest`.
    Nothing is known of images that are encoded again; tars that are there count as written."""
    with naming(dest, "cannot be read"):
        size = plan.copied - sum(path.stat().st_size for path in dest.glob("*.tar"))
        there = next(folder for folder in (dest, *dest.absolute().parents) if folder.is_dir())
        disk = shutil.disk_usage(there)
    if disk.total and size > disk.free:  # some file systems of clouds say 0
        raise ToolError(
            f"{dest}: the shards take {size / 1e9:.2f} GB more, but {disk.free / 1e9:.2f} GB are "
            "free; make room, or choose another folder"
        )


def is_made_by(dest: Path, note: Mapping[str, Any]) -> bool:
    """Whether the shards in `dest` are finished, and this was noted when their plan was stored."""
    return is_finished(dest) and note.items() <= read_manifest(dest).made.items()


def store_plan(
    dest: Path, plan: Plan, source_name: str, how: Execution, request: str,
    note: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the plan, which `check_plan` has seen, for this process's workers and for other tasks;
    nothing where it is there already or all is finished. A job of one task that is resumed writes
    it again: its source may have moved. note: for the manifest, see `is_made_by`."""
    if is_finished(dest):
        return
    with naming(dest, "cannot be written"):
        there = read_plan_record(dest) is not None and (dest / PARTS / PLAN_FILE).is_file()
        if how.tasks == 1 or not there:
            (dest / PARTS).mkdir(parents=True, exist_ok=True)
            write_plan(dest, plan)
            record = json.dumps(plan_record(plan, source_name, request, note))
            write_atomic(dest / PARTS / PLAN, record.encode())


@contextmanager
def at_work(folders: Sequence[Path], how: Execution) -> Iterator[None]:
    """Holds the folders that are to be written; ToolError where another call is at work in one. The
    tasks of an array are at work together. Where the file system has no locks nothing is held."""
    with ExitStack() as held:
        for folder in folders:
            if not is_finished(folder):
                held.enter_context(_locked(folder, alone=how.tasks == 1))
        yield


@contextmanager
def _locked(dest: Path, alone: bool) -> Iterator[None]:
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with naming(dest, "cannot be written"):
        (dest / PARTS).mkdir(parents=True, exist_ok=True)
        file = open(dest / PARTS / _LOCK, "a+")  # noqa: SIM115 (closed below)
    try:
        # Not flock: worker processes would inherit it and hold it for a while after a kill.
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise ToolError(
                f"{dest}: another make_shards.py is at work there; wait until it ends, or stop it"
            ) from None
    try:
        yield
    finally:
        file.close()
        with suppress(OSError):  # it holds a job, or is gone
            (dest / PARTS).rmdir()


@contextmanager
def planning(dest: Path, how: Execution) -> Iterator[None]:
    """One of several tasks plans at a time, so that those that wait find its plan. Where the file
    system has no locks each plans for itself."""
    if how.tasks == 1 or is_finished(dest):
        yield
        return
    with naming(dest, "cannot be written"):
        (dest / PARTS).mkdir(parents=True, exist_ok=True)
    lock = FileLock(dest / PARTS / "plan.lock")
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def find_plan(dest: Path, request: str, how: Execution) -> bool:
    """True where another task of the same call has planned `dest`."""
    record = read_plan_record(dest) if how.tasks > 1 else None
    return (
        record is not None
        and record.get("request") == request
        and (how.on_error == "skip" or not record["missing"])
        and (dest / PARTS / PLAN_FILE).is_file()
    )


def run_job(dest: Path, how: Execution) -> None:
    """Write this task's shards of the plan; merge where no other task is at work."""
    if is_finished(dest):
        clean_up(dest)  # a job killed after its manifest leaves its parts
        print(f"{dest}: already finished, nothing to do")
        return
    with naming(dest, "cannot be written"):
        plan = read_plan(dest)
        if how.tasks == 1:
            remove_leftovers(dest)
    mine = range(how.task, plan.shards, how.tasks)
    todo = _unfinished(dest, plan, mine) if how.resume else list(mine)
    images = {i: plan.starts[i + 1] - plan.starts[i] for i in mine}
    try:
        write_shards(
            plan,
            dest,
            todo,
            workers=how.workers,
            on_error=how.on_error,
            finished=sum(images[i] for i in mine) - sum(images[i] for i in todo),
        )
    except UserError:
        # Nothing is finished: the next call may have other options, such as the sentence advises.
        if how.tasks == 1 and not any((dest / PARTS).glob("[0-9]*.json")):
            (dest / PARTS / PLAN).unlink(missing_ok=True)
            (dest / PARTS / PLAN_FILE).unlink(missing_ok=True)
        raise
    if how.tasks > 1:
        print(f"{dest}: task {how.task} of {how.tasks} done; finish with --merge")
    else:
        merge(dest)


def _unfinished(dest: Path, plan: StoredPlan, numbers: Sequence[int]) -> list[int]:
    """The shards of a job that is resumed which are still to be written; those of which a source
    file was modified since are among them, or its old content would stay beside the new."""

    def state(number: int) -> str:
        part = read_part(dest, number, plan.digest)
        if part is None:
            return "unfinished"
        now = file_times(plan.root, plan.items(number)) if part.times else ""
        return "finished" if part.times == now else "changed"

    with ThreadPoolExecutor(_THREADS) as threads:  # a network file system answers many at a time
        states = dict(zip(numbers, threads.map(state, numbers), strict=True))
    if changed := [number for number, found in states.items() if found == "changed"]:
        print(
            f"{dest}: {counted(len(changed), 'finished shard')} of images whose files were "
            "modified since, to be written again",
            flush=True,
        )
    return [number for number, found in states.items() if found != "finished"]


def say_modified(dest: Path, plan: Plan) -> None:
    """Of a finished folder: a sentence where files were modified or replaced after their shard was
    written. An equal plan has files of equal names and sizes, and nothing is read again here."""
    names, rows = {shard.name for shard in read_manifest(dest).shards}, plan.order
    root, items = plan.source.root, plan.source.items

    def modified(number: int) -> bool:
        name = shard_name(plan.settings, number)
        written = (dest / (name if name in names else MANIFEST)).stat().st_mtime_ns
        files = {items[row].file for row in rows[slice(*plan.starts[number : number + 2])].tolist()}
        placed = {file: Path(file).parent.name != UNPACKED for file in files}  # else, just now
        return any(modified_at(root, file, placed=placed[file]) > written for file in files)

    with naming(dest, "cannot be read"), ThreadPoolExecutor(_THREADS) as threads:
        changed = sum(threads.map(modified, range(plan.shards)))
    if changed:
        print(
            f"{dest}: image files of {counted(changed, 'finished shard')} were modified, "
            "replaced or moved since, and it has what they held before; remove the folder to write "
            "it again",
            flush=True,
        )


def merge(dest: Path) -> None:
    """Write the manifest from the finished parts and say what was made."""
    if is_finished(dest):
        clean_up(dest)
        print(f"{dest}: already merged, nothing to do")
        return
    with naming(dest, "cannot be written"):
        manifest = merge_parts(dest)
    size = sum(shard.bytes for shard in manifest.shards)
    counts = ", ".join(f"{n} {what}" for what, n in manifest.made["report"].items() if n)
    print(
        f"{dest}: {images_of(manifest.samples, len(manifest.classes))} in "
        f"{counted(len(manifest.shards), 'shard')}, {size / 1e6:.1f} MB"
        + (f"; {counts} (see {dest / 'report.jsonl'})" if counts else "")
        + _markers(manifest.made.get("restart_markers"))
    )


def _markers(made: dict[str, Any] | None) -> str:
    """The end of the sentence: in how many images restart markers are, and why not in others."""
    if made is None:
        return ""
    left = ", ".join(f"{n} {reason}" for reason, n in made["left"].items())
    return f"; restart markers in {made['images']}" + (f" ({left})" if left else "")

"""Write planned shards in worker processes."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.checks import CheckedImage, ImageFault, ImageSettings, check_image
from shard_tools.console import ToolError, progress
from shard_tools.manifest import FORMATS, SAMPLE, Shard, sync_folder
from shard_tools.plan import Part, Plan, shard_items, write_part
from shard_tools.sources import Item, read_item
from shard_tools.tarfmt import ShardWriter

_PR_SET_PDEATHSIG = 1
_EVERY = 16  # images between two looks at the order to stop

# Set in each worker: shared counts of images and bytes, and the order to stop.
_state: dict[str, Any] = {}


@dataclass(frozen=True)
class Job:
    """One shard to write; `first` is the number of its first image in the plan."""

    number: int
    name: str
    first: int
    items: list[Item]
    root: str
    classes: tuple[str, ...]
    settings: ImageSettings
    on_error: str
    dest: Path
    digest: str


class Stop(Exception):
    """The order to stop reached a worker."""


def write_shards(
    plan: Plan, dest: Path, numbers: Sequence[int], *, workers: int, on_error: str, finished: int
) -> None:
    """Write the shards `numbers` of the plan into `dest`; `finished` images were there before."""
    context = multiprocessing.get_context("spawn")
    counts, stop = context.Array("q", 2), context.Event()
    jobs = [
        Job(
            number,
            plan.shard_name(number),
            plan.starts[number],
            shard_items(plan, number),
            plan.source.root,
            plan.source.classes,
            plan.settings.image,
            on_error,
            dest,
            plan.digest,
        )
        for number in numbers
    ]
    total = finished + sum(len(job.items) for job in jobs)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (counts, stop))
    with progress(total, f"shards in {dest}", initial=finished) as bar:
        try:
            running: set[Future[None]] = {pool.submit(_run, job) for job in jobs}
            while running:
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                bar.update(finished + counts[0] - bar.n)
                rate = counts[1] / 1e6 / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise ToolError("a worker process died (out of memory?); go on with --resume") from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(counts: Any, stop: Any) -> None:
    """Signals are the parent's business; a worker dies with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _state.update(counts=counts, stop=stop)


def _run(job: Job) -> None:
    """Write one shard, then the part that says so."""
    write_part(job.dest, job.number, job.digest, write_shard(job))


def write_shard(job: Job) -> Part:
    """Write one shard under a temporary name, fsync, rename. Raises ToolError at the first image
    that cannot be used, where job.on_error is "fail"."""
    partial = job.dest / f".{job.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    rows = np.zeros(len(job.items), SAMPLE)
    names: list[str] = []
    report: list[tuple[str, str, str]] = []
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        writer = ShardWriter(handle)
        for index, item in enumerate(job.items):
            _report(index, item.size)
            try:
                image = check_image(read_item(job.root, item), job.settings)
            except ImageFault as fault:
                if job.on_error == "fail":
                    place = f"{job.root}/{item.name}"
                    raise ToolError(f"{place}: {fault}; --on-error skip leaves it out") from None
                report.append((item.name, "skipped", str(fault)))
                continue
            if image.converted:
                report.append((item.name, "converted", image.converted))
            if image.damage:
                report.append((item.name, "damaged", image.damage))
            offsets = writer.write(f"{job.first + index:09d}", fields_of(job, item, image))
            rows[len(names)] = row_of(item, image, offsets["jpg"])
            names.append(item.name)
        digest = writer.close()
        os.fsync(handle)
        if not names:
            return Part(None, rows[:0], names, report)
        os.replace(partial, job.dest / job.name)
        sync_folder(job.dest)
        shard = Shard(job.name, len(names), writer.bytes, digest)
        return Part(shard, rows[: len(names)], names, report)
    finally:
        os.close(handle)
        partial.unlink(missing_ok=True)


def fields_of(job: Job, item: Item, image: CheckedImage) -> dict[str, bytes]:
    """The fields of one sample."""
    about: dict[str, Any] = {"name": item.name, "width": image.width, "height": image.height}
    fields = {"jpg": image.data}
    if item.label >= 0:
        fields["cls"] = b"%d" % item.label
        about["synset"] = job.classes[item.label]
    if image.orientation != 1:
        about["orientation"] = image.orientation
    if image.converted:
        about["converted"] = image.converted
    fields["json"] = json.dumps(about, sort_keys=True, ensure_ascii=False).encode()
    return fields


def row_of(item: Item, image: CheckedImage, offset: int) -> tuple[int, ...]:
    """The SAMPLE row of one sample."""
    kind = FORMATS.index("jpeg")
    place = (offset, len(image.data), item.label)
    return (*place, image.width, image.height, image.orientation, kind, 0)


def _report(index: int, size: int) -> None:
    """Count an image for the progress bar; obey the order to stop, now and then."""
    if not _state:
        return
    with _state["counts"].get_lock():
        _state["counts"][0] += 1
        _state["counts"][1] += size
    if index % _EVERY == 0 and _state["stop"].is_set():
        raise Stop

"""What a run logs: progress line, log.txt, metrics.jsonl, pictures, trackers like TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torch import Tensor

from pipeline.distributed import mean_over_ranks
from pipeline.progress import Pace, StatusLine, clock, fit, write_above
from pipeline.progress import speed as images_per_second
from pipeline.runtime.mfu import Mfu
from pipeline.runtime.trackers import Trackers, step_of


def memory_gb(device: torch.device) -> float:
    """The most memory used so far in 10^9 bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class NewestLoss:
    """The loss of this rank's newest step, read without waiting for the device: from a GPU it is
    copied while the next step is prepared, and shown then."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._value = math.nan
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def add(self, loss: Tensor) -> None:
        """A micro-batch's share of the step's loss."""
        self._sum = loss if self._sum is None else self._sum + loss

    def step(self) -> float:
        """The step has ended; the newest loss that is known, at first none (nan)."""
        loss, self._sum = self._sum, None
        if loss is not None and not loss.is_cuda:
            self._value = loss.item()
        elif loss is not None:
            if self._host is not None and self._copied is not None and self._copied.query():
                self._value = float(self._host)
                self._copied = None
            if self._copied is None:
                self._host = torch.empty((), pin_memory=True) if self._host is None else self._host
                self._host.copy_(loss, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
        return self._value


class Monitor:
    """Collects losses without synchronising and reports every `log_steps` steps.

    Losses stay on the device between reports; a report averages them over steps and ranks.
    Only rank 0 writes; every rank must call `step`, since a report is collective.
    """

    def __init__(
        self, output: Path, *, rank: int, first: int, total: int, images: int, log_steps: int,
        trackers: Trackers, sizes: tuple[tuple[int, int], ...] = (),
    ) -> None:  # fmt: skip
        """sizes: of the images, see schedules.size_steps."""
        self.rank, self.total, self.images, self.log_steps = rank, total, images, log_steps
        self.output, self.first = output, first
        self.mfu: Mfu | None = None
        self.sizes, self._side = sizes, 0
        self._sides: Counter[int] = Counter()  # of the steps since the last report
        self._sums: dict[str, Tensor] = {}
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._pace, self._newest = Pace(self._since), NewestLoss()
        self._files: list[TextIO] = []
        self._trackers = trackers
        if rank:
            return
        output.mkdir(parents=True, exist_ok=True)
        self._unwritable = False
        _keep_rows(output / "metrics.jsonl", first)
        _keep_pictures(output / "pictures", first)
        self._open_files()
        # Only where somebody watches; plain lines elsewhere.
        self._line = StatusLine()

    def _open_files(self) -> None:
        self._log, self._metrics = (
            # As long as the run is; a path that is no UTF-8 is written with escapes.
            open(self.output / name, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            for name in ("log.txt", "metrics.jsonl")
        )
        self._files = [self._log, self._metrics]

    def reopen(self) -> None:
        """Write log.txt and metrics.jsonl in a folder that was removed or moved (rank 0)."""
        if self.rank == 0:
            self._close_files()
            with self._tolerating_full_disk():
                self._open_files()

    def say(self, text: str) -> None:
        """Write a line to the terminal and log.txt (rank 0)."""
        if self.rank:
            return
        write_above(text)
        self._write(self._log, time.strftime("%Y-%m-%d %H:%M:%S ") + text)

    def _write(self, file: TextIO, line: str) -> None:
        with self._tolerating_full_disk():
            file.write(line + "\n")
            file.flush()

    @contextlib.contextmanager
    def _tolerating_full_disk(self) -> Iterator[None]:
        """Errors of writing inside (a full disk) are warned about once and do not end the run."""
        try:
            yield
        except OSError as error:
            if not self._unwritable:
                print(f"warning: {self.output}: logs are incomplete: {error}", flush=True)
            self._unwritable = True

    def set_image_size(self, side: int) -> None:
        """Set the side of the next step's images."""
        self._side = side

    def waited(self, seconds: float) -> None:
        """Count seconds that the device waited for data."""
        self._waited += seconds

    def add(self, loss: Tensor, terms: dict[str, Tensor], share: float) -> None:
        """Add the losses of a micro-batch, weighted by its share of the step."""
        for name, value in ({"loss": loss} | terms).items():
            value = value.detach().float() * share
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if self.rank == 0 and self._line.shown:
            self._newest.add(loss.detach().float() * share)

    def step(self, step: int, values: dict[str, Any], device: torch.device) -> dict[str, float]:
        """Count a finished step (0-based); at a log interval `report`.

        The first and the last step are reported too: a long step should not look like a hang.
        """
        self._steps += 1
        self._sides[self._side] += bool(self.sizes)
        now = time.perf_counter()
        self._pace.step(now)
        if self.rank == 0 and self._line.shown:
            loss, speed = self._newest.step(), self.images / max(self._pace.seconds, 1e-9)
            self._line.draw(self._parts(step + 1, loss, speed))
        if (step + 1) % self.log_steps and step + 1 != self.total and step != self.first:
            return {}
        return self.report(step, values, device)

    def report(self, step: int, values: dict[str, Any], device: torch.device) -> dict[str, float]:
        """Log and return the means over the steps since the last report, if any (collective).

        Called before a checkpoint too: a run that resumes from it knows nothing of these steps.
        `values`: floats or functions without arguments, read only here.
        """
        if not self._steps:
            return {}
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name] for name in names]) / self._steps
        means = dict(zip(names, mean_over_ranks(stacked).tolist(), strict=True))
        now = time.perf_counter()
        seconds = now - self._since
        row: dict[str, float] = {"step": step + 1, **means}
        row |= {name: float(v() if callable(v) else v) for name, v in values.items()}
        row |= {
            "images_per_second": self.images * self._steps / seconds,
            "data_wait": self._waited / seconds,
            "memory_gb": memory_gb(device),
        }
        self._sums, self._steps, self._waited, self._since = {}, 0, 0.0, now
        if self.rank == 0:
            self._report(row)
        self._sides.clear()
        return row

    def _utilisation(self, images_per_second: float) -> float | None:
        """The MFU at this speed, None if not known; a problem with counting it is logged once."""
        if self.mfu is None:
            return None
        share = self.mfu.of(images_per_second, self._sides)
        if self.mfu.problem:
            problem, self.mfu = self.mfu.problem, None
            self.say(problem)
        return share

    def _parts(self, step: int, loss: float, speed: float) -> list[tuple[int, str]]:
        """The parts of the progress line for `fit`, each with its rank: 0 is left out last."""
        mfu = self._utilisation(speed)
        return [
            (0, f"step {step}/{self.total}"),
            (0, f"loss {loss:#.4g}"),
            (1, images_per_second(speed)),
            (3, "" if mfu is None else f"MFU {mfu:.1%}"),
            (2, f"ETA {clock(self._pace.left(self._left(step)))}"),
        ]

    def _left(self, step: int) -> float:
        """Steps left after `step`, in steps of the present image size: those of another size count
        by their pixels."""
        left, before = 0.0, step
        for until, side in self.sizes or ((self.total, 1),):
            here = max(min(until, self.total) - before, 0)
            left += here * (side / (self._side or side)) ** 2
            before = max(before, until)
        return left

    def _report(self, row: dict[str, float]) -> None:
        step = int(row["step"])
        mfu = self._utilisation(row["images_per_second"])
        if mfu is not None:
            row["mfu"] = mfu
        finite = {k: v for k, v in row.items() if math.isfinite(v)}
        self._write(self._metrics, json.dumps(finite))
        self._trackers.scalars({_group(k): v for k, v in finite.items() if k != "step"}, step)
        parts = self._parts(step, row["loss"], row["images_per_second"])
        parts += [
            (4, f"{name} {row[name]:.0f}")
            for name in ("bad_samples", "nonfinite_steps")
            if row.get(name)
        ]
        parts += [
            (5, f"wait {row['data_wait']:.0%}"),
            (6, f"lr {row['lr']:.2e}"),
            (7, f"epoch {row['epoch']:.2f}"),
        ]
        if not self._line.shown:
            write_above(fit(parts))
        line = "  ".join(text for _, text in parts if text)
        self._write(self._log, time.strftime("%Y-%m-%d %H:%M:%S ") + line)

    def probed(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a probe after `step` steps (rank 0)."""
        if self.rank:
            return
        self._trackers.scalars(values, step)
        self.say(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def picture(self, step: int, grid: Tensor) -> None:
        """Write a uint8 image [H, W, 3] as a PNG and to the trackers (rank 0)."""
        if self.rank:
            return
        pixels = grid.cpu().numpy()
        folder = self.output / "pictures"
        with self._tolerating_full_disk():
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"step-{step:08d}.png")
        self._trackers.picture("pictures/views", pixels, step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training and does not count in the throughput."""
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self._since += taken
            self._pace.pause(taken)

    def close(self) -> None:
        """Flush and close the files."""
        if self.rank == 0:
            self._line.close()
        if self.mfu is not None:
            self.mfu.close()
        self._trackers.close()
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            with self._tolerating_full_disk():
                file.close()


def _keep_rows(path: Path, last: int) -> None:
    """Cut metrics.jsonl after step `last`, from which a resumed run continues."""
    if not path.exists():
        return
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [row for row in rows if step_of(row) <= last]
    if kept != rows:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


def _keep_pictures(folder: Path, last: int) -> None:
    """Remove the pictures of steps after `last`, which are drawn again."""
    for path in folder.glob("step-*.png"):
        if path.stem.removeprefix("step-").isdecimal() and int(path.stem[5:]) > last:
            path.unlink()


def _group(name: str) -> str:
    """TensorBoard tag of a metric."""
    if name in ("images_per_second", "data_wait", "memory_gb", "bad_samples", "mfu"):
        return f"speed/{name}"
    if name in ("feature_std", "teacher_distance", "nonfinite_steps"):
        return f"health/{name}"
    schedule = ("lr", "lr_first_layer", "grad_norm", "ema", "epoch", "image_size")
    return f"optimizer/{name}" if name in schedule else f"loss/{name}"

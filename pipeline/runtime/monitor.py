"""What a person watches: one progress line, log.txt, metrics.jsonl, TensorBoard, pictures."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.distributed import mean_over_ranks


def memory_gb(device: torch.device) -> float:
    """The most memory used so far in 10^9 bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Monitor:
    """Collects losses without synchronising and reports every `log_steps` steps.

    Losses stay on the device between reports; a report averages them over steps and ranks.
    Only rank 0 writes; every rank must call `step`, since a report is collective.
    """

    def __init__(
        self, output: Path, *, rank: int, first: int, total: int, images: int, log_steps: int
    ) -> None:
        self.rank, self.total, self.images, self.log_steps = rank, total, images, log_steps
        self.output, self.first = output, first
        self._sums: dict[str, Tensor] = {}
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._files: list[TextIO] = []
        if rank:
            return
        output.mkdir(parents=True, exist_ok=True)
        self._unwritable = False
        _keep_rows(output / "metrics.jsonl", first)
        _keep_pictures(output / "pictures", first)
        self._log, self._metrics = (
            open(output / name, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
            for name in ("log.txt", "metrics.jsonl")
        )
        self._files = [self._log, self._metrics]
        # Points carry the number of finished steps, so the first that is void is first + 1, also
        # where a run starts again before its first checkpoint.
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first + 1)
        # A progress line only where somebody watches; plain lines elsewhere.
        self._bar = tqdm(
            total=total, initial=first, unit="step", dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def say(self, text: str) -> None:
        """A line on the terminal and in log.txt (rank 0)."""
        if self.rank:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        self._write(self._log, time.strftime("%Y-%m-%d %H:%M:%S ") + text)

    def _write(self, file: TextIO, line: str) -> None:
        with self._spared():
            file.write(line + "\n")
            file.flush()

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        """A full disk costs lines and pictures, warned about once; it does not end the run."""
        try:
            yield
        except OSError as error:
            if not self._unwritable:
                print(f"warning: {self.output}: logs are incomplete: {error}", flush=True)
            self._unwritable = True

    def waited(self, seconds: float) -> None:
        """Time that the device waited for data."""
        self._waited += seconds

    def add(self, loss: Tensor, terms: dict[str, Tensor], share: float) -> None:
        """Losses of a micro-batch, weighted with its share of the step."""
        for name, value in ({"loss": loss} | terms).items():
            value = value.detach().float() * share
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def step(self, step: int, values: dict[str, Any], device: torch.device) -> dict[str, float]:
        """Count a finished step (0-based); at a log interval report and return the means.

        The first and the last step are reported too: a long step should not look like a hang.

        `values`: floats or functions without arguments, read only when reporting.
        """
        self._steps += 1
        if self.rank == 0:
            self._bar.update(1)
        if (step + 1) % self.log_steps and step + 1 != self.total and step != self.first:
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
            self._report(row, seconds)
        return row

    def _report(self, row: dict[str, float], seconds: float) -> None:
        step = int(row["step"])
        finite = {k: v for k, v in row.items() if math.isfinite(v)}
        self._write(self._metrics, json.dumps(finite))
        with self._spared():
            for name, value in finite.items():
                if name != "step":
                    self._board.add_scalar(_group(name), value, step)
        left = (self.total - step) * self.images / row["images_per_second"]
        text = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} images/s"
            f"  wait {row['data_wait']:.0%}  ETA {_clock(left)}"
        )
        for name in ("bad_samples", "nonfinite_steps"):
            if row.get(name):
                text += f"  {name} {row[name]:.0f}"
        line = f"step {step}/{self.total}  epoch {row['epoch']:.2f}  {text}"
        if self._bar.disable:
            print(line, flush=True)
        self._bar.set_description_str(f"epoch {row['epoch']:.2f}", refresh=False)
        self._bar.set_postfix_str(text)
        self._write(self._log, time.strftime("%Y-%m-%d %H:%M:%S ") + line)

    def probed(self, step: int, values: dict[str, float]) -> None:
        """Keep the metrics of a probe after `step` steps in TensorBoard and log.txt (rank 0)."""
        if self.rank:
            return
        with self._spared():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self.say(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def picture(self, step: int, grid: Tensor) -> None:
        """Keep a uint8 image [H, W, 3] as a PNG and in TensorBoard (rank 0)."""
        if self.rank:
            return
        pixels = grid.cpu().numpy()
        folder = self.output / "pictures"
        with self._spared():
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"step-{step:08d}.png")
            self._board.add_image("pictures/views", pixels, step, dataformats="HWC")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work that is not training, whose time must not count in the throughput."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def close(self) -> None:
        """Flush and close the files."""
        if self.rank == 0:
            self._bar.close()
            with self._spared():
                self._board.close()
        for file in self._files:
            with self._spared():
                file.close()


def _keep_rows(path: Path, last: int) -> None:
    """Keep the rows of metrics.jsonl up to step `last`, from which a resumed run continues."""
    if not path.exists():
        return
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [row for row in rows if _step(row) <= last]
    if kept != rows:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


def _keep_pictures(folder: Path, last: int) -> None:
    """Remove the pictures of steps after `last`, which are drawn again."""
    for path in folder.glob("step-*.png"):
        if path.stem.removeprefix("step-").isdecimal() and int(path.stem[5:]) > last:
            path.unlink()


def _step(row: str) -> float:
    """The step of a row; infinite where a kill has cut it."""
    try:
        return int(json.loads(row)["step"]) if row.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _group(name: str) -> str:
    """TensorBoard tag of a metric."""
    if name in ("images_per_second", "data_wait", "memory_gb", "bad_samples"):
        return f"speed/{name}"
    if name in ("feature_std", "teacher_distance", "nonfinite_steps"):
        return f"health/{name}"
    return f"optimizer/{name}" if name in ("lr", "grad_norm", "ema", "epoch") else f"loss/{name}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

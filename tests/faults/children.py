"""The real commands in forked children, which tell where they are and are killed from outside.

torch and DeepSpeed are imported once, here; a child runs the unchanged `main` of pretrain.py,
finetune.py or linprobe.py. Before the kill nothing is touched but a line in a pipe: where it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_overrides

from eval import finetune, linprobe
from eval.shared.command import run_command
from pipeline import pretrain
from pipeline.distributed import free_port
from pipeline.runtime.checkpoint import CheckpointStore
from pipeline.runtime.engine import build_ops
from pipeline.runtime.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds that any child may take


@dataclass
class Config:
    """One tiny pretraining run: 12 steps of 8 images, a checkpoint every 3."""

    recipe: str = "mae"
    stage: int = 0
    micro: int = 8
    workers: int = 0
    ranks: int = 1
    overrides: tuple[str, ...] = ()
    mechanics: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Says what it is in tables."""
        parts = [self.recipe, f"ZeRO {self.stage}"]
        parts += [f"{8 // self.micro // self.ranks} micro-batches"] * (self.micro * self.ranks < 8)
        parts += [f"{self.workers} worker"] * bool(self.workers)
        return ", ".join(parts + [f"{self.ranks} ranks"] * (self.ranks > 1))

    def words(self, data: str | Path, output: Path) -> list[str]:
        """The arguments of pretrain.py."""
        config = output.parent / f"{output.name}.ds.json"
        zero = {"stage": self.stage}
        values = {"train_micro_batch_size_per_gpu": self.micro, "zero_optimization": zero}
        config.write_text(json.dumps(values | self.mechanics))
        words = ["--recipe", str(pretrain.RECIPES / f"{self.recipe}.yaml")]
        words += ["--data", str(data), "--output", str(output), "--ds_config", str(config)]
        settings = (
            *tiny_overrides(self.recipe), "optimizer.epochs=1", "optimizer.warmup_epochs=0.25",
            "optimizer.base_lr=0.02", "monitor.log_steps=1", "monitor.save_steps=3",
            "monitor.picture_steps=6", f"data.workers={self.workers}", *self.overrides,
        )  # fmt: skip
        return [*words, *(w for s in settings for w in ("--set", s))]


def prepare() -> None:
    """Work from the repository's root with one thread, and load the fused ops once."""
    os.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    build_ops()


class Child:
    """A forked process that runs `main`; `log` has what it prints."""

    def __init__(self, main: Callable[[], int], log: Path, env: dict[str, str] | None = None):
        self.log = log
        self._read, write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            _child(main, log, env or {}, write)
        os.close(write)
        self._text, self.code = b"", None

    def reached(self, wanted: str, timeout: float = LIMIT) -> bool:
        """Wait until the child says a phase that begins with `wanted`; False where it ended."""
        end = time.monotonic() + timeout
        while True:
            line, mark, rest = self._text.partition(b"\n")
            if mark:
                self._text = rest
                if line.decode().startswith(wanted):
                    return True
                continue
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError(f"{self.log}: waited in vain for {wanted!r}")
            more = os.read(self._read, 65536)
            if not more:
                return False
            self._text += more

    def signal(self, number: int) -> None:
        """Send a signal to the process (not to its workers)."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = LIMIT) -> int:
        """The exit code (negative: by this signal). TimeoutError kills the child."""
        end = time.monotonic() + timeout
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                os.close(self._read)
            elif time.monotonic() > end:
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"{self.log}: hung")
            else:
                time.sleep(0.01)
        return self.code

    def kill(self, after: float = 0.0) -> int:
        """SIGKILL after some seconds; the exit code."""
        time.sleep(after)
        self.signal(signal.SIGKILL)
        return self.wait()


def _child(main: Callable[[], int], log: Path, env: dict[str, str], pipe: int) -> None:
    code = 70
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ |= env
        _tell_phases(lambda where: os.write(pipe, f"{where}\n".encode()))
        code = main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell_phases(tell: Callable[[str], object]) -> None:
    """Let the watchdog's notes, and the steps of the evaluations, go to the pipe too."""
    note = Watchdog.note

    def told(self: Watchdog, where: str, patience: float = 1) -> None:
        tell(where)
        note(self, where, patience)

    Watchdog.note = told  # type: ignore[method-assign]
    for owner, name in (
        (finetune.Finetuning, "train_step"), (finetune.Finetuning, "validate"),
        (linprobe.Training, "step"), (linprobe, "score"), (CheckpointStore, "save"),
    ):  # fmt: skip
        _wrap(owner, name, tell)


def _wrap(owner: Any, name: str, tell: Callable[[str], object]) -> None:
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        tell(name)
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def pretraining(
    config: Config, data: str | Path, output: Path, prepare: Callable[[], object] | None = None,
    order: tuple[int, ...] | None = None, pause: float = 0.0,
) -> list[Child]:  # fmt: skip
    """Start a run: one child per rank, rank 0 first unless `order` says otherwise."""
    words, port = config.words(data, output), str(free_port())

    def main() -> int:
        if prepare is not None:
            prepare()
        return pretrain.main(words)

    children: dict[int, Child] = {}
    for rank in order or range(config.ranks):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.ranks, "MASTER_PORT": port}
        env |= {"MASTER_ADDR": "127.0.0.1"}
        log = output.parent / f"{output.name}.rank{rank}.log"
        children[rank] = Child(main, log, {k: str(v) for k, v in env.items()})
        time.sleep(pause)
    return [children[rank] for rank in range(config.ranks)]


def evaluation(module: Any, words: list[str], log: Path) -> Child:
    """Start an evaluation on one rank."""

    def main() -> int:
        sys.argv = [module.__name__, *words]
        run_command(module.main)
        return 0

    return Child(main, log)


def run_to_end(config: Config, data: str | Path, output: Path) -> list[int]:
    """Run or go on to the last step; the exit codes."""
    return [child.wait() for child in pretraining(config, data, output)]


def result(output: Path) -> dict[str, bytes]:
    """What a finished run left: every weight, moment and teacher, the encoder, the losses."""
    place = output / "checkpoints" / (output / "checkpoints/latest").read_text().strip()
    files = {p.name: p.read_bytes() for p in place.glob("*.safetensors")}
    files["encoder"] = (output / "encoder/encoder.safetensors").read_bytes()
    files["whole"] = (output / "model.safetensors").read_bytes()
    rows = [json.loads(r) for r in (output / "metrics.jsonl").read_text().splitlines()]
    files["losses"] = json.dumps([[r["step"], r["loss"]] for r in rows]).encode()
    files["step"] = json.dumps(json.loads((place / "state.json").read_text())["step"]).encode()
    return files


def differences(output: Path, reference: dict[str, bytes]) -> str:
    """The names of what is not the undisturbed run's, bit for bit; leftovers too."""
    ours = result(output)
    odd = [k for k in ours.keys() | reference.keys() if ours.get(k) != reference.get(k)]
    odd += [p.name for p in output.rglob(".*") if p.name.startswith(".step") or "tmp" in p.name]
    return ", ".join(sorted(odd))

"""Every other fault that a run must survive or refuse: one function each, `what it does` first.

A function returns what was seen in a few words and fails by AssertionError.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from children import ROOT, Child, Config, differences, pretraining, result, run_to_end
from http_server import Server

from pipeline import pretrain
from pipeline.distributed import free_port
from pipeline.errors import PREEMPTED
from pipeline.runtime.engine import Engine
from pipeline.runtime.watchdog import FAILURE, STUCK


class SkippedError(Exception):
    """A fault that cannot be made here, and why."""


@dataclass
class Place:
    """A folder to work in, the shards, and a config with its undisturbed result."""

    folder: Path
    data: Path
    config: Config
    reference: dict[str, bytes]

    def run(self, data: str | Path | None = None, config: Config | None = None) -> tuple[int, str]:
        """Run or go on to the end in `run`: exit code of rank 0 and the last lines it printed."""
        output = self.folder / "run"
        child = pretraining(config or self.config, data or self.data, output)[0]
        code = child.wait()
        return code, child.log.read_text()

    def same(self) -> None:
        """The run's folder must hold the undisturbed run."""
        code, text = self.run()
        assert code == 0, text[-500:]
        odd = differences(self.folder / "run", self.reference)
        assert not odd, f"differs in {odd}"

    def stopped_at(self, phase: str) -> None:
        """Run until a phase, and kill."""
        child = pretraining(self.config, self.data, self.folder / "run")[0]
        assert child.reached(phase)
        assert child.kill() == -9


def one_line(text: str) -> str:
    """The only error line of an output, which must have no traceback."""
    assert "Traceback" not in text, text[-2000:]
    lines = [line for line in text.splitlines() if line.startswith("error")]
    assert len(lines) == 1, text[-2000:]
    return lines[0]


def damaged(place: Path, kind: str) -> None:
    """Cut the last byte of a file, or flip a bit in its middle."""
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 16 * (kind == "flip")
    place.write_bytes(data[:-1] if kind == "cut" else data)


def copied_shards(place: Place) -> Path:
    """Shards of which every one is read, to be damaged."""
    copy = place.folder / "shards"
    shutil.copytree(place.data, copy)
    return copy


def truncated_shard(place: Place) -> str:
    """the last byte of a shard is cut off"""
    shards = copied_shards(place)
    path = sorted(shards.glob("*.tar"))[1]
    damaged(path, "cut")
    code, text = place.run(shards)
    assert code == 2
    assert path.name in one_line(text)
    return "refused before the first step, exit 2, names the shard"


def flipped_shard(place: Place) -> str:
    """a bit of a shard is flipped, in the first bytes of an image"""
    shards = copied_shards(place)
    path = sorted(shards.glob("*.tar"))[0]
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xd8\xff")] ^= 1
    path.write_bytes(data)
    code, text = place.run(shards)
    assert code == 2
    assert path.name in one_line(text)
    tool = ROOT / "shard_tools/verify_shards.py"
    done = subprocess.run([sys.executable, tool, shards], capture_output=True, text=True)
    assert done.returncode == 1
    assert path.name in done.stdout + done.stderr
    return "exit 2, names shard and sample; verify_shards.py finds any flipped bit"


def vanished_shard(place: Place) -> str:
    """a shard is removed while the run reads it, and put back"""
    shards = copied_shards(place)
    child = pretraining(place.config, shards, place.folder / "run")[0]
    assert child.reached("step 4, forward")
    child.signal(signal.SIGSTOP)
    hidden = [p.rename(p.with_suffix(".away")) for p in sorted(shards.glob("*.tar"))]
    child.signal(signal.SIGCONT)
    code = child.wait()
    for path in hidden:
        path.rename(path.with_suffix(".tar"))
    if code:
        assert code == 2
        assert ".tar" in one_line(child.log.read_text())
    code, text = place.run(shards)
    assert code == 0, text[-500:]
    assert not differences(place.folder / "run", place.reference)
    return "exit 2 with the shard's name where it was not open yet; resumes, bit for bit"


def broken_checkpoint(place: Place) -> str:
    """the newest checkpoint is cut, or a bit of it flipped (one after the other)"""
    for kind in ("cut", "flip"):
        place.stopped_at("step 8, waiting")
        newest = sorted((place.folder / "run/checkpoints").glob("step-*"))[-1]
        assert newest.name == "step-00000006"
        damaged(newest / "exp_avg.safetensors", kind)
        code, text = place.run()
        assert code == 0, text[-500:]
        assert "step-00000006/exp_avg.safetensors" in text
        assert "at step 3 of 12" in text
        assert not differences(place.folder / "run", place.reference)
        shutil.rmtree(place.folder / "run")
    return "named; the one before is taken; ends bit for bit"


def bad_http(place: Place) -> str:
    """shards over HTTP: slow, and every shard's first answer is cut, wrong or 503"""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.put(place.data)
        server.delay = 0.2
        names = sorted(p.name for p in place.data.glob("*.tar"))
        kinds = ("cut", "flip", "busy")
        server.faults = {f"/{name}": [kinds[i % 3]] for i, name in enumerate(names)}
        os.environ["RELAXMIM_CACHE"] = str(place.folder / "cache")
        code, text = place.run(server.url)
        server.stopping.set()
        server.shutdown()
    del os.environ["RELAXMIM_CACHE"]
    assert code == 0, text[-1000:]
    tried = sum(server.counts[f"/{name}"] for name in names)
    assert tried >= 2 * len(names)
    assert not differences(place.folder / "run", place.reference)
    return f"{len(names)} shards in {tried} requests; ends bit for bit"


def sigterm(place: Place) -> str:
    """SIGTERM in the middle of a step"""
    child = pretraining(place.config, place.data, place.folder / "run")[0]
    assert child.reached("step 5, forward")
    child.signal(signal.SIGTERM)
    assert child.wait() == PREEMPTED
    place.same()
    return f"saved at step 5, exit {PREEMPTED}; resumes, bit for bit"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of a few megabytes; needs root."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise SkippedError("needs root, to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all that is left of a disk."""
    path = folder / "filler"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def disk_full(place: Place, policy: str) -> str:
    """Two ranks on a small disk that fills up before the second checkpoint."""
    setting = (f"monitor.on_disk_full={policy}",)
    config = Config(place.config.recipe, 2, micro=4, ranks=2, overrides=setting)
    reference = place.folder / "two"
    assert run_to_end(config, place.data, reference) == [0, 0]
    with small_disk(place.folder / "run", "8m") as output:
        children = pretraining(config, place.data, output)
        assert children[0].reached("step 5, forward")
        children[0].signal(signal.SIGSTOP)
        filler = fill(output)
        children[0].signal(signal.SIGCONT)
        if policy == "continue":
            assert children[0].reached("step 8, forward")
        else:
            codes = [c.wait(60) for c in children]
            assert codes == [2, 2], codes
        filler.unlink()
        kept = sorted(p.name for p in (output / "checkpoints").iterdir())
        assert kept == ["latest", "step-00000003"], kept
        codes = [c.wait(60) for c in children]
        text = children[0].log.read_text()
        word = "error" if policy == "stop" else "warning"
        lines = [x for x in text.splitlines() if x.startswith(word) and "step-00000006" in x]
        assert len(lines) == 1, text[-2000:]
        assert lines[0].count("the disk is full; the last valid checkpoint is step-00000003") == 1
        if policy == "stop":
            codes = run_to_end(config, place.data, output)
        assert codes == [0, 0], text[-1000:]
        theirs, ours = result(reference), result(output)
        for files in (theirs, ours):
            files.pop("losses")  # rows of the log are lost while the disk is full
        assert ours == theirs
    return "one sentence; the last good checkpoint stays, nothing half-written"


def disk_full_stop(place: Place) -> str:
    """the disk is full at a save, two ranks, monitor.on_disk_full: stop"""
    return disk_full(place, "stop") + "; exit 2 on both; resumes, bit for bit"


def disk_full_continue(place: Place) -> str:
    """the disk is full at a save, two ranks, monitor.on_disk_full: continue"""
    return disk_full(place, "continue") + "; the run continues and saves later, bit for bit"


def poisoned(steps: range) -> None:
    """Make the gradients of these steps NaN, from now on in this process."""
    inner, count = Engine.micro_step, [0]

    def micro_step(self, *words):
        count[0] += 1
        last = [p for p in self.module.parameters() if p.requires_grad][-1]
        bad = count[0] in steps
        hook = last.register_hook(lambda g: g * float("nan")) if bad else None
        try:
            return inner(self, *words)
        finally:
            if hook is not None:
                hook.remove()

    Engine.micro_step = micro_step


def nan_once(place: Place) -> str:
    """the gradient of step 5 is NaN"""
    output = place.folder / "run"
    child = pretraining(place.config, place.data, output, lambda: poisoned(range(5, 6)))[0]
    assert child.wait() == 0
    text = (output / "metrics.jsonl").read_text()
    assert '"nonfinite_steps": 1' in text
    assert "NaN" not in text
    from safetensors.torch import load_file

    weights = load_file(output / "model.safetensors")
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    return "step skipped and counted; every weight finite"


def nan_for_ever(place: Place) -> str:
    """every gradient from step 5 on is NaN (optimizer.skip_limit 3)"""
    config = Config(place.config.recipe, overrides=("optimizer.skip_limit=3",))
    child = pretraining(config, place.data, place.folder / "run", lambda: poisoned(range(5, 99)))[0]
    assert child.wait() == 76
    assert "in steps 5 to 7 in a row" in one_line(child.log.read_text())
    return "exit 76, names steps 5 to 7; the last good checkpoint stays"


def clock_jump(place: Place) -> str:
    """time.time() jumps ten years ahead, then a day back"""

    def jump() -> None:
        real, start = time.time, time.time()
        time.time = lambda: real() + (3e8 if int((real() - start) * 4) % 2 else -86400)

    child = pretraining(place.config, place.data, place.folder / "run", jump)[0]
    assert child.wait() == 0
    assert not differences(place.folder / "run", place.reference)
    return "nothing changes: intervals use the monotonic clock, names the step"


TWO = Config("rmae", 1, micro=4, ranks=2)


def two_ranks(place: Place) -> dict[str, bytes]:
    """The undisturbed result of two ranks."""
    output = place.folder / "two"
    assert run_to_end(TWO, place.data, output) == [0, 0]
    return result(output)


def goes_on(place: Place, reference: dict[str, bytes]) -> str:
    """Both ranks go on in `run`; the first lines that rank 0 then prints."""
    log = place.folder / "run.rank0.log"
    log.write_text("")
    assert run_to_end(TWO, place.data, place.folder / "run") == [0, 0]
    assert not differences(place.folder / "run", reference)
    return log.read_text()


def ranks_out_of_order(place: Place) -> str:
    """rank 1 starts five seconds before rank 0"""
    reference = two_ranks(place)
    children = pretraining(TWO, place.data, place.folder / "run", order=(1, 0), pause=5)
    assert [c.wait() for c in children] == [0, 0]
    assert not differences(place.folder / "run", reference)
    return "they wait for each other; bit for bit"


def rank_killed(place: Place) -> str:
    """kill -9 of rank 1 of two"""
    reference = two_ranks(place)
    children = pretraining(TWO, place.data, place.folder / "run")
    assert children[1].reached("step 5, forward")
    children[1].kill()
    begun = time.monotonic()
    code = children[0].wait(60)
    assert code == 1
    took = time.monotonic() - begun
    assert "lost contact with another rank" in one_line(children[0].log.read_text())
    first = goes_on(place, reference).splitlines()[0]
    assert first.startswith("previous run failed: rank 0 on ")
    return f"the other ends with 1 in {took:.0f} s, one line; resumes, bit for bit"


def rank_stuck(place: Place) -> str:
    """rank 1 of two is stopped (SIGSTOP), watchdog_seconds 10"""
    reference = two_ranks(place)
    watched = replace(TWO, mechanics={"watchdog_seconds": 10})
    children = pretraining(watched, place.data, place.folder / "run")
    assert children[1].reached("step 5, forward")
    children[1].signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert children[0].wait(90) == STUCK
    took = time.monotonic() - begun
    text = children[0].log.read_text()
    assert "error: rank 0, step " in text
    assert "no progress for" in text
    assert "most recent call first" in text
    assert "no progress" in (place.folder / "run" / FAILURE).read_text()
    children[1].kill()
    assert "no progress" in goes_on(place, reference).splitlines()[0]
    return f"exit {STUCK} in {took:.0f} s with step, rank and stack; resumes, bit for bit"


def second_run(place: Place) -> str:
    """a second run starts on the folder of a live one"""
    first = pretraining(place.config, place.data, place.folder / "run")[0]
    assert first.reached("step 2, forward")
    first.signal(signal.SIGSTOP)
    words = place.config.words(place.data, place.folder / "run")
    second = Child(lambda: pretrain.main(words), place.folder / "second.log")
    assert second.wait() == 2
    assert f"(process {first.pid} on " in one_line(second.log.read_text())
    first.signal(signal.SIGCONT)
    assert first.wait() == 0
    assert not differences(place.folder / "run", place.reference)
    return "refused, exit 2, names the holder; the first is not disturbed"


def worker_killed(place: Place) -> str:
    """kill -9 of a loader worker, as the kernel does where memory runs out"""
    child = pretraining(place.config, place.data, place.folder / "run")[0]
    assert child.reached("step 5, forward")
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(workers) == place.config.workers
    os.kill(int(workers[0]), signal.SIGKILL)
    begun = time.monotonic()
    assert child.wait(60) == 2
    took = time.monotonic() - begun
    line = one_line(child.log.read_text())
    assert "a loader worker was killed" in line
    assert "images of 16 × 16 pixels" in line
    place.same()
    return f"exit 2 in {took:.0f} s, one line with what to lower; resumes, bit for bit"


def other_data(place: Place) -> str:
    """other shards are given under the same --output"""
    place.stopped_at("step 5, forward")
    code, text = place.run(place.data.parent / "val")
    assert code == 2
    assert "a checkpoint of other data (96 images, now 48)" in one_line(text)
    place.same()
    return "refused before the first step, exit 2, with what differs; resumes, bit for bit"


def port_taken(place: Place) -> str:
    """another process listens on MASTER_PORT"""
    words = place.config.words(place.data, place.folder / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(taken.getsockname()[1])
        child = Child(lambda: pretrain.main(words), place.folder / "run.log", env)
        assert child.wait(60) == 2
    assert f"MASTER_PORT {env['MASTER_PORT']} is taken" in one_line(child.log.read_text())
    return "one line, exit 2"


def waiting_rank(place: Place) -> str:
    """SIGTERM to a rank that waits for the others to start"""
    words = place.config.words(place.data, place.folder / "run")
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    child = Child(lambda: pretrain.main(words), place.folder / "run.log", env)
    for _ in range(600):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", int(env["MASTER_PORT"]))) == 0:
                break
        time.sleep(0.1)
    child.signal(signal.SIGTERM)
    begun = time.monotonic()
    assert child.wait(60) == -signal.SIGTERM
    took = time.monotonic() - begun
    assert took < 5
    return f"ends in {took:.0f} s"


FAULTS = (
    truncated_shard, flipped_shard, vanished_shard, broken_checkpoint, bad_http, sigterm,
    disk_full_stop, disk_full_continue, nan_once, nan_for_ever, clock_jump, second_run,
    ranks_out_of_order, rank_killed, rank_stuck, worker_killed, other_data, port_taken,
    waiting_rank,
)  # fmt: skip
QUICK = (sigterm, nan_for_ever, second_run)

"""Memory that runs out, in the model or in the loader, and workers that are killed: a sentence."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loader_helpers import open_loader
from tiny import tiny_overrides, tiny_recipe

from eval.shared.processes import LAUNCHER
from pipeline.config.planning import plan_recipe
from pipeline.data.crops import Crop
from pipeline.data.worker_faults import worker_fault
from pipeline.errors import UserError
from pipeline.runtime.memory import explaining_memory, out_of_memory

ROOT = Path(__file__).parents[3]


def loader(shards, workers=1):
    return open_loader(
        shards / "train", total_steps=12, micro_batch=8, batch_size=8, partitions=4, window=2,
        crop=Crop(16), workers=workers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGBUS, "/dev/shm is full: 1 workers keep 3 micro-batches of 8 images of 16 × 16"),
        (signal.SIGKILL, "a loader worker was killed .the kernel does so where memory runs out"),
        (signal.SIGSEGV, "a loader worker ended by itself .Segmentation fault"),
    ],
)
@pytest.mark.parametrize("waiting", [True, False], ids=["in next", "in the step"])
def test_a_worker_that_a_signal_ends_is_a_sentence(number, said, waiting, shards):
    """torch raises it in the main process at once, wherever that is: in the model too."""

    def run():
        with batches.explaining():
            for _ in batches:
                os.kill(batches._workers[0].pid, number)
                time.sleep(0 if waiting else 20)

    batches = loader(shards)
    with pytest.raises(UserError, match=said) as error:
        run()
    assert "use fewer workers (data.workers of the recipe, --workers)" in str(error.value)
    assert batches._workers == []


@pytest.mark.parametrize("waiting", [True, False], ids=["in next", "in the step"])
def test_a_worker_that_dies_with_a_lock_holds_nobody_up(waiting, shards):
    """As one does that is killed while it asks whether it shall stop. In next: torch sees it only
    when its batch does not come, since the signal of its end is blocked."""

    def die(worker, lock):
        if os.fork() == 0:
            lock.acquire()
            os._exit(0)
        os.wait()
        os.kill(worker.pid, signal.SIGKILL)

    def run():
        with batches.explaining():
            for number, _ in enumerate(batches):
                if number == 0:
                    die(batches._workers[0], batches._iterator._workers_done_event.event._cond)
                time.sleep(0 if waiting else 20)

    batches = loader(shards, workers=2)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD] if waiting else [])
    before = signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
    signal.alarm(30)
    try:
        with pytest.raises(UserError, match="a loader worker was killed"):
            run()
    finally:
        left = signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert left, "it had to be rung awake"
    assert batches._workers == []


FULL = """
import sys, shutil
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_memory import loader
import pipeline.data.loader as module
from pipeline.errors import UserError
module._check_shared_memory = lambda *_: None  # it was free when the run started
module.Slots = lambda *_: None  # all slots are taken: what does not fit there is in /dev/shm
try:
    for batch in loader(Path(sys.argv[1]), workers=2):
        with open("/dev/shm/other", "ab", buffering=0) as other:
            other.write(bytes(shutil.disk_usage("/dev/shm").free))
except UserError as error:
    print(error)
"""


def test_shared_memory_that_fills_up_is_a_sentence(shards):
    """A real file system of 256 KiB as /dev/shm, filled by another process (root)."""
    mount = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", FULL, shards]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"}
    done = subprocess.run(
        [*command, Path(__file__).parent], capture_output=True, text=True, env=env, timeout=120
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("needs root, for a mount namespace")
    assert done.stdout.startswith("/dev/shm is full: 2 workers keep 6 micro-batches"), done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("received 0 items of ancdata"), "too many files are open: .*ulimit -n"),
        (OSError(24, "Too many open files"), "too many files are open"),
        (MemoryError(), "no memory is left for the loader"),
        (OSError(12, "Cannot allocate memory"), "no memory is left for the loader"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "ended by itself"),
    ],
)
def test_what_else_a_loader_runs_out_of(error, said):
    told = worker_fault(error, 4, 64, 224)
    with pytest.raises(UserError, match=said):
        raise told
    assert "4 workers keep 12 micro-batches of 64 images of 224 × 224" in str(told)
    assert f"{12 * 64 * 224 * 224 * 3 >> 20} MiB" in str(told)


def test_other_errors_stay_what_they_are(shards):
    for error in (RuntimeError("shape mismatch"), OSError(2, "No such file"), ValueError("x")):
        assert worker_fault(error, 4, 64, 224) is None
        assert not out_of_memory(error)
    with pytest.raises(RuntimeError, match="shape"), loader(shards).explaining():
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(
    ("overrides", "config", "world", "said", "unsaid"),
    [
        (["batch_size=64"], {}, 1,
         "micro-batch of 64 images of 16 × 16 pixels: set train_micro_batch_size_per_gpu of the "
         "ds_config to 32 or less (accumulation keeps the batch of 64), set gradient_checkpointing",
         "stage"),
        (["batch_size=16"],
         {"train_micro_batch_size_per_gpu": 1, "gradient_checkpointing": True,
          "zero_optimization": {"stage": 2}},
         2, "micro-batch of 1 images of 16 × 16 pixels: use a zero_optimization.stage above 2, or",
         "gradient_checkpointing"),
    ],
)  # fmt: skip
def test_the_sentence_says_what_can_still_be_lowered(overrides, config, world, said, unsaid):
    recipe = tiny_recipe("mae", *overrides)
    plan = plan_recipe(config, recipe, world)
    with pytest.raises(UserError) as error, explaining_memory(plan, 16):
        torch.empty(2**62 // 4)  # a real allocation that fails
    assert said in str(error.value)
    assert unsaid not in str(error.value)


def test_negatives_are_said_to_shrink_with_the_micro_batch():
    plan = plan_recipe({}, tiny_recipe("cmae"), 1)
    with (
        pytest.raises(UserError, match="negatives come from fewer images"),
        explaining_memory(plan, 16),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("free", "more"), [(1, ", 68.0 by other processes"), (68.5, "")]
)  # GiB, of 80 of which this process has 10
def test_a_gpu_that_others_fill_and_graphs_are_said(free, more, monkeypatch):
    plan = replace(plan_recipe({}, tiny_recipe("mae"), 1), cuda_graphs=True)
    gib = 2**30
    for name, found in {
        "is_available": lambda: True, "current_device": lambda: 0,
        "max_memory_allocated": lambda device: 9.5 * gib,
        "memory_reserved": lambda device: 10 * gib,
        "mem_get_info": lambda device: (free * gib, 80 * gib),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, found)
    with pytest.raises(UserError) as error, explaining_memory(plan, 16):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert f"out of memory on cuda:0 (9.5 of 80.0 GiB were in use{more}) with" in str(error.value)
    assert "set cuda_graphs there to false" in str(error.value)


LIMITED = """
import resource, sys
from pathlib import Path
from pipeline import pretrain
from pipeline.runtime import loop
setup = loop.setup
def limited(*args):
    run = setup(*args)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (8 << 20),) * 2)
    return run
loop.setup = limited
sys.exit(pretrain.main())
"""


def test_a_run_whose_memory_is_too_small_ends_with_the_sentence(shards, tmp_path):
    """The real trainer, and an address space that its micro-batch does not fit in."""
    words = ["--recipe", "mae", "--data", shards / "train", "--output", tmp_path / "run"]
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 64}')
    words += ["--ds_config", tmp_path / "ds.json", "--max-steps", "1"]
    bigger = ("encoder.image_size=128", "batch_size=64")
    for override in (*tiny_overrides("mae"), *bigger):
        words += ["--set", override]
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER}  # ranks of its own
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, words)], capture_output=True, text=True, cwd=ROOT,
        timeout=240, env=clean | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "images of 128 × 128 pixels" in lines[0]
    assert "Traceback" not in done.stderr
    assert "out of memory" in (tmp_path / "run/failure.txt").read_text()


LIMITED_EVALUATION = """
import resource, sys
from pathlib import Path
from eval import finetune, knn
from eval.shared.command import run_command
from eval.shared.session import EvalSession
name, *words = sys.argv[1:]
module = {"finetune": finetune, "knn": knn}[name]
normalise = EvalSession.normalise
def limited(*args):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (8 << 20),) * 2)
    return normalise(*args)
EvalSession.normalise = limited
sys.argv = [f"{name}.py", *words]
run_command(module.main)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("finetune", "with a micro-batch of 64 images of 128 × 128 pixels: set train_micro_batch"),
        ("knn", "out of memory on the CPU: use more ranks (launch.sh), a lower --batch-size"),
    ],
)
def test_an_evaluation_whose_memory_is_too_small_ends_with_the_sentence(
    name, said, shards, tmp_path
):
    words = ["--encoder", "random", "--arch", "vit_tiny_patch16_224", "--workers", "0"]
    words += ["--options", "{img_size: 128}", "--output", tmp_path / "x.json"]
    words += ["--train", shards / "train", "--val", shards / "val"]
    if name == "finetune":
        (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 64}')
        words += ["--batch-size", "64", "--ds_config", tmp_path / "ds.json"]
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_EVALUATION, name, *map(str, words)], capture_output=True,
        text=True, cwd=ROOT, timeout=240, env=clean | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "x.json").exists()

"""DeepSpeed's fused ops: where they go, one build per host, no lock that hangs, no build at all."""

import _json
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import CUDAMismatchException, OpBuilder
from torch.utils.file_baton import FileBaton

from eval.shared.cli import join_ranks
from eval.shared.processes import LAUNCHER
from pipeline import distributed
from pipeline.distributed import cannot_build, device_of, extensions_dir, untried_device
from pipeline.errors import UserError
from pipeline.gpu_errors import no_code
from pipeline.kernels import backend
from pipeline.processor import Processor
from pipeline.runtime import ops
from pipeline.runtime.engine import init_ranks
from pipeline.runtime.optimizers import adamw


class Builder:
    """An op whose `load` compiles as torch 2.11 does: it waits for whatever lock file is there."""

    NAME = name = "fake_op"
    error: Exception | None = None

    def sources(self):
        return [__file__]

    def deepspeed_src_path(self, path):
        return path

    def load(self, verbose):
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"], self.NAME)
        folder.mkdir(exist_ok=True)
        baton = FileBaton(str(folder / "lock"))
        for _ in range(30):
            if baton.try_acquire():
                break
            time.sleep(0.1)
        else:
            raise TimeoutError("hangs")
        if self.error:
            raise self.error  # the lock stays, as after a kill
        if not (folder / "op.so").exists():
            time.sleep(0.5)
            (folder / "op.so").touch()
            with open(folder / "builds", "a") as file:
                file.write("built\n")
        baton.release()


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The folder of the ops, with Builder as the only one."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(ops, "wanted", lambda: ["FakeBuilder"])
    monkeypatch.setattr(ops, "cannot_build", lambda: "")
    monkeypatch.setattr(ops, "_problem", "")
    monkeypatch.setattr(type(get_accelerator()), "create_op_builder", lambda self, name: Builder())
    return extensions_dir()


def test_the_folder_names_what_the_ops_depend_on(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    on_cpu = extensions_dir()
    version = torch.__version__.partition("+")[0]
    assert on_cpu.parent == tmp_path
    assert on_cpu.name.startswith(f"torch{version}-")
    assert f"-{python}-cpu-" in on_cpu.name
    assert f"-cu{torch.version.cuda}-" in on_cpu.name or torch.version.cuda is None
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(on_cpu))  # as a child process inherits it
    assert extensions_dir() == on_cpu
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert extensions_dir().parent == tmp_path
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    monkeypatch.setattr(torch.version, "cuda", "11.0")
    names = {on_cpu.name, extensions_dir().name}
    monkeypatch.setattr(torch, "__version__", "2.7.0+cu110")
    names.add(extensions_dir().name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    names.add(extensions_dir().name)
    assert len(names) == 4


def test_nodes_of_other_gpus_that_share_a_folder_do_not_overwrite_each_others(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    anywhere = extensions_dir()
    found = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: found[number])
    mixed = extensions_dir()
    assert mixed.name == f"{anywhere.name}-sm80-sm90"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(mixed))  # a child process
    assert extensions_dir() == mixed
    found[1] = (9, 0)
    assert extensions_dir().name == f"{anywhere.name}-sm90"
    # What a build node without a GPU has compiled is taken over.
    (anywhere / "op").mkdir(parents=True)
    (anywhere / "op/op.so").touch()
    ops._take_over(mixed, "op")
    assert (mixed / "op/op.so").exists()


def test_a_user_without_a_home_is_no_crash(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert extensions_dir().parent == distributed.own_extensions()


def test_a_stale_lock_does_not_hang(folder):
    (folder / "fake_op").mkdir(parents=True)
    (folder / "fake_op/lock").touch()
    begun = time.monotonic()
    assert ops.prepare() == ["fake_op"]
    assert time.monotonic() - begun < 2
    assert ops.problem() == ""
    assert adamw.describe() == "optimizer: DeepSpeed's fused AdamW"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (CUDAMismatchException(), f"nvcc is of another CUDA than torch's {torch.version.cuda}"),
        (subprocess.CalledProcessError(1, ["c++", "-v"]), "'c++ -v' ended with exit code 1"),
        (RuntimeError("Error building\n[1/2] c++\nx.c:3: error: no\n"), "x.c:3: error: no"),
        (ImportError(), "ImportError"),
    ],
)  # fmt: skip
def test_a_build_that_fails_is_a_sentence_and_torchs_adamw(error, sentence, folder, monkeypatch):
    monkeypatch.setattr(Builder, "error", error)
    assert ops.prepare() == []
    assert ops.problem() == f"fake_op cannot be compiled: {sentence}"
    assert adamw.describe() == (
        f"optimizer: torch's fused AdamW (without DeepSpeed's ops: {ops.problem()})"
    )
    monkeypatch.setattr(Builder, "error", None)
    assert ops.prepare() == []  # of this start, by this rank or another of the host
    monkeypatch.setattr(ops, "STARTED", time.time() + 1)
    assert ops.prepare() == ["fake_op"]  # the next start tries again
    assert not (folder / ops.FAILED).exists()


def test_one_rank_without_ops_is_enough(monkeypatch):
    monkeypatch.setattr(ops, "_problem", "")
    ops.give_up("another rank has none")
    assert ops.problem() == "another rank has none"
    monkeypatch.setattr(ops, "_problem", "there is no ninja")
    ops.give_up("another rank has none")
    assert ops.problem() == "there is no ninja"


def test_ranks_that_start_together_compile_once(folder):
    ranks = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            ok = ops.prepare() == ["fake_op"]
            os._exit(0 if ok else 1)
        ranks.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks] == [0, 0, 0]
    assert (folder / "fake_op/builds").read_text() == "built\n"


def test_a_start_that_waits_for_the_ops_of_another_process_says_so(folder, monkeypatch, capfd):
    folder.mkdir()
    monkeypatch.setattr(ops, "SOON", 0.1)
    hold = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / "ranks.lock")], stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        assert ops.prepare() == ["fake_op"]
    waiting, compiling = capfd.readouterr().err.splitlines()
    assert waiting == f"waiting for another process, which compiles DeepSpeed's ops in {folder}"
    assert compiling == "compiling DeepSpeed's fake_op, once for this machine (minutes)"


def test_what_takes_long_is_not_called_compiling_where_there_is_an_op(folder, monkeypatch, capfd):
    (folder / "fake_op").mkdir(parents=True)
    (folder / "fake_op/op.so").touch()
    monkeypatch.setattr(ops, "SOON", 0.1)
    monkeypatch.setattr(Builder, "load", lambda self, verbose: time.sleep(0.5))
    assert ops.prepare() == ["fake_op"]
    said = "loading DeepSpeed's fake_op (minutes where it must be compiled again)\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_processors_that_share_a_folder_have_ops_of_their_own(accelerator, folder, monkeypatch):
    """torch calls both AVX512, and ninja is given the same command for both."""
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    flags = ["avx2", "avx512f", "fma", "hypervisor"]
    made = []
    for more in ([], ["avx512_bf16"], ["avx512_bf16", "umip"]):
        node = Processor("", frozenset(flags + more))
        monkeypatch.setattr(distributed, "processor", lambda node=node: node)
        assert ops.prepare() == ["fake_op"]
        made.append(extensions_dir() / "fake_op")
    assert made[0] != made[1]
    assert made[1] == made[2]  # what a kernel adds is no instruction
    assert [(path / "builds").read_text() for path in made[:2]] == ["built\n", "built\n"]


@pytest.fixture
def compiled(folder, monkeypatch):
    """The folder of the op of Builder after a start: compiled, and a library that can be loaded."""
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    assert ops.prepare() == ["fake_op"]
    shutil.copy(_json.__file__, folder / "fake_op/fake_op.so")
    return folder / "fake_op"


def again(compiled):
    """How often the op has been compiled or compared by its builder after another start."""
    (compiled / "op.so").unlink(missing_ok=True)
    assert ops.prepare() == ["fake_op"]
    return (compiled / "builds").read_text().count("built")


@pytest.fixture
def library(monkeypatch):
    """Loading of the op's library, which has the name of another module."""
    loaded = []
    real = importlib.util.spec_from_file_location

    def spec(name, path):
        loaded.append(path)
        return real("_json", path)

    monkeypatch.setattr(ops.importlib.util, "spec_from_file_location", spec)
    return loaded


def test_an_op_of_an_earlier_start_is_loaded_and_not_compared(compiled, library):
    assert again(compiled) == 1
    assert library == [compiled / "fake_op.so"]
    assert OpBuilder._loaded_ops["fake_op"].__file__ == str(compiled / "fake_op.so")


def test_an_environment_that_is_reached_by_a_link_has_the_same_ops(
    compiled, library, monkeypatch, tmp_path
):
    (tmp_path / "link").symlink_to(Path(__file__).parent)
    monkeypatch.setattr(
        Builder, "deepspeed_src_path", lambda self, path: tmp_path / "link" / Path(path).name
    )
    assert again(compiled) == 1
    assert library


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("CXX", "g++"),
        lambda patch: patch.setenv("CFLAGS", "-O1"),
        lambda patch: patch.setattr(torch, "__version__", "2.99"),
        lambda patch: patch.setattr(deepspeed, "__version__", "9.9"),
        lambda patch: patch.setattr(ops, "_processor", lambda: ["model name: another"]),
        lambda patch: patch.setattr(Builder, "sources", lambda self: [ops.__file__]),
    ],
)
def test_an_op_made_of_something_else_is_compared(change, compiled, library, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ops, "extensions_dir", lambda: compiled.parent)  # named by torch's version
        change(patch)
        assert again(compiled) == 2
        assert library == []
        assert again(compiled) == 2  # it is of that now


def test_an_op_that_cannot_be_loaded_is_compared(compiled, library):
    (compiled / "fake_op.so").write_bytes(b"cut")
    assert again(compiled) == 2
    assert library
    (compiled / "made_of.json").write_text("{")
    assert again(compiled) == 3


def test_ops_of_a_read_only_environment_are_copied(monkeypatch, folder, tmp_path):
    """As of a container image: set-up compiled them where nothing can be written any more."""
    own = tmp_path / "image" / folder.name / "fake_op"
    own.mkdir(parents=True)
    (own / "op.so").write_bytes(b"of the image")
    monkeypatch.setattr(ops, "own_extensions", lambda: tmp_path / "image")
    monkeypatch.setattr(distributed, "own_extensions", lambda: tmp_path / "image")
    assert distributed.compiled_ops() == ["fake_op"]
    assert ops.prepare() == ["fake_op"]
    assert (folder / "fake_op/op.so").read_bytes() == b"of the image"
    assert not (folder / "fake_op/builds").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(folder, tmp_path):
    folder.touch()
    assert ops.prepare() == []
    assert ops.problem() == f"{folder}: File exists"


START = """
from pipeline.runtime.engine import init_ranks
from pipeline.runtime.optimizers import adamw
init_ranks()
print(adamw.describe())
"""


@pytest.mark.skipif(cannot_build() != "", reason="needs what a build needs")
def test_a_compiler_that_fails_ends_in_torchs_adamw(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER}  # a rank of its own
    env |= {"CXX": "/bin/false", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", START], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = "optimizer: torch's fused AdamW (without DeepSpeed's ops: "
    assert any(line.startswith(said) for line in done.stdout.splitlines())  # gloo may speak first
    assert "/bin/false" in done.stdout
    assert "Traceback" not in done.stderr


def test_rocm_takes_torchs_adamw(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cannot_build() == "they were never tried on ROCm"


def test_gpus_of_others_are_a_line_and_no_crash(monkeypatch):
    assert untried_device() == ""
    monkeypatch.setattr(distributed, "why_no_gpu", lambda torch: "CUDA does not start")
    told = "device: the CPU, though this machine has NVIDIA's driver: CUDA does not start"
    assert untried_device() == told
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(is_available=lambda: True))
    assert untried_device() == "device: the CPU; the Intel GPU (XPU) of this machine is not used"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "AMD GPU (ROCm), which was never tried" in untried_device()
    before = backend.implementation()
    try:
        assert backend.use("auto", "cuda") == "kernels: reference (auto on cuda)"
    finally:
        backend.use(before)


@pytest.mark.parametrize(
    ("gpus", "visible", "count"),
    [
        (1, None, "this host has 1 GPU;"),
        (2, None, "this host has 2 GPUs;"),
        (1, "MIG-5c9a", "CUDA_VISIBLE_DEVICES=MIG-5c9a leaves 1 GPU;"),
    ],
)
def test_a_rank_beyond_the_gpus_is_a_sentence(gpus, visible, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name, value in {"LOCAL_RANK": "2", "RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for join in (join_ranks, init_ranks):  # evaluations, training
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29400")
        with pytest.raises(UserError, match=f"LOCAL_RANK 2: {count}"):
            join()


OF_TORCH = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 0), OF_TORCH, False),
        ((7, 5), OF_TORCH, True),
        ((8, 9), OF_TORCH, True),  # by the code of 8.6
        ((10, 3), OF_TORCH, True),
        ((11, 0), OF_TORCH, False),
        ((13, 0), OF_TORCH, True),  # by PTX
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a", "compute_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["gfx90a"], True),
        ((9, 0), [], True),
    ],
)
def test_a_torch_without_code_for_a_gpu_is_a_sentence(capability, architectures, runs, monkeypatch):
    for name, found in {
        "is_available": lambda: True, "device_count": lambda: 1,
        "get_device_capability": lambda number: capability, "get_device_name": lambda number: "V",
        "get_arch_list": lambda: architectures,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, found)
    assert (no_code(torch, capability) == "") == runs
    if not runs:
        with pytest.raises(UserError, match=r"GPU 0, V: torch \S+ has no code for sm_\d+ \(but "):
            device_of(0)


def test_ranks_of_an_evaluation_that_cannot_meet_are_a_sentence(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # by earlier tests
    with pytest.raises(UserError, match="MASTER_ADDR is not set: with WORLD_SIZE 2"):
        join_ranks()
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(UserError, match="RANK is 'two': must be a number"):
        join_ranks()

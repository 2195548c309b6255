"""What a rank knows of its machine, and what the ranks of a run do together.

The engine makes the process group.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import shutil
import signal
import socket
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError, mute_where_reader_left
from pipeline.gpu_errors import nccl_fault, no_code, why_no_gpu
from pipeline.processor import BF16, processor
from shard_tools.cores import cores
from shard_tools.home import expand_home


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank and world size, the rank within its host, and its device.

    cores: of this host, this rank's share.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    cores: int = field(default_factory=cores)

    @classmethod
    def alone(cls) -> Ranks:
        """A process on its own, on the CPU, which needs no process group."""
        return cls(0, 1, 0, torch.device("cpu"))

    @property
    def first(self) -> bool:
        """True on the rank that prints and writes."""
        return self.rank == 0

    @property
    def pins_memory(self) -> bool:
        """Whether batches are put into page-locked memory, from which a GPU copies on its own."""
        return self.device.type == "cuda"

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor (any shape, same on every rank) over all ranks."""
        if self.world == 1:
            return value
        total = value.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total

    def agree(self, make: Callable[[], Any]) -> Any:
        """The first rank's result of make() on every rank; its UserError too."""
        return make() if self.world == 1 else agree(make)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.world == 1 else any_rank(flag)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor by that of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [n, …] of every rank, in the order of the ranks: [sum of n, …]; n may differ."""
        if self.world == 1:
            return rows
        rows, counts = rows.to(self.device), torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.sum(counts)
        padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in range(self.world)]
        torch.distributed.all_gather(pieces, padded)
        return torch.cat([p[:n] for p, n in zip(pieces, counts.tolist(), strict=True)])


def prepare_deepspeed() -> None:
    """Set what DeepSpeed reads from the environment when it is imported; idempotent."""
    # It chooses its accelerator; without this it warns on every machine without one.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It compiles its fused ops with ninja, which is beside this interpreter in a venv.
    tools = str(Path(sys.executable).parent)
    if not os.environ.get("PATH", "").startswith(tools):
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch)\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def extensions_dir() -> Path:
    """Where compiled ops of this machine go: a folder named by all that they depend on, so that a
    node with GPUs and one without, two kinds of processors (ops are compiled for all instructions
    of one, by a command that is the same on both), or two environments, keep their own.

    In TORCH_EXTENSIONS_DIR, in this virtual environment, or in ~/.cache where that is read-only.
    """
    kind = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        kind = f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"
    kind += f"-{processor().instructions}"
    if "cuda" in kind and torch.cuda.is_available():  # nodes of other GPUs, which share a home
        gpus = range(torch.cuda.device_count())
        found = sorted({torch.cuda.get_device_capability(n) for n in gpus})
        kind += "".join(f"-sm{major}{minor}" for major, minor in found)
    hip, cuda = torch.version.hip, torch.version.cuda
    built_with = f"rocm{hip}" if hip else f"cu{cuda}" if cuda else "nogpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    name = f"torch{torch.__version__.partition('+')[0]}-{built_with}-{python}-{kind}"
    if given := expand_home(os.environ.get("TORCH_EXTENSIONS_DIR", "")):
        root = Path(given)
        # Of a parent process, perhaps on another accelerator.
        return (root.parent if re.match(r"torch\d.*-py\d+-", root.name) else root) / name
    own = own_extensions()
    if sys.prefix != sys.base_prefix and os.access(own if own.exists() else own.parent, os.W_OK):
        return own / name
    try:
        return Path.home() / ".cache" / "torch_extensions" / name
    except RuntimeError:  # a user without a name and a home: it will be said that this is read-only
        return own / name


def own_extensions() -> Path:
    """Where set-up compiles ops: in this environment, which a container image makes read-only."""
    return Path(sys.prefix, "torch_extensions")


def compiled_ops() -> list[str]:
    """The names of the ops that are compiled for runs on this machine."""
    folder = extensions_dir()
    places = (folder, own_extensions() / folder.name)
    return sorted({path.parent.name for place in places for path in place.glob("*/*.so")})


def cannot_build() -> str:
    """Why DeepSpeed's fused ops cannot be compiled here; "" if nothing seems to prevent it.

    A set-up that tried and failed has left torch_extensions/failed in this environment.
    """
    if torch.version.hip:
        return "they were never tried on ROCm"
    if missing := [tool for tool, there in build_tools().items() if not there]:
        return f"there is no {', '.join(missing)}"
    if (own_extensions() / "failed").exists():
        return "set-up could not compile them (make setup tries again)"
    return ""


def build_tools() -> dict[str, bool]:
    """What compiles DeepSpeed's fused ops here, and whether it is there."""
    compiler = (os.environ.get("CXX", "c++").split() or ["CXX (an empty text)"])[0]
    found = {tool: shutil.which(tool) is not None for tool in (compiler, "ninja")}
    if torch.cuda.is_available():
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        places = ("nvcc", os.path.join(home, "bin", "nvcc"))
        found["nvcc"] = any(map(shutil.which, places))
    return found | {"Python.h": Path(sysconfig.get_path("include"), "Python.h").is_file()}


def bf16_units() -> bool:
    """Whether this device multiplies bf16 natively: a GPU since Ampere, a processor of BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(processor().flags & BF16)


def device_of(local_rank: int) -> torch.device:
    """The device of a rank: the GPU numbered like its local rank, or the CPU if torch sees no GPU.

    UserError if this host has too few GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        noun = "GPU" if gpus == 1 else "GPUs"
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        which = "this host has" if seen is None else f"CUDA_VISIBLE_DEVICES={seen} leaves"
        raise UserError(
            f"LOCAL_RANK {local_rank}: {which} {gpus} {noun}; start at most one rank per GPU, and "
            "let each rank see all GPUs of its host, or only its own and set LOCAL_RANK to 0"
        )
    if problem := no_code(torch, torch.cuda.get_device_capability(local_rank)):
        raise UserError(f"GPU {local_rank}, {torch.cuda.get_device_name(local_rank)}: {problem}")
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions: fp32 is fp32 here
    return torch.device("cuda", local_rank)


def untried_device() -> str:
    """A line about a GPU that is not used, or not NVIDIA's, which was never tried; else ""."""
    if torch.version.hip and torch.cuda.is_available():
        return "device: an AMD GPU (ROCm), which was never tried; its kernels are PyTorch's"
    if not torch.cuda.is_available() and hasattr(torch, "xpu") and torch.xpu.is_available():
        return "device: the CPU; the Intel GPU (XPU) of this machine is not used"
    if not torch.cuda.is_available() and (why := why_no_gpu(torch)):
        return f"device: the CPU, though this machine has NVIDIA's driver: {why}"
    return ""


def lost_contact(error: Exception) -> bool:
    """Whether an error says that another rank is gone."""
    backend = isinstance(error, torch.distributed.DistBackendError) and not nccl_fault(error)
    return backend or "gloo" in str(error)


def free_port() -> int:
    """A port of this host that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def cores_per_rank() -> int:
    """This rank's share of its cores, divided by the ranks that may use them (collective).

    Ranks that a launcher has bound to cores of their own share nothing.
    """
    mine = (socket.gethostname(), os.sched_getaffinity(0))
    sharing = sum(host == mine[0] and bool(own & mine[1]) for host, own in from_all(mine))
    return max(1, cores() // sharing)


def from_all(mine: Any) -> list[Any]:
    """What every rank gives here, in the order of the ranks (collective).

    Without a process group this process is alone.
    """
    joined = torch.distributed.is_initialized()
    every: list[Any] = [mine] * (torch.distributed.get_world_size() if joined else 1)
    if len(every) > 1:
        torch.distributed.all_gather_object(every, mine)
    return every


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def unlink_buffer(rank: int) -> None:
    """Take the name from DeepSpeed's buffer of shared memory, once every rank has opened it.

    DeepSpeed never does: 66 MiB of /dev/shm would be lost with every rank and port, until it is
    full. Without its name the buffer lasts as long as the ranks that use it.
    """
    barrier()
    address = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)  # noqa: S108 (where Linux keeps it)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a small tensor over all ranks."""
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values


class StopSignal:
    """Notes SIGTERM, SIGUSR1 (Slurm's preemption), SIGHUP (the terminal or connection is gone) and
    Ctrl-C, so that the current step can be finished and saved. A second Ctrl-C acts as it would
    without this class. SIGHUP and Ctrl-C stay ignored where they are (nohup).

    Made just before the first step. Earlier there is nothing to save, and a process that waits for
    other ranks inside a C call could not run the handler: there the signal simply ends it. Leaving
    the context restores the handler of Ctrl-C.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: object) -> None:
        self.name = self.name or signal.Signals(number).name
        mute_where_reader_left()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before)
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nSIGINT: saves once this step is done; again: ends at once\n")


def stop_with_torchrun() -> None:
    """Get SIGTERM when torchrun dies (SIGUSR1 ends it, as does the kernel where memory runs out);
    its ranks, which have sessions of their own, would train on. launch.sh does this for its ranks;
    a shell that has started ranks in the background may well end before them."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_at_most(seconds: float, *groups: Any) -> None:
    """Let the collectives of these groups (None: of all ranks) wait so long for other ranks."""
    c10d = torch.distributed.distributed_c10d
    change = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # until torch 2.13
    for group in groups:
        change(timedelta(seconds=seconds), group)


_PR_SET_PDEATHSIG = 1
_control: list[Any] = []  # the group for `any_rank`, made once


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank (collective).

    It goes over CPU tensors and gloo, so that asking in every step does not make a GPU wait.
    """
    if torch.distributed.get_world_size() == 1:
        return flag
    if not _control:
        _control.append(torch.distributed.new_group(backend="gloo"))
    value = torch.tensor(int(flag))
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=_control[0])
    return bool(value)


def agree(make: Callable[[], Any]) -> Any:
    """Rank 0's result of make() on every rank; its UserError is raised on every rank.

    Without a process group this process is alone.
    """
    if not torch.distributed.is_initialized():
        return make()
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def close() -> None:
    """Leave the process group, with all that refers to it.

    The threads of a gloo group end with the last reference. One that still drops a tensor while the
    interpreter ends would abort the process ("terminate called without an active exception").
    """
    if not torch.distributed.is_initialized():
        return
    _control.clear()
    if groups := sys.modules.get("deepspeed.utils.groups"):
        vars(groups)["_WORLD_GROUP"] = None
    torch.distributed.destroy_process_group()
    gc.collect()  # engines hold groups, and refer to themselves

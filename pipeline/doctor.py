"""What this machine has for a run, and what each lack costs, on one page.

    python -m pipeline.doctor [--output FOLDER]
    ./launch.sh --check

Exit code 1 only where a run could not start. Looks, and writes one small file into --output, which
it removes; imports torch, and works where it is missing, broken or has no CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pipeline.command import run_main
from pipeline.errors import UserError, reason, refuse
from pipeline.gpu_errors import driver_version, no_code, why_no_gpu
from pipeline.loading import limit_reached
from pipeline.processor import BF16, processor
from pipeline.runtime.output import check_output
from shard_tools.cores import UNLIMITED, cgroup_memory, cgroup_quota, cores
from shard_tools.home import expand_words

GIB = 1 << 30
PACKAGES = (
    "torch", "torchvision", "deepspeed", "timm", "webdataset", "pyyaml", "pydantic", "tensorboard",
    "safetensors", "numpy", "filelock", "tqdm",
)  # fmt: skip
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "glusterfs", "wekafs")
OK, LACK, STOP = "ok", "lack", "STOP"
# What is asked for without a remark; below it a run works and costs more.
LEAST_SHM, LEAST_FILES, LEAST_MEMORY, LEAST_DISK = GIB, 1024, 8 * GIB, 5 * GIB


@dataclass(frozen=True)
class Finding:
    """A line of the page: what, what was found, what the lack of it costs, how bad that is."""

    what: str
    found: str
    cost: str = ""
    grade: str = OK


def ok(what: str, found: str) -> Finding:
    """Nothing lacks."""
    return Finding(what, found)


def lack(what: str, found: str, cost: str) -> Finding:
    """A run works without it, at this cost."""
    return Finding(what, found, cost, LACK)


def stop(what: str, found: str, cost: str) -> Finding:
    """No run can start; the cost says what would be right."""
    return Finding(what, found, cost, STOP)


def unless(fine: bool, what: str, found: str, cost: str) -> Finding:
    """A lack, unless it is fine."""
    return ok(what, found) if fine else lack(what, found, cost)


def python_findings() -> Iterator[Finding]:
    """The interpreter and the packages that a run imports."""
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs it may have any)
        yield stop("Python", version, "3.11 or newer is needed")
    else:
        yield ok("Python", f"{version}, {sys.prefix}")
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        cost = "run make setup, or activate its environment"
        yield stop("packages", f"without {', '.join(missing)}", cost)
    else:
        yield ok("packages", ", ".join(found[:4]))


def import_torch() -> tuple[ModuleType | None, Finding | None]:
    """torch, or why it cannot be imported; nothing where it is not installed, which is said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an old driver's; said in a line of our own
            return importlib.import_module("torch"), None
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return None, None
        return None, stop("torch", f"needs {error.name}", "install it, or run make setup")
    except (ImportError, OSError, MemoryError) as error:  # a library missing or of another version
        cost = limit_reached(error) or "run make setup"
        return None, stop("torch", f"cannot be imported ({reason(error)})", cost)


def gpu_findings(torch: ModuleType, proc: Path = Path("/proc")) -> Iterator[Finding]:
    """GPUs, their driver, NCCL and bf16."""
    driver = driver_version(proc)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    build = torch.version.cuda
    if not count:
        slow = why_no_gpu(torch, proc) or "training runs on the CPU, which is enough for the demo"
        yield lack("GPUs", f"none (torch {torch.__version__}, driver {driver or 'none'})", slow)
        yield ok("NCCL", "not needed without GPUs; CPU ranks meet by gloo")
        return
    kinds = set()
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        size = f"{about.total_memory / GIB:.0f} GiB, sm_{about.major}{about.minor}"
        kinds.add((about.name, size))
        found = f"{about.name}, {size}"
        problem = no_code(torch, (about.major, about.minor))
        if problem:
            yield stop(f"GPU {number}", found, problem)
            continue
        cost = "no bf16 units (Ampere has them): slower steps, or fp32"
        yield unless(about.major >= 8, f"GPU {number}", found, cost)
    if len(kinds) > 1:
        yield lack("GPUs", f"{len(kinds)} kinds", "all ranks wait for the slowest and smallest")
    yield ok("driver", f"{driver or 'unknown'}, torch's CUDA {build}")
    if torch.distributed.is_nccl_available():
        yield ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield lack("NCCL", "not in this torch", "several GPUs cannot train together")


def processor_findings(torch: ModuleType | None, proc: Path = Path("/proc")) -> Iterator[Finding]:
    """Cores that may be used, vector units, bf16 on the CPU, memory."""
    quota, affinity = cgroup_quota(), len(os.sched_getaffinity(0))
    found = f"{cores()} of {os.cpu_count()}"
    found += f" (affinity {affinity}" + (f", quota {quota:g})" if quota < UNLIMITED else ")")
    cost = "decoding and training share one core"
    yield unless(cores() > 1, "cores", found, cost)
    flags = processor(proc).flags
    if platform.machine() in ("x86_64", "AMD64"):
        units = [name for name in ("avx2", "avx512f", "amx_tile") if name in flags]
        cost = "slow matrix products and resizing on the CPU"
        yield unless("avx2" in flags, "vector units", ", ".join(units) or "no AVX2", cost)
    else:
        yield ok("vector units", platform.machine())
    native = flags & BF16
    cost = "bf16 on the CPU is emulated and slower than fp32; the shipped settings take fp32 there"
    yield unless(bool(native), "bf16 on the CPU", ", ".join(sorted(native)) or "none", cost)
    if torch is not None and not torch.distributed.is_available():
        yield stop("torch.distributed", "not in this torch", "install a torch that has it")
    yield memory_finding(proc)


def memory_finding(proc: Path = Path("/proc")) -> Finding:
    """The machine's memory, or what the cgroup allows of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup_memory(proc / "self")
    most = min(total, limit)
    found = f"{most / GIB:.1f} GiB" + (" (limit of the cgroup)" if limit < total else "")
    cost = "a ViT-B with AdamW takes about 2 GiB per rank on a CPU before activations; ViT-L 5"
    return unless(most >= LEAST_MEMORY, "memory", found, cost)


def build_findings(torch: ModuleType) -> Iterator[Finding]:
    """The compiler, DeepSpeed's compiled ops, the image decoder."""
    distributed = importlib.import_module("pipeline.distributed")
    tools, built = distributed.build_tools(), distributed.compiled_ops()
    # A run finds the one beside this interpreter.
    tools["ninja"] |= shutil.which("ninja", path=str(Path(sys.executable).parent)) is not None
    has = [name for name, there in tools.items() if there]
    missing = [name for name, there in tools.items() if not there]
    cost = f"without {', '.join(missing)} DeepSpeed's ops are neither compiled nor loaded"
    yield unless(not missing, "compiler", ", ".join(has) or "none", cost)
    if built:
        yield ok("DeepSpeed's ops", ", ".join(built))
    else:
        when = "they cannot be compiled" if missing else "the first run compiles them (minutes)"
        cost = f"{when}; without them a run takes torch's AdamW and gloo's sum, which are slower"
        yield lack("DeepSpeed's ops", "none compiled", cost)
    if torch.cuda.is_available():
        yield triton_finding(torch)
    yield decoder_finding()
    yield check_finding()


def triton_finding(torch: ModuleType) -> Finding:
    """Whether a first kernel of Triton's compiles and runs."""
    backend = importlib.import_module("pipeline.kernels.backend")
    problem = backend.triton_problem(torch.device("cuda", 0))
    cost = f"{problem}; PyTorch's references run in the kernels' place, which is slower"
    return unless(not problem, "Triton", "does not run" if problem else "runs", cost)


def decoder_finding() -> Finding:
    """Which image decoder the loader takes."""
    try:
        names = importlib.import_module("pipeline.data.jpeg").available()
    except (ImportError, OSError) as error:
        return stop("image decoder", reason(error), "run make setup")
    pillow = importlib.import_module("PIL").__version__
    kind = f"{names[0]} (Pillow {pillow})"
    cost = {
        "simplejpeg": "pipeline/data/_jpegcrop.c is not built, so whole pictures are decoded and "
        "not the crop alone (libjpeg-dev, then make setup)",
        "pillow": "the slowest decoder (pip install simplejpeg)",
    }
    return unless(names[0] not in cost, "image decoder", kind, cost.get(names[0], ""))


def check_finding() -> Finding:
    """How make_shards and verify_shards check the entropy-coded data of a JPEG."""
    built = False
    with contextlib.suppress(ImportError, OSError):  # of what that room needs: reported by itself
        built = importlib.util.find_spec("shard_tools.image_file._jpegcheck") is not None
    cost = (
        "shard_tools/image_file/_jpegcheck.c is not built: make_shards and verify_shards decode "
        "every JPEG, which finds the same and takes three times as long (a C compiler, then make "
        "setup)"
    )
    return unless(built, "JPEG check", "_jpegcheck" if built else "libjpeg, by decoding", cost)


def system_findings(shm: Path = Path("/dev/shm")) -> Iterator[Finding]:  # noqa: S108 (Linux's own)
    """Shared memory, file descriptors, the name of the host."""
    try:
        free = shutil.disk_usage(shm).free
        cost = (
            "batches pass through it, 3 × workers × micro-batch × 150 kB at 224 pixels: take fewer "
            "workers, or a larger --shm-size"
        )
        yield unless(free >= LEAST_SHM, str(shm), f"{free / GIB:.1f} GiB free", cost)
    except OSError:
        yield lack(str(shm), "not there", "the loader cannot use worker processes: --workers 0")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    fine = soft == resource.RLIM_INFINITY or soft >= LEAST_FILES
    cost = f"a worker keeps up to 256 shards open: ulimit -n {min(hard, 65536)}"
    yield unless(fine, "open files", most, cost)
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        cost = "ranks cannot meet: ip link set lo up"
        yield stop("loopback", f"127.0.0.1 cannot be reached ({reason(error)})", cost)
    name = socket.gethostname()
    try:
        local = socket.gethostbyname(name).startswith("127.")
        found = f"{name} is {socket.gethostbyname(name)}"
    except OSError:
        local, found = True, f"{name} cannot be resolved"
    cost = "one host works; for ranks on several set GLOO_SOCKET_IFNAME"
    yield unless(not local, "host name", found, cost)


def folder_findings(output: Path) -> Iterator[Finding]:
    """Whether a run can be written to, and what kind of file system that is."""
    what, there = f"--output {output}", output.absolute()
    try:
        check_output(output)
        while not there.exists():
            there = there.parent
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            locks = _has_locks(file.fileno())
    except UserError as error:
        yield stop(what, str(error).removeprefix(f"{output}: "), "choose another folder")
        return
    except OSError as error:
        yield stop(what, f"{there} cannot be written ({reason(error)})", "choose another folder")
        return
    kind, free = file_system(there), shutil.disk_usage(there).free
    cost = "a ViT-B checkpoint with its moments takes 1.3 GB, and two are kept"
    yield unless(free >= LEAST_DISK, what, f"{free / GIB:.0f} GiB free on {kind}", cost)
    shared = kind.startswith(SHARED) or kind.startswith("fuse")
    cost = "a run on several hosts needs a folder that all of them share"
    yield unless(shared, "shared folder", kind, cost)
    if not locks:
        cost = "a second run on a folder goes unnoticed: mount with locks, or say --no-lock"
        yield lack("file locks", "none there", cost)


def _has_locks(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that holds a path, as Linux names it."""
    best, kind = "", "unknown"
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        _, point, name = (word.replace("\\040", " ") for word in line.split(" ")[:3])
        if path.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, name
    return kind


def examine(output: Path) -> list[Finding]:
    """All findings, in the order of the page."""
    findings = list(python_findings())
    torch, problem = import_torch()
    findings += [problem] if problem else []
    if torch is not None:
        findings += gpu_findings(torch)
    findings += processor_findings(torch)
    if torch is not None:
        findings += build_findings(torch)
    return [*findings, *system_findings(), *folder_findings(output)]


def page(findings: list[Finding]) -> str:
    """The page as text: a line each, what a lack costs below it, a sentence at the end."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.grade:4}  {finding.what:{width}}  {finding.found}")
        lines += [f"{'':4}  {'':{width}}  → {finding.cost}"] if finding.cost else []
    stops = [finding.what for finding in findings if finding.grade == STOP]
    lacks = sum(finding.grade == LACK for finding in findings)
    if stops:
        lines += ["", f"no run can start here: {', '.join(stops)}"]
    else:
        lines += ["", f"a run can start; {lacks} of {len(findings)} lines name a lack"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.doctor", description=str(__doc__).split("\n", 1)[0]
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="folder that a run would write to (default: runs)",
    )
    try:
        args = parser.parse_args(expand_words(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return refuse(error)
    findings = examine(args.output)
    print(page(findings))
    return int(any(finding.grade == STOP for finding in findings))


if __name__ == "__main__":
    run_main(main)

"""The cores and the memory that this process may use: its affinity, the limits of its cgroups.

python shard_tools/cores.py prints their number (launch.sh asks so).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

UNLIMITED = 2.0**30  # cores


def cores() -> int:
    """Cores of this process's affinity, within the quota of its cgroups (v1 or v2); at least 1.

    Affinity is what taskset, Slurm and cpusets set, a quota what `docker --cpus` and Kubernetes'
    limits do; a quota of 2.5 cores keeps 2 busy without being throttled.
    """
    return max(1, min(len(os.sched_getaffinity(0)), int(cgroup_quota())))


def cgroup_quota(proc: Path = Path("/proc/self")) -> float:
    """The smallest CPU quota of this process's cgroups and those above them, in cores.

    UNLIMITED where there is none. proc: the process's folder in /proc.
    """
    return min([UNLIMITED, *_limits(proc, _quota_v2, _quota_v1, "cpu")])


def _limits(
    proc: Path, v2: Callable[[Path], float], v1: Callable[[Path], float], controller: str
) -> Iterator[float]:
    """What v2 or v1 read in every cgroup of the process and those above them."""
    try:
        groups = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:  # no cgroups in this kernel
        return
    for line in groups:
        _, controllers, group = line.split(":", 2)
        for mount in mounts:
            kind, options = _kind(mount)
            if kind == "cgroup2" and controllers == "":
                yield from map(v2, _folders(mount, group))
            elif (
                kind == "cgroup" and controller in controllers.split(",") and controller in options
            ):
                yield from map(v1, _folders(mount, group))


def cgroup_memory(proc: Path = Path("/proc/self")) -> float:
    """The smallest memory limit of this process's cgroups and those above them, in bytes; inf where
    there is none. proc: the process's folder in /proc.
    """
    return min(_limits(proc, _memory_v2, _memory_v1, "memory"), default=math.inf)


def _kind(mount: str) -> tuple[str, list[str]]:
    """File system and its options, of a line of mountinfo: … - kind source options."""
    words = mount.partition(" - ")[2].split(" ")
    return words[0], words[-1].split(",")


def _folders(mount: str, group: str) -> list[Path]:
    """The folders of a cgroup and of those above it below a mount.

    In a container the mount may begin inside the hierarchy (at its root, the fourth word of the
    line), or the group's path may not be seen from here.
    """
    root, point = (word.replace("\\040", " ") for word in mount.split(" ")[3:5])
    inside = os.path.relpath(group, root) if Path(group).is_relative_to(root) else "."
    leaf = Path(point, inside)
    return [leaf, *leaf.parents[: len(Path(inside).parts)]]


def _quota_v2(folder: Path) -> float:
    quota, period = _words(folder / "cpu.max", "max 100000")
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    quota = int(_words(folder / "cpu.cfs_quota_us", "-1")[0])
    period = int(_words(folder / "cpu.cfs_period_us", "100000")[0])
    return math.inf if quota < 0 else quota / period


def _memory_v2(folder: Path) -> float:
    most = _words(folder / "memory.max", "max")[0]
    return math.inf if most == "max" else int(most)


def _memory_v1(folder: Path) -> float:
    return int(_words(folder / "memory.limit_in_bytes", str(2**63))[0])


def _words(path: Path, default: str) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return default.split()


if __name__ == "__main__":
    print(cores())

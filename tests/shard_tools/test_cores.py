"""How many cores a process may use: affinity, and the quota of its cgroups as containers set it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shard_tools.cores import UNLIMITED, cgroup_memory, cgroup_quota, cores

V1 = "32 31 0:29 {root} {at}/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V2 = "24 30 0:21 {root} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


def process(tmp_path, group, mount, root, files):
    """/proc/self of a process in a cgroup, its mounted hierarchy in tmp_path/fs with `files`."""
    at = tmp_path / "f s"
    for name, text in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(text + "\n")
    other = "22 1 8:1 / / rw - ext4 /dev/sda1 rw"
    mount = mount.format(root=root, at=str(at).replace(" ", "\\040"))
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "mountinfo").write_text(f"{other}\n{mount}\n")
    (tmp_path / "cgroup").write_text(f"{group}\n")
    return tmp_path


V2_CASES = [
    ("0::/", "/", {"cpu.max": "150000 100000"}, 1.5),
    ("0::/a/b", "/", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}, 4.0),
    ("0::/a/b", "/", {"a/b/cpu.max": "50000 50000", "a/cpu.max": "400000 100000"}, 1.0),
    ("0::/a/b", "/a", {"b/cpu.max": "300000 100000"}, 3.0),  # the mount begins at /a
    ("0::/docker/x", "/pod", {"cpu.max": "200000 100000"}, 2.0),  # a path not seen from here
    ("0::/a", "/", {"a/cpu.max": "max 100000"}, UNLIMITED),
    ("0::/", "/", {}, UNLIMITED),
]
V1_CASES = [
    ("3:cpu,cpuacct:/a", "/", {"cpu/a/cpu.cfs_quota_us": "250000"}, 2.5),
    (
        "3:cpuacct,cpu:/a", "/",
        {"cpu/cpu.cfs_quota_us": "20000", "cpu/cpu.cfs_period_us": "10000",
         "cpu/a/cpu.cfs_quota_us": "-1"},
        2.0,
    ),
    ("3:cpu:/", "/", {"cpu/cpu.cfs_quota_us": "-1"}, UNLIMITED),
    ("3:cpuset:/", "/", {"cpu/cpu.cfs_quota_us": "100000"}, UNLIMITED),
]  # fmt: skip


@pytest.mark.parametrize(("group", "root", "files", "expected"), V2_CASES)
def test_the_quota_of_cgroups_v2(group, root, files, expected, tmp_path):
    assert cgroup_quota(process(tmp_path, group, V2, root, files)) == expected


@pytest.mark.parametrize(("group", "root", "files", "expected"), V1_CASES)
def test_the_quota_of_cgroups_v1(group, root, files, expected, tmp_path):
    assert cgroup_quota(process(tmp_path, group, V1, root, files)) == expected


def test_without_cgroups_the_affinity_counts(tmp_path):
    assert cgroup_quota(tmp_path) == UNLIMITED


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (1.9, 1), (UNLIMITED, None)])
def test_cores_are_the_smaller_of_both_and_at_least_one(quota, expected, monkeypatch):
    monkeypatch.setattr("shard_tools.cores.cgroup_quota", lambda: quota)
    assert cores() == (expected or len(os.sched_getaffinity(0)))


def test_a_process_bound_to_one_core_counts_one():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    tool = Path(__file__).parents[2] / "shard_tools/cores.py"
    code += f"import runpy; runpy.run_path({str(tool)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_real_quota_is_seen():
    """In a cgroup of this machine (v1), where the test may make one."""
    folder = Path("/sys/fs/cgroup/cpu/relaxmim-test")
    try:
        folder.mkdir()
        (folder / "cpu.cfs_quota_us").write_text("100000")
    except OSError:
        if folder.exists():
            folder.rmdir()
        pytest.skip("needs root and a writable cpu cgroup (v1)")
    try:
        tool = Path(__file__).parents[2] / "shard_tools/cores.py"
        enter = f"echo $$ > {folder}/cgroup.procs && exec {sys.executable} {tool}"
        done = subprocess.run(["sh", "-c", enter], capture_output=True, text=True)
        assert done.stdout == "1\n", done.stderr
    finally:
        folder.rmdir()


MEMORY = "33 31 0:30 {root} {at}/memory rw,relatime - cgroup cgroup rw,memory"


def test_the_memory_limit_of_cgroups(tmp_path):
    files = {"a/b/memory.max": "max", "a/memory.max": "3000000000"}
    assert cgroup_memory(process(tmp_path / "v2", "0::/a/b", V2, "/", files)) == 3e9
    assert cgroup_memory(process(tmp_path / "none", "0::/", V2, "/", {})) == float("inf")
    files = {"memory/a/memory.limit_in_bytes": "2000000000"}
    assert cgroup_memory(process(tmp_path / "v1", "5:memory:/a", MEMORY, "/", files)) == 2e9
    assert cgroup_memory(tmp_path / "nowhere") == float("inf")

"""launch.sh: what the ranks see, what is refused, how signals and failures end a run.

Hostfile and Slurm start real hosts in tests/cluster/.
"""

import base64
import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, NAMES, RANK, ROOT, finish, start, wait_for
from tiny import tiny_overrides


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


def seen(folder, rank):
    return json.loads((folder / f"rank-{rank}").read_text())


def ranks_started(folder, count):
    wait_for(lambda: len(list(folder.glob("rank-[0-9]"))) == count)
    return [seen(folder, rank)["pid"] for rank in range(count)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def environment(folder, rank):
    env = seen(folder, rank)["env"]
    return [env.get(name) for name in NAMES[:4]]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (Debian package)")
def test_shellcheck_finds_nothing():
    scripts = [LAUNCH, *sorted((ROOT / "tests/cluster").glob("*.sh"))]
    scripts += sorted((ROOT / "docs/cluster").glob("*.sbatch"))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_names_every_option_and_exit_code():
    code, out, err = finish(start("--help"))
    assert (code, err) == (0, "")
    for word in (
        "--ranks",
        "--hostfile",
        "--script",
        "--grace",
        "--no-requeue",
        "--check",
        "sbatch",
        "torchrun",
        "85",
    ):
        assert word in out


def test_one_node_tells_each_rank_who_it_is_and_forwards_every_word(script, tmp_path):
    words = [
        "a b",
        "x={k: [1, 2]}",
        "*",
        "$HOME",
        "it's",
        "",
        "--output",
        "o",
        "--",
        "--ranks",
        "9",
    ]
    code, _, err = finish(start("--ranks", 2, f"--script={script}", tmp_path, "end", *words))
    assert (code, err) == (0, "")
    for rank in (0, 1):
        assert environment(tmp_path, rank) == [str(rank), str(rank), "2", "2"]
        assert seen(tmp_path, rank)["words"] == [w for w in words if w != "--"]
        env = seen(tmp_path, rank)["env"]
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["DS_ACCELERATOR"] == "cpu"
        assert int(env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    ports = {seen(tmp_path, rank)["env"]["MASTER_PORT"] for rank in (0, 1)}
    assert len(ports) == 1


def test_a_tilde_after_an_equals_sign_is_the_home_folder(tmp_path, script):
    code, _, err = finish(start(f"--script=~/{script.name}", tmp_path, "end", HOME=str(tmp_path)))
    assert (code, err) == (0, "")
    assert seen(tmp_path, 0)["words"] == []
    code, _, err = finish(start("--hostfile=~/none", HOME=str(tmp_path)))
    assert (code, err) == (2, f"error: --hostfile {tmp_path}/none: no such file\n")
    home = pwd.getpwuid(os.getuid()).pw_dir
    process = start("--hostfile=~/none", inside=("env", "-u", "HOME"))
    assert finish(process)[1:] == ("", f"error: --hostfile {home}/none: no such file\n")
    # Two hosts check that they share the run's folder.
    words = ("--data", "none", "--output=~/run")
    two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29444"}
    process = start(*words, HOME=str(tmp_path), **two)
    try:
        wait_for((tmp_path / "run/.launch").is_file)
    finally:
        process.terminate()
        finish(process)
    assert not (ROOT / "~").exists()


def test_a_relative_path_of_launch_sh_where_cdpath_is_exported():
    """`cd` prints where it went then."""
    words = [f"{ROOT.name}/launch.sh", "--data", "none"]
    env = {k: v for k, v in os.environ.items() if k not in NAMES}
    env |= {"CDPATH": str(ROOT.parent), "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(words, cwd=ROOT.parent, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none: no such folder")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        # torchrun: one process, already numbered
        ({"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, {3: [1, 4, 2]}),
        # the deepspeed launcher says LOCAL_SIZE
        ({"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_SIZE": 2}, {3: [1, 4, 2]}),
        # PyTorchJob: RANK and WORLD_SIZE count pods
        ({"RANK": 1, "WORLD_SIZE": 3}, {2: [0, 6, 2], 3: [1, 6, 2]}),
        # its newer versions count processes in WORLD_SIZE, pods in PET_*
        (
            {"RANK": 1, "WORLD_SIZE": 6, "PET_NNODES": 3, "PET_NODE_RANK": 1},
            {2: [0, 6, 2], 3: [1, 6, 2]},
        ),
        # srun with a task per rank
        (
            {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 4, "SLURM_PROCID": 3}
            | {"SLURM_LOCALID": 1, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            {3: [1, 4, 2]},
        ),
        # srun with a task per node
        (
            {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1}
            | {"SLURM_LOCALID": 0, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": 1}
            | {"SLURM_STEP_NUM_NODES": 2},
            {2: [0, 4, 2], 3: [1, 4, 2]},
        ),
        # the same where enroot's hook has named the task a rank
        (
            {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1}
            | {"SLURM_LOCALID": 0, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": 1}
            | {"SLURM_STEP_NUM_NODES": 2, "RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2},
            {2: [0, 4, 2], 3: [1, 4, 2]},
        ),
        # torchrun in such a task
        (
            {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1}
            | {"SLURM_LOCALID": 0, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": 1}
            | {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2},
            {3: [1, 4, 2]},
        ),
    ],
)
def test_ranks_of_other_launchers(script, tmp_path, env, expected):
    env = {"MASTER_ADDR": "localhost", "MASTER_PORT": "4711"} | {k: str(v) for k, v in env.items()}
    code, _, err = finish(start("--ranks", 2, "--script", script, tmp_path, "end", **env))
    assert (code, err) == (0, "")
    assert len(list(tmp_path.glob("rank-*"))) == len(expected)
    for rank, values in expected.items():
        assert environment(tmp_path, rank) == [str(rank), *map(str, values)]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[07-09,12],big1", "gpu07"),
        ("big1,gpu[07-09]", "big1"),
        ("rack[2-3]n[4,6]-ib", "rack2n4-ib"),
    ],
)
def test_srun_in_a_container_without_scontrol(script, tmp_path, nodes, first):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "scontrol").chmod(0o755)
    task = TASK | {"MASTER_ADDR": "", "SLURM_STEP_NODELIST": nodes}
    task["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    code, _, err = finish(start("--script", script, tmp_path, "end", **task))
    assert (code, err) == (0, "")
    assert seen(tmp_path, 0)["env"]["MASTER_ADDR"] == first


@pytest.mark.parametrize("tasks", ["1", "2"])
def test_steps_of_a_job_have_ports_of_their_own(script, tmp_path, tasks):
    """Also runs that are started in the one task of `srun --pty bash`."""
    ports = []
    for step in ("0", "1") if tasks == "2" else ("0", "0"):
        one = TASK | {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": tasks}
        one |= {"SLURM_STEP_ID": step, "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1"}
        assert finish(start("--script", script, tmp_path, "end", **one))[0] == 0
        ports.append(seen(tmp_path, 0)["env"]["MASTER_PORT"])
    assert ports[0] != ports[1]


@pytest.mark.parametrize(("step", "expected"), [("batch", 2), ("interactive", 2), ("0", 0)])
def test_a_batch_script_that_inherited_the_variables_of_srun(script, tmp_path, step, expected):
    """sbatch in `srun --pty bash` hands them on, and salloc's shell on the first node is a step of
    one task; both start srun, for which --output is missing here."""
    task = TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    task |= {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1"}
    stepd = """exec -a "slurmstepd: [7.$0]" bash -c '"$@"; exit' - bash -c '
        SLURM_TASK_PID=$$ exec "$@"' - "$@" """
    words = [] if expected else ["--script", script, tmp_path, "end"]
    code, _, err = finish(start(*words, inside=("bash", "-c", stepd, step), **task))
    assert (code, "give --output" in err) == (expected, bool(expected)), err


@pytest.fixture
def four_gpus(tmp_path):
    """PATH with an nvidia-smi that lists four devices, as `nvidia-smi -L` prints them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i: A; done\n")
    (folder / "nvidia-smi").chmod(0o755)
    return {"DS_ACCELERATOR": "", "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({}, 4),
        ({"CUDA_VISIBLE_DEVICES": "1,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,3"}, 1),
        ({"DS_ACCELERATOR": "cpu"}, 1),
    ],
)
def test_one_rank_per_device(script, tmp_path, four_gpus, env, count):
    code, _, err = finish(start("--script", script, tmp_path, "end", **four_gpus | env))
    assert (code, err) == (0, "")
    assert len(list(tmp_path.glob("rank-*"))) == count
    assert environment(tmp_path, count - 1)[2:] == [str(count)] * 2
    hidden = "" if env.get("DS_ACCELERATOR") else env.get("CUDA_VISIBLE_DEVICES")
    assert seen(tmp_path, 0)["env"].get("CUDA_VISIBLE_DEVICES") == hidden


def test_one_rank_where_gpus_are_sliced(script, tmp_path, four_gpus):
    """As `nvidia-smi -L` prints an H100 in MIG mode: CUDA shows a process one slice."""
    slices = "echo '  MIG 3g.40gb     Device  0: (UUID: MIG-1)'\n" * 2
    (tmp_path / "bin" / "nvidia-smi").write_text(
        f"#!/bin/sh\nfor i in 0 1; do echo GPU $i: A\n{slices}done\n"
    )
    code, _, err = finish(start("--script", script, tmp_path, "end", **four_gpus))
    assert (code, err) == (0, "")
    assert len(list(tmp_path.glob("rank-*"))) == 1


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_ranks_on_the_cpu_where_all_gpus_are_hidden(script, tmp_path, four_gpus, hidden):
    env = four_gpus | {"CUDA_VISIBLE_DEVICES": hidden}
    code, _, err = finish(start("--ranks", 5, "--script", script, tmp_path, "end", **env))
    assert (code, err) == (0, "")
    assert seen(tmp_path, 4)["env"]["DS_ACCELERATOR"] == "cpu"


# A /dev of its own for a command, in the folder $0, with two GPUs.
DEVICES = """
mount -t tmpfs dev "$0" && cp -a /dev/null /dev/zero /dev/urandom /dev/fd /dev/std* "$0" || exit 77
cd "$0" && touch nvidia0 nvidia1 nvidiactl nvidia-uvm && mount --rbind . /dev || exit 77
exec "$@"
"""


def test_a_container_may_have_gpus_without_nvidia_smi(script, tmp_path):
    dev = tmp_path / "dev"
    dev.mkdir()
    inside = ("unshare", "-m", "sh", "-c", DEVICES, str(dev))
    words = ("--script", script, tmp_path, "end")
    code, _, err = finish(start(*words, inside=inside, DS_ACCELERATOR=""))
    if code == 77 or "unshare" in err:
        pytest.skip("no mounts of its own for a process here")
    assert (code, err) == (0, "")
    assert len(list(tmp_path.glob("rank-*"))) == 2


def test_more_ranks_than_devices(four_gpus):
    code, _, err = finish(start("--ranks", 5, **four_gpus))
    assert (code, err.count("\n")) == (2, 1)
    assert "has only 4 GPUs" in err


NODE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
ONE = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}
TASK = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "localhost",
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        (["--ranks", "0"], {}, "--ranks is '0'"),
        (["--ranks"], {}, "--ranks needs a value"),
        *(
            (words, {}, f"{option} is given as an empty text")
            for option in ("--ranks", "--hostfile", "--script", "--grace")
            for words in ([option, ""], [f"{option}="])
        ),
        (["--ranks", "2", "--hostfile", "{bad}"], {}, "--ranks 2 does nothing with --hostfile"),
        (["--ranks", "4"], ONE, "--ranks 4: another launcher starts 2 on"),
        (["--ranks", "2"], ONE | {"LOCAL_WORLD_SIZE": "1"}, "--ranks 2: another launcher starts 1"),
        (["--ranks", "4"], TASK, "--ranks 4: another launcher starts 2 on"),
        (["--grace", "soon"], {}, "--grace is 'soon'"),
        (["--script", "none.py"], {}, "none.py: no such file"),
        (["--hostfile", "none"], {}, "none: no such file"),
        (["--hostfile", "{bad}"], {}, "'node2 slot=1' is not a line like"),
        (["--hostfile", "{empty}"], {}, "is not a line like"),
        (["--hostfile", "{twice}"], {}, "node2 is in it twice; give all its slots"),
        (["--hostfile", "{hosts}"], {}, "no ssh without a password to: nowhere.invalid"),
        ([], {"LOCAL_RANK": "0", "RANK": "0"}, "WORLD_SIZE is ''"),
        ([], {"LOCAL_RANK": "0", "RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2': must be a number"),
        ([], NODE | {"RANK": "2"}, "without LOCAL_RANK) is '2'"),
        ([], NODE | {"WORLD_SIZE": "1:4"}, "is '1:4'"),
        ([], NODE | {"MASTER_ADDR": "nowhere.invalid"}, "cannot resolve MASTER_ADDR"),
        ([], NODE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "MASTER_PORT are not both set"),
        ([], NODE | {"MASTER_ADDR": ""}, "MASTER_PORT are not both set"),
        ([], NODE | {"NCCL_SOCKET_IFNAME": "ib9"}, "NCCL_SOCKET_IFNAME=ib9"),
        ([], NODE | {"GLOO_SOCKET_IFNAME": "l"}, "GLOO_SOCKET_IFNAME=l"),
        ([], {"SLURM_JOB_ID": "7"}, "give --output"),
        ([], {"OMPI_COMM_WORLD_SIZE": "8"}, "mpirun has started launch.sh 8 times"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(words, env, expected, tmp_path):
    files = {
        "bad": "node1 slots=1\nnode2 slot=1\n",
        "empty": "# none\n",
        "twice": "node1 slots=1\nnode2 slots=1\nnode2 slots=1\n",
        "hosts": "nowhere.invalid slots=1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if "{hosts}" in words and not all(map(shutil.which, ("ssh", "pdsh"))):
        pytest.skip("needs ssh and pdsh (Debian packages openssh-client, pdsh)")
    words = [word.format(**{name: tmp_path / name for name in files}) for word in words]
    code, out, err = finish(start(*words, **env))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


@pytest.fixture
def several_hosts(tmp_path):
    """Node 1 of two, on a host whose own name is a loopback address, as on Debian; no sleep."""
    folder = tmp_path / "commands"
    folder.mkdir()
    loopback = """[ "$2" = node0 ] && echo 192.0.2.1 STREAM || echo 127.0.1.1 STREAM"""
    for name, body in (("getent", loopback), ("sleep", ":")):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    node = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29444"}
    return node | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("gpus", [0, 4])
def test_a_host_name_that_is_a_loopback_address(script, tmp_path, several_hosts, four_gpus, gpus):
    """GPU ranks meet over gloo, too."""
    if gpus:
        several_hosts["PATH"] = f"{tmp_path / 'bin'}:{several_hosts['PATH']}"
        several_hosts["DS_ACCELERATOR"] = ""
    words = ("--script", script, tmp_path, "end")
    code, _, err = finish(start(*words, **several_hosts))
    assert (code, err.count("\n")) == (2, 1)
    assert "resolves to a loopback address: set GLOO_SOCKET_IFNAME" in err
    code, _, err = finish(start(*words, **several_hosts, GLOO_SOCKET_IFNAME="lo"))
    assert (code, err) == (0, "")


def test_hosts_that_count_ranks_otherwise(tmp_path, several_hosts):
    """A node with a dead GPU starts one rank fewer: all would wait for a rank that is none's."""
    env = several_hosts | {"GLOO_SOCKET_IFNAME": "lo"}
    (tmp_path / ".launch").write_text("node0:29444 4\n")
    code, _, err = finish(start("--output", tmp_path, **env))
    assert (code, err.count("\n")) == (2, 1)
    assert "counts 2 ranks on all hosts together, node 0 4: every host must start as many" in err


def test_an_environment_without_deepspeed(tmp_path):
    """A copy of launch.sh beside no .venv, with a python3 that has no packages."""
    copy = tmp_path / "launch.sh"
    copy.write_bytes(LAUNCH.read_bytes())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(
        f'#!/bin/sh\nexec /usr/bin/env -i {sys._base_executable} -S "$@"\n'
    )
    (tmp_path / "bin/python3").chmod(0o755)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/pretrain.py").write_text("")
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    done = subprocess.run(["bash", copy], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has no deepspeed: run 'make setup'" in done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_reaches_every_rank_once_and_preemption_is_reported(script, tmp_path, name):
    process = start("--ranks", 2, "--script", script, tmp_path, "wait")
    pids = ranks_started(tmp_path, 2)
    process.send_signal(getattr(signal, name))
    code, _, err = finish(process)
    assert code == 85
    assert err == f"{name}: the ranks finish their step and save\n"
    for rank in (0, 1):
        got = json.loads((tmp_path / f"signal-{rank}").read_text())
        assert got == ("SIGUSR1" if name == "SIGUSR1" else "SIGTERM")
    assert not any(map(alive, pids))


def test_stopped_before_the_trainer_listens_counts_as_preempted(script, tmp_path):
    process = start("--ranks", 2, "--script", script, tmp_path, "unprepared")
    pids = ranks_started(tmp_path, 2)
    process.terminate()
    assert finish(process)[0] == 85
    assert not any(map(alive, pids))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("env", [{}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}])
def test_a_signal_before_the_ranks_are_started_is_not_lost(script, tmp_path, env, name):
    slow = tmp_path / "bin" / "python"
    slow.parent.mkdir()
    slow.write_text(
        f"""#!/bin/sh
case "$*" in *cores.py*) touch "{tmp_path}/counting"; sleep 1;; esac
exec "{sys.executable}" "$@"
"""
    )
    slow.chmod(0o755)
    process = start("--script", script, tmp_path, "wait", **env, VIRTUAL_ENV=str(tmp_path))
    wait_for((tmp_path / "counting").is_file)
    process.send_signal(getattr(signal, name))
    code, _, err = finish(process)
    assert (code, err) == (85, f"{name}: stopped before the ranks were started\n")
    assert not list(tmp_path.glob("rank-*"))


def test_a_rank_that_does_not_stop_is_killed_after_the_grace(script, tmp_path):
    process = start("--ranks", 2, "--grace", 1, "--script", script, tmp_path, "stubborn")
    pids = ranks_started(tmp_path, 2)
    process.terminate()
    code, _, err = finish(process)
    assert code == 137
    assert "did not end in time" in err
    assert not any(map(alive, pids))


def test_a_second_interrupt_kills(script, tmp_path):
    process = start("--ranks", 1, "--script", script, tmp_path, "stubborn")
    pids = ranks_started(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "signal-0").exists)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 137
    assert not any(map(alive, pids))


def test_the_first_failure_ends_the_others_with_its_code(script, tmp_path):
    process = start("--ranks", 2, "--script", script, tmp_path, "fail-1")
    code, _, err = finish(process)
    assert code == 3
    assert err.startswith("error: rank 1 on ")
    assert "failed with exit code 3" in err.splitlines()[0]
    assert not alive(seen(tmp_path, 0)["pid"])


def test_the_reason_of_the_first_failure_is_told_first(tmp_path):
    """What the failed rank left in the run's folder, but not what an earlier start left there."""
    script, output = tmp_path / "pipeline/pretrain.py", tmp_path / "run"
    script.parent.mkdir()
    output.mkdir()
    words = ["--ranks", 2, "--script", script, tmp_path, "fail-1", "--output", output]
    (output / "failure.txt").write_text("rank 0 on old, step 2: long ago\n")
    os.utime(output / "failure.txt", (1, 1))
    script.write_text(RANK)
    assert "long ago" not in finish(start(*words))[2].splitlines()[0]
    note = f"Path({str(output / 'failure.txt')!r}).write_text('rank 1 on x, step 4: no shard')"
    script.write_text(RANK.replace("sys.exit(3)", f"{note}; sys.exit(3)"))
    (tmp_path / "bash-4.4").write_text("unset EPOCHREALTIME EPOCHSECONDS\n")  # which has neither
    code, _, err = finish(start(*words, BASH_ENV=str(tmp_path / "bash-4.4")))
    assert code == 3
    line = "failed with exit code 3 (rank 1 on x, step 4: no shard); ending the others"
    assert line in err.splitlines()[0]
    assert "EPOCH" not in LAUNCH.read_text()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_ranks_do_not_outlive_a_killed_launcher(script, tmp_path):
    process = start("--ranks", 2, "--script", script, tmp_path, "wait")
    pids = ranks_started(tmp_path, 2)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, pids)))
    process.communicate()


SRUN = """#!/bin/bash
echo srun >>"$CALLS"
trap 'exit 85' TERM USR1
touch "$CALLS.up"
case $PLAN in
  end) exit 0 ;; preempted) exit 85 ;; bad) exit 2 ;;
  *) sleep 60 & wait ;;
esac
"""
SCONTROL = """#!/bin/bash
echo scontrol "$@" >>"$CALLS"
[[ $1 != show ]] || echo "JobId=77 JobState=$STATE Reason=None"
[[ $1 != requeue || $PLAN != disabled ]]
"""
JOB = {"SLURM_JOB_ID": "77", "RELAXMIM_BATCH": "77", "STATE": "RUNNING", "PLAN": "preempted"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"}


@pytest.fixture
def slurm(tmp_path):
    """PATH with an srun that ends as $PLAN says, and a scontrol; both note how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(number=None, *words, **env):
        path = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)}
        process = start("--output", tmp_path / "run", *words, **JOB | path | env)
        if number:
            wait_for(Path(f"{calls}.up").exists)
            process.send_signal(number)
        code, _, err = finish(process)
        requeued = [c.split()[2] for c in calls.read_text().splitlines() if " requeue " in c]
        return code, err, requeued

    return run


def test_a_preempted_batch_script_of_ours_is_requeued(slurm):
    assert slurm() == (85, "", ["77"])


def test_a_task_of_an_array_requeues_itself_and_not_the_array(slurm):
    assert slurm(**ARRAY) == (85, "", ["70_4"])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_batch_script_saves_and_requeues(number, slurm):
    code, err, requeued = slurm(number, PLAN="wait")
    assert (code, requeued) == (85, ["77"])
    assert err == f"{number.name}: the ranks finish their step and save\n"


@pytest.mark.parametrize(
    ("number", "words", "env", "code", "said"),
    [
        (signal.SIGINT, [], {"PLAN": "wait"}, 85, "SIGINT: the ranks finish"),
        (None, ["--no-requeue"], {}, 85, ""),
        (None, [], {"RELAXMIM_BATCH": ""}, 85, "does not export RELAXMIM_BATCH=$SLURM_JOB_ID"),
        (None, [], {"RELAXMIM_BATCH": "76"}, 85, "job 77 is not requeued"),  # of an outer job
        (None, [], {"STATE": "CANCELLED"}, 85, "job 77 was cancelled"),
        (None, [], {"PLAN": "end"}, 0, ""),
        (None, [], {"PLAN": "bad"}, 2, ""),
    ],
)
def test_what_is_not_requeued(number, words, env, code, said, slurm):
    got, err, requeued = slurm(number, *words, **env)
    assert (got, requeued) == (code, [])
    assert said in err
    assert err.count("\n") == bool(said)


def test_a_job_that_slurm_does_not_requeue_is_said(slurm):
    code, err, requeued = slurm(signal.SIGTERM, PLAN="disabled")
    assert (code, requeued) == (85, ["77"])
    assert "error: job 77 cannot be requeued" in err


def test_a_hidden_output_folder_is_noticed(script, tmp_path):
    """Node 0 leaves a note in --output; one that reads another note does not start."""
    text = LAUNCH.read_text().replace("tries < 60", "tries < 1")
    copy = tmp_path / "launch.sh"
    copy.write_text(text)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/pretrain.py").write_text(RANK)
    clean = {k: v for k, v in os.environ.items() if k not in NAMES}
    env = clean | NODE | {"VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu"}
    words = ["bash", copy, tmp_path, "end", "--output", tmp_path / "run"]
    alone = subprocess.run(words, env=env, capture_output=True, text=True)
    assert alone.returncode == 2
    assert "must be shared by all hosts" in alone.stderr
    for node in ("0", "1"):
        done = subprocess.run(words, env=env | {"RANK": node}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert environment(tmp_path, node) == [node, "0", "2", "1"]


def test_words_for_other_hosts_survive_two_shells(script, tmp_path):
    words = ["a b", "$HOME;*", "it's", '"']
    inner = ["LOCAL_RANK=0", "RANK=0", "WORLD_SIZE=1", "MASTER_ADDR=localhost", "MASTER_PORT=1"]
    inner += [str(LAUNCH), "--script", str(script), "--", str(tmp_path), "end", *words]
    packed = base64.b64encode(b"".join(w.encode() + b"\0" for w in inner)).decode()
    code, _, err = finish(start("--decode", packed))
    assert (code, err) == (0, "")
    assert seen(tmp_path, 0)["words"] == words


def test_a_signal_for_one_run_finds_its_ranks_only(tmp_path):
    """Ranks are found by the run's name in their environment; their workers are left to them."""
    rank = "import os, time\nif os.fork(): print('up', flush=True)\ntime.sleep(60)"
    runs = {}
    for name in ("this", "that"):
        env = os.environ | {"RELAXMIM_RUN": f"{tmp_path}-{name}"}
        runs[name] = subprocess.Popen([sys.executable, "-c", rank], env=env, stdout=subprocess.PIPE)
        runs[name].stdout.readline()
    child = (
        Path(f"/proc/{runs['this'].pid}/task/{runs['this'].pid}/children").read_text().split()[0]
    )
    try:
        subprocess.run([LAUNCH, "--signal", "TERM", f"{tmp_path}-this"], check=True)
        assert runs["this"].wait(timeout=10) == -signal.SIGTERM
        assert alive(child)
        assert runs["that"].poll() is None
        subprocess.run([LAUNCH, "--signal", "KILL", f"{tmp_path}-this"], check=True)
        wait_for(lambda: not alive(child))
    finally:
        subprocess.run([LAUNCH, "--signal", "KILL", f"{tmp_path}-that"], check=True)
        for process in runs.values():
            process.wait()
            process.stdout.close()


def test_pretraining_on_two_ranks_ends_at_sigterm(shards, tmp_path):
    """The real trainer with loader workers: it steps on two ranks, and no process is left."""
    words = ["--recipe", "pipeline/recipes/mae.yaml", "--data", shards / "train"]
    words += ["--output", tmp_path / "run", "--ds_config", "ds_configs/zero0.json"]
    settings = {"data.workers": 1, "monitor.log_steps": 1, "optimizer.epochs": 10000}
    for override in (*tiny_overrides("mae"), *(f"{k}={v}" for k, v in settings.items())):
        words += ["--set", override]
    process = start("--ranks", 2, *words)
    metrics = tmp_path / "run/metrics.jsonl"
    try:
        wait_for(
            lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size), 120
        )
        process.terminate()
        code, _, err = finish(process, 60)
    finally:
        process.kill()
    assert code == 85, err
    assert json.loads((tmp_path / "run/versions.json").read_text())["ranks"] == 2
    name = str(tmp_path / "run").encode()
    left = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            left += [command] if name in command.read_bytes() else []
    assert left == []


def test_ranks_stop_with_a_torchrun_that_dies(shards, tmp_path):
    """SIGUSR1, which Slurm sends to every process of a step, ends torchrun, but not its ranks."""
    run = tmp_path / "run"
    settings = {"monitor.log_steps": 1, "optimizer.epochs": 10000}
    overrides = (*tiny_overrides("mae"), *(f"{k}={v}" for k, v in settings.items()))
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "pipeline/pretrain.py"]
    command += ["--recipe", "mae", "--data", shards / "train", "--output", run]
    command += [word for override in overrides for word in ("--set", override)]
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    metrics = run / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.stat().st_size, 120)
        rank = int((run / "lock").read_text().split()[1])
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == -signal.SIGUSR1
        wait_for(lambda: not alive(rank), 60)
    finally:
        process.kill()
        process.stdout.close()
    assert "stopped by SIGTERM: saved" in (run / "log.txt").read_text()

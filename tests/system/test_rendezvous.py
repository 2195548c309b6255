"""How the ranks of a run meet: a port of their own, what is said of a taken one, who waits ends."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from launching import LAUNCH, NAMES, RANK, ROOT, finish, start, wait_for
from tiny import tiny_overrides

from pipeline import pretrain
from pipeline.command import check_environment
from pipeline.errors import UserError
from pipeline.runtime.engine import init_ranks
from shard_tools.cores import cores


@pytest.fixture
def taken():
    """A port on which another process listens."""
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        yield s.getsockname()[1]


def words(shards, folder):
    values = [word for value in tiny_overrides("mae") for word in ("--set", value)]
    return ["--data", shards / "train", "--output", folder / "run", "--recipe", "mae", *values]


def rank(number, port, *arguments, size=2, code=""):
    """One rank of two, or more, of the real trainer, or of Python code."""
    env = {k: v for k, v in os.environ.items() if k not in NAMES}
    env |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    program = ("-c", code) if code else ("pipeline/pretrain.py",)
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], env=env, cwd=ROOT,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def listens(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_launch_finds_a_free_port_when_none_is_given(tmp_path, taken):
    free = taken + 1
    while listens(free):
        free += 1
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/pretrain.py").write_text(RANK.replace('"env"', '"port"'))
    copy = tmp_path / "launch.sh"
    text = LAUNCH.read_text()
    assert text.count("range(20000, 32000), 12000") == 1
    copy.write_text(text.replace("range(20000, 32000), 12000", f"({taken}, {free}), 2"))
    clean = {k: v for k, v in os.environ.items() if k not in NAMES}
    env = clean | {"VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu"}
    for _ in range(4):  # drawn at random
        done = subprocess.run(
            ["bash", copy, "--ranks", "1", tmp_path, "end"], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f'"MASTER_PORT": "{free}"' in (tmp_path / "rank-0").read_text()


def test_a_taken_port_is_a_sentence_and_the_other_rank_ends_too(taken, shards, tmp_path):
    """Rank 1 waits for the stranger that listens there, until launch.sh ends it."""
    process = start("--ranks", 2, *words(shards, tmp_path), MASTER_PORT=str(taken))
    said = process.stderr.readline()
    begun = time.monotonic()
    code, _, rest = finish(process, 60)
    assert time.monotonic() - begun < 6
    assert (code, rest) == (2, "")
    assert said.startswith(f"error: MASTER_PORT {taken} is taken, perhaps by another run")


# Ranks that have met stay until the folder has a file "end", and then still reach each other.
STAY = """
import sys, time
from pathlib import Path
from pipeline.distributed import any_rank
from pipeline.errors import UserError
from MODULE import FUNCTION
folder = Path(sys.argv[1])
try:
    number = FUNCTION().rank
except UserError as error:
    sys.exit(f"error: {error}")
(folder / str(number)).touch()
while not (folder / "end").exists():
    time.sleep(0.1)
print(any_rank(number == 1))
"""


@pytest.mark.parametrize(
    ("module", "function"),
    [("pipeline.runtime.engine", "init_ranks"), ("eval.shared.cli", "join_ranks")],
)
def test_a_rank_of_another_run_on_the_port_is_refused(module, function, tmp_path, free_port):
    """It comes while the first run, of two ranks, is there; or is one of four."""
    code = STAY.replace("MODULE", module).replace("FUNCTION", function)
    ranks = [rank(number, free_port, tmp_path, code=code) for number in range(2)]
    try:
        for number in range(2):
            wait_for((tmp_path / str(number)).exists, 60)
        for size, found in ((2, "another rank 1"), (4, "a run of 2 ranks")):
            ranks.append(rank(1, free_port, tmp_path, size=size, code=code))
            said = ranks[-1].communicate(timeout=60)[1]
            assert ranks[-1].returncode == 1
            assert said.startswith(f"error: rank 1 of {size} found {found} at 127.0.0.1:")
        (tmp_path / "end").touch()
        assert [r.communicate(timeout=60)[0] for r in ranks[:2]] == ["True\n"] * 2
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_rank_of_another_run_that_comes_first_does_not_train_with_it(shards, tmp_path, free_port):
    """As the second of two deepspeed commands at once would: both runs end with a sentence."""
    run, other = words(shards, tmp_path), [*words(shards, tmp_path / "other"), "--set", "seed=7"]
    ranks = [rank(0, free_port, *run), rank(1, free_port, *other)]
    said = [r.communicate(timeout=60)[1] for r in ranks]
    assert [r.returncode for r in ranks] == [2, 2]
    assert said[0].startswith(
        f"error: rank 1 on {socket.gethostname()}: not the settings of rank 0"
    )
    assert "(recipe.seed: 7 != 0)" in said[0]
    assert [text.count("\n") for text in said] == [1, 0]  # one line per host
    assert not (tmp_path / "run").exists()


KNN = "import runpy; runpy.run_path('eval/knn.py', run_name='__main__')"


def test_a_rank_of_another_evaluation_that_comes_first_is_not_mixed_in(shards, tmp_path, free_port):
    """Both end with a sentence; the features of two encoders would have been one result."""
    words = ["--train", shards / "train", "--val", shards / "val", "--workers", "0"]
    words += ["--encoder", "random", "--arch", "vit_tiny_patch16_224", "--output", tmp_path / "r"]
    words += ["--options", "{img_size: 16, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"]
    ranks = [rank(n, free_port, *words, "--seed", n, code=KNN) for n in range(2)]
    said = [r.communicate(timeout=100)[1] for r in ranks]
    assert [r.returncode for r in ranks] == [2, 2], said
    for text in said:
        assert "rank 1 on" in text
        assert "was not given the options of rank 0: --seed (0, now 1)" in text
    assert not (tmp_path / "r.json").exists()


# A rank says that it is here, and then whether it met another.
MEET = """
from pipeline.distributed import any_rank
from eval.shared.cli import join_ranks
print("here", flush=True)
number = join_ranks().rank
print(any_rank(number == 1))
"""


def test_ranks_that_torchrun_starts_again_meet(free_port, monkeypatch):
    """Its store outlives them, and its agents count restarts each for itself. Of the second start a
    rank is killed while it waits for the others; in the third rank 1 is the last to come."""
    store = torch.distributed.TCPStore("127.0.0.1", free_port, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks = [rank(number, free_port, code=MEET) for number in range(2)]
    try:
        assert [r.communicate(timeout=60)[0] for r in ranks] == ["here\nTrue\n"] * 2
        ranks.append(rank(1, free_port, code=MEET))
        ranks[2].stdout.readline()
        time.sleep(0.5)
        ranks[2].kill()
        for number in range(2):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(2 - number))
            ranks.append(rank(number, free_port, code=MEET))
            ranks[-1].stdout.readline()
        assert [r.communicate(timeout=60)[0] for r in ranks[3:]] == ["True\n"] * 2
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
        del store


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_waits_for_others_ends_at_sigterm(number, shards, tmp_path, free_port):
    """Rank 0 waits for rank 1 to come, rank 1 for rank 0 to listen."""
    process = rank(number, free_port, *words(shards, tmp_path))
    try:
        if number == 0:
            wait_for(lambda: listens(free_port), 60)
        else:
            time.sleep(8)
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert time.monotonic() - begun < 5
    finally:
        process.kill()
        process.communicate()


def test_the_survivor_of_a_failed_start_ends_with_a_sentence(shards, tmp_path, free_port):
    """Rank 1 is killed when the ranks have met and build their models."""
    ranks = [rank(number, free_port, *words(shards, tmp_path)) for number in range(2)]
    try:
        wait_for(lambda: (tmp_path / "run/lock").exists(), 60)
        ranks[1].kill()
        begun = time.monotonic()
        _, error = ranks[0].communicate(timeout=60)
        assert time.monotonic() - begun < 5
        assert ranks[0].returncode == 1
        lines = [line for line in error.splitlines() if line.startswith("error")]
        assert len(lines) == 1
        assert "lost contact with another rank" in lines[0]
        assert "Traceback" not in error
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# The threads of the groups that a run makes: whether there are any, and how many it leaves.
THREADS = """
from pathlib import Path
from pipeline.distributed import any_rank, close
gloo = lambda: sum("gloo" in p.read_text() for p in Path("/proc/self/task").glob("*/comm"))
any_rank(True); print(gloo() > 0); close(); print(gloo())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize(("bound", "each"), [(True, 1), (False, None)])
def test_ranks_share_the_cores_that_they_may_both_use(bound, each, free_port):
    """A rank that is bound to a core of its own has it all, the others divide what there is.

    Afterwards none of its threads is left to abort the process at its end.
    """
    code = "import os, sys; mine = sorted(os.sched_getaffinity(0))[int(os.environ['RANK'])]\n"
    code += f"if {bound}: os.sched_setaffinity(0, [mine])\n"
    code += "from pipeline.runtime.engine import init_ranks; import torch\n"
    code += "print(init_ranks().cores, torch.get_num_threads())" + THREADS
    ranks = []
    for number in range(2):
        env = {k: v for k, v in os.environ.items() if k not in (*NAMES, "OMP_NUM_THREADS")}
        env |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        ranks.append(
            subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE)
        )
    share = each or max(1, cores() // 2)
    assert [r.communicate(timeout=60)[0].split() for r in ranks] == [
        [str(share)] * 2 + ["True", "0"]
    ] * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "2"), ("RANK", "-1"), ("RANK", ""), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"),
        ("LOCAL_RANK", "a"), ("MASTER_PORT", "65536"), ("MASTER_PORT", "0"),
    ],
)  # fmt: skip
def test_an_environment_that_is_no_ranks_is_refused(name, value, monkeypatch):
    right = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "65535"}
    for key, text in (right | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(key, text)
    check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is {value!r}: must be a number"):
        check_environment()


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_single_runs_that_mpirun_or_srun_started(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "1")
    check_environment()
    monkeypatch.setenv(name, "8")
    with pytest.raises(UserError, match=f"{name} is 8 and WORLD_SIZE is not set"):
        check_environment()
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_environment()


def test_a_shell_of_srun(monkeypatch):
    """`srun -n 8 --pty bash`, of which only the first task has a terminal."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PTY_PORT", "44577")
    check_environment()


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_that_cannot_meet_the_others_does_not_wait(name, capsys, monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, {"WORLD_SIZE": "2", "MASTER_PORT": "29400"}.get(key, "1"))
    monkeypatch.delenv(name)
    assert pretrain.main([]) == 2
    assert f"error: {name} is not set: with WORLD_SIZE 2" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"{name} is not set: with WORLD_SIZE 2"):
        init_ranks()


def test_the_number_that_mpirun_gave_the_launcher(shards, tmp_path):
    """`mpirun -n 1 launch.sh` gives every rank 0, which DeepSpeed compares with LOCAL_RANK."""
    env = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    code, out, err = finish(
        start("--ranks", 1, *words(shards, tmp_path), "--max-steps", 1, **env), 90
    )
    assert code == 0, err
    assert "done: step 1" in out


def test_where_another_run_met_is_nothing_to_a_single_process(shards, tmp_path):
    """An interactive shell, or a batch script that exports for several nodes, has left these."""
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | {"OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "pipeline/pretrain.py", "--max-steps", "1"]
    command += map(str, words(shards, tmp_path))
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "done: step 1" in done.stdout


def test_too_few_open_files_to_meet(shards, tmp_path):
    command = [sys.executable, "pipeline/pretrain.py", *map(str, words(shards, tmp_path))]
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | {"OMP_NUM_THREADS": "1"}
    limited = ["bash", "-c", 'ulimit -n 20; exec "$@"', "bash", *command]
    done = subprocess.run(limited, env=env, cwd=ROOT, text=True, capture_output=True, timeout=90)
    assert done.returncode == 2
    assert "error: a process may open only 20 files here, too few for the ranks" in done.stderr

"""The page about this machine: what stops a run, what only costs something, and the exit code."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import doctor
from pipeline.gpu_errors import why_no_gpu
from pipeline.kernels import backend
from pipeline.processor import Processor, processor

ROOT = Path(__file__).parents[2]


def grades(findings):
    return {finding.what: finding.grade for finding in findings}


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update"


def cuda(count, build="13.0", major=8, name="NVIDIA A100", told=TOO_OLD):
    """What the doctor reads of torch, on a machine that this one is not."""
    about = SimpleNamespace(name=name, total_memory=80 << 30, major=major, minor=0)

    def init():
        if told:
            raise RuntimeError(told + "\nmore")

    return SimpleNamespace(
        __version__="2.14.1",
        version=SimpleNamespace(cuda=build),
        cuda=SimpleNamespace(
            is_available=lambda: count > 0,
            device_count=lambda: count,
            get_device_properties=lambda number: about,
            get_arch_list=lambda: ["sm_70", "sm_80", "sm_90", "compute_90"],
            init=init,
            nccl=SimpleNamespace(version=lambda: (2, 27, 7)),
        ),
        distributed=SimpleNamespace(is_nccl_available=lambda: True),
    )


def driver(tmp_path):
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\nGCC version"
    (tmp_path / "driver/nvidia/version").write_text(text)
    return tmp_path


def test_gpus_driver_and_nccl(tmp_path):
    findings = list(doctor.gpu_findings(cuda(2), driver(tmp_path)))
    assert [f.what for f in findings] == ["GPU 0", "GPU 1", "driver", "NCCL"]
    assert findings[0].found == "NVIDIA A100, 80 GiB, sm_80"
    assert findings[2].found == "570.86.15, torch's CUDA 13.0"
    assert findings[3].found == "2.27.7"
    assert set(grades(findings).values()) == {"ok"}
    assert next(iter(doctor.gpu_findings(cuda(1, major=7), tmp_path))).grade == "lack"


@pytest.mark.parametrize(
    ("build", "has_driver", "cost"),
    [
        (None, True, "built without CUDA: install the CUDA build"),
        ("13.0", True, f"does not start on its driver ({TOO_OLD}): update the driver, or"),
        (None, False, "training runs on the CPU"),
        ("13.0", False, "training runs on the CPU"),
    ],
)
def test_why_no_gpu_is_used(build, has_driver, cost, tmp_path):
    proc = driver(tmp_path) if has_driver else tmp_path
    finding = next(iter(doctor.gpu_findings(cuda(0, build), proc)))
    assert finding.grade == "lack"  # a run starts without one
    assert cost in finding.cost


def test_what_hides_the_gpus_is_named(tmp_path, monkeypatch):
    torch, proc = cuda(0, told="No CUDA GPUs are available"), driver(tmp_path)
    assert why_no_gpu(torch, proc).endswith("(No CUDA GPUs are available): see nvidia-smi")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7f")
    assert why_no_gpu(torch, proc).endswith(
        "(No CUDA GPUs are available): see nvidia-smi, and CUDA_VISIBLE_DEVICES, which is 'GPU-7f'"
    )
    fabric = "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"
    assert "): nvidia-fabricmanager does not run on" in why_no_gpu(cuda(0, told=fabric), proc)
    assert "(it finds none)" in why_no_gpu(cuda(0, told=""), proc)
    assert why_no_gpu(cuda(0), tmp_path / "nowhere") == ""


def test_gpus_of_two_kinds_and_one_that_torch_has_no_code_for(tmp_path):
    torch, two = cuda(2), [("NVIDIA A100", 8), ("NVIDIA H100", 9)]
    abouts = [cuda(1, name=name, major=major).cuda.get_device_properties(0) for name, major in two]
    torch.cuda.get_device_properties = abouts.__getitem__
    findings = list(doctor.gpu_findings(torch, driver(tmp_path)))
    assert [f.grade for f in findings[:3]] == ["ok", "ok", "lack"]
    assert findings[2].found == "2 kinds"
    finding = next(iter(doctor.gpu_findings(cuda(1, major=6), tmp_path)))
    assert finding.grade == "STOP"
    assert "has no code for sm_60 (but for sm_70, sm_80, sm_90, compute_90)" in finding.cost


def test_the_compiler_is_looked_for_where_a_run_looks(monkeypatch, tmp_path):
    """nvcc is often not on PATH, but in its toolkit."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch(mode=0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "triton_finding", lambda torch: doctor.ok("Triton", "runs"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = next(iter(doctor.build_findings(torch)))
    assert (sys.executable in found.found, "nvcc" in found.found) == (True, True)
    (tmp_path / "bin/nvcc").unlink()
    found = next(iter(doctor.build_findings(torch)))
    assert found.grade == "lack"
    assert "without nvcc" in found.cost


def test_triton_that_does_not_run_costs_speed(monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda device: "no C compiler")
    finding = doctor.triton_finding(torch)
    assert finding.grade == "lack"
    assert finding.cost.startswith("no C compiler; PyTorch's references run in")
    monkeypatch.setattr(backend, "triton_problem", lambda device: "")
    assert doctor.triton_finding(torch) == doctor.ok("Triton", "runs")


def test_processor(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu avx2 avx512_bf16\n\n")
    found = grades(doctor.processor_findings(torch, tmp_path))
    assert (found["vector units"], found["bf16 on the CPU"]) == ("ok", "ok")
    (tmp_path / "cpuinfo").write_text("model name\t: One: 2\nFeatures\t: fp bf16\n\nFeatures: fp\n")
    assert processor(tmp_path) == Processor("One: 2", frozenset({"fp", "bf16"}))
    assert processor(tmp_path / "none") == Processor("", frozenset())
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse2\n")
    found = grades(doctor.processor_findings(torch, tmp_path))
    assert (found["vector units"], found["bf16 on the CPU"]) == ("lack", "lack")


def test_memory_is_that_of_the_cgroup(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/\n")
    mount = f"24 30 0:21 / {tmp_path}/fs rw shared:4 - cgroup2 cgroup2 rw\n"
    (tmp_path / "self/mountinfo").write_text(mount)
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs/memory.max").write_text(f"{2 << 30}\n")
    finding = doctor.memory_finding(tmp_path)
    assert finding.found == "2.0 GiB (limit of the cgroup)"
    assert finding.grade == "lack"


def test_shared_memory_and_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    found = {f.what: f for f in doctor.system_findings(tmp_path / "no-shm")}
    assert "--workers 0" in found[str(tmp_path / "no-shm")].cost
    assert found["open files"].grade == "lack"
    assert "ulimit -n 4096" in found["open files"].cost


def test_a_check_that_is_not_built_says_what_it_costs(monkeypatch):
    assert doctor.check_finding().grade == "ok"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    finding = doctor.check_finding()
    assert finding.grade == "lack"
    assert "_jpegcheck.c is not built" in finding.cost


def test_the_output_folder(tmp_path):
    findings = list(doctor.folder_findings(tmp_path / "not/there/yet"))
    assert "STOP" not in grades(findings).values()
    assert not list(tmp_path.iterdir())  # nothing is left behind
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for output, said in (
        (tmp_path / "file", "is a file; --output is a folder"),
        (tmp_path / "file/run", f"cannot be written ({tmp_path}/file: Not a directory)"),
        (tmp_path / "link", "cannot be written (a link to nothing)"),
        (tmp_path / ("a" * 300), "cannot be written (File name too long)"),
        (Path("/proc/run"), "cannot be written (/proc: "),
        (Path("s3://a/b"), "it is a URL; only local files are written"),
    ):
        (finding,) = doctor.folder_findings(output)
        assert finding.grade == "STOP", output
        assert said in finding.found


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    inner = str(tmp_path / "a b").replace(" ", "\\040")
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/x {inner} nfs4 rw 0 0\n")
    (tmp_path / "a b/run").mkdir(parents=True)
    assert doctor.file_system(tmp_path / "a b/run", mounts) == "nfs4"
    assert doctor.file_system(tmp_path, mounts) == "ext4"


def test_a_page_names_what_stops_a_run():
    page = doctor.page(
        [doctor.ok("a", "1"), doctor.lack("bb", "2", "slow"), doctor.stop("c", "3", "x")]
    )
    assert page.splitlines()[:2] == ["ok    a   1", "lack  bb  2"]
    assert page.splitlines()[2].endswith("→ slow")
    assert page.endswith("no run can start here: c")
    assert doctor.page([doctor.lack("a", "1", "x")]).endswith(
        "a run can start; 1 of 1 lines name a lack"
    )


def test_this_machine_passes_and_a_bad_output_does_not(tmp_path, capsys):
    assert doctor.main(["--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    parts = "Python, GPU, NCCL, compiler, DeepSpeed's ops, image decoder, JPEG check"
    for what in (
        parts + ", /dev/shm, open files, shared folder, vector units, bf16, memory, cores"
    ).split(", "):
        assert what in out
    assert doctor.main(["--output", "/proc/run"]) == 1


@pytest.mark.parametrize("name", ["checkpoints", "encoder", "pictures", "failure.txt"])
def test_what_stands_in_the_way_in_an_output(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "failure.txt" else path.write_text("")
    finding = next(doctor.folder_findings(tmp_path))
    assert finding.grade == doctor.STOP
    assert str(path) in finding.found


def test_ranks_need_a_loopback(tmp_path):
    """A network namespace that is new has its loopback down."""
    command = [sys.executable, "-m", "pipeline.doctor", "--output", tmp_path]
    made = ["unshare", "--user", "--map-root-user", "--net", *map(str, command)]
    if subprocess.run([*made[:4], "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    done = subprocess.run(made, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert "STOP loopback 127.0.0.1 cannot be reached (Network is unreachable)" in said
    assert done.stdout.endswith("no run can start here: loopback\n")


def test_without_torch_it_says_so():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-m", "pipeline.doctor"]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "without torch, torchvision, deepspeed" in done.stdout
    assert done.stdout.rstrip().endswith("no run can start here: packages")


def test_a_broken_torch_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "pipeline.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "STOP  torch" in done.stdout
    assert "libcudart.so.13: cannot open" in done.stdout

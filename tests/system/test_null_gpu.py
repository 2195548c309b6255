"""The stand-in for a GPU counts what torch sends it (all stages run on it in test_gpu_check.py)."""

import json
import subprocess
import sys
from pathlib import Path

import null_gpu
import pytest

ROOT = Path(__file__).parents[2]
FEW_OPS = """
import json, null_gpu, torch
def change(call):
    before = null_gpu.counts()
    call()
    return [b - a for a, b in zip(before, null_gpu.counts())]
x, h = torch.empty(64, device="cuda"), torch.ones(64).pin_memory()
def sequence():
    x.copy_(h, non_blocking=True); x.add_(1); x.mul_(x)
print(json.dumps([change(sequence), change(lambda: x.sum().item()),
                  change(torch.cuda.synchronize), float(torch.tensor(3.5, device="cuda"))]))
"""


@pytest.fixture(scope="module")
def on_null_gpu(tmp_path_factory):
    try:
        environment = null_gpu.environment(tmp_path_factory.mktemp("gpu"))
    except null_gpu.NoCompilerError as error:
        pytest.skip(str(error))
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/helpers'}"

    def run(code):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_it_is_seen_whatever_the_environment_hides(monkeypatch, tmp_path):
    monkeypatch.setattr(null_gpu, "build", lambda folder: folder / "libcuda.so.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # torch would count no device
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not {"CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"} & null_gpu.environment(tmp_path).keys()


def test_it_counts_launches_copies_waits_and_reads(on_null_gpu):
    sequence, item, wait, number = on_null_gpu(FEW_OPS)
    assert sequence == [2, 1, 0, 0]
    assert item[0] in (1, 2)  # the sum is one launch, or two
    assert item[1:] == [1, 1, 1]
    assert wait == [0, 0, 1, 0]
    assert number == 3.5

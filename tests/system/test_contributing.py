"""CONTRIBUTING.md's code: each addition is made to a copy of the checkout, and used there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_overrides

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(python|diff) file=(\S+)\n(.*?)```", re.DOTALL)


def sections() -> dict[str, str]:
    """The additions by their heading."""
    parts = re.split(r"^### (.+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def apply(folder: Path, section: str) -> None:
    """Add a section's blocks to a copy: new files whole, diffs where their context stands once."""
    blocks = BLOCK.findall(section)
    assert blocks
    for kind, name, body in blocks:
        path = folder / name
        if kind == "python":
            assert not path.exists(), f"{name} is already there"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
            continue
        lines = body.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: the context of the diff stands there other than once"
        path.write_text(text.replace(old, new))


@pytest.fixture
def copy(tmp_path):
    """A copy of the packages, to which things can be added."""
    for name in ("pipeline", "eval", "shard_tools", "ds_configs", "tests/helpers", "tests/bench"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def run(copy: Path, script: str, *words: object, code: int = 0) -> str:
    """A command of the copy as a user runs it; its output."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {k: v for k, v in os.environ.items() if k not in ranks}
    env["PYTHONPATH"] = f"{copy}{os.pathsep}{copy / 'tests/helpers'}"
    command = [sys.executable, copy / script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=copy, timeout=240)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def train(copy: Path, shards: Path, *overrides: str, code: int = 0, recipe: str = "rmae") -> str:
    """Two tiny steps of the copy's pretraining into copy/run."""
    words = [w for o in (*tiny_overrides(recipe), "monitor.log_steps=1", *overrides)
             for w in ("--set", o)]  # fmt: skip
    return run(
        copy, "pipeline/pretrain.py", "--recipe", recipe, "--ds_config", "zero0",
        "--data", shards / "train", "--output", copy / "run", "--max-steps", 2, *words, code=code,
    )  # fmt: skip


def losses(copy: Path) -> list[float]:
    return [json.loads(r)["loss"] for r in (copy / "run/metrics.jsonl").read_text().splitlines()]


MEASURE = "measure={kind: smooth_l1, beta: 0.5, decoder: {width: 8, depth: 1, heads: 2}}"


def test_a_measure_is_one_file_and_one_line(copy, shards):
    assert "none of reconstruction, infonce, byol" in train(copy, shards, MEASURE, code=2)
    apply(copy, sections()["A similarity measure"])
    train(copy, shards, MEASURE)
    assert len(losses(copy)) == 2
    assert all(0 < loss < 10 for loss in losses(copy))
    assert list((copy / "run/pictures").glob("*.png"))  # it reconstructs
    val = ("--val", shards / "val", "--workers", 0)
    run(copy, "eval/psnr.py", "--encoder", copy / "run", *val)
    run(copy, "eval/report.py", copy / "run", "--output", copy / "page.html")
    assert "smooth_l1" in (copy / "page.md").read_text()


def test_its_distance_is_the_published_one(copy):
    apply(copy, sections()["A similarity measure"])
    code = """
import torch
from pipeline.method.measures.smooth_l1 import SmoothL1
a = torch.tensor([[[0.0, 0.1]], [[1.0, -3.0]]])
owner = type("", (), {"recipe": type("", (), {"beta": 0.5})})
found = SmoothL1.mean(owner, a, torch.zeros_like(a), None)
plain = (0 + 0.1**2 / 1.0 + (1 - 0.25) + (3 - 0.25)) / 4
assert abs(float(found) - plain) < 1e-6, (found, plain)
"""
    env = os.environ | {"PYTHONPATH": str(copy)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=copy)


def test_a_masking_policy_is_one_function_and_one_line(copy, shards):
    assert "random or block" in train(copy, shards, "views.mask=columns", code=2)
    train(copy, shards, "views.mask=block")
    shutil.rmtree(copy / "run")
    apply(copy, sections()["A masking policy"])
    train(copy, shards, "views.mask=columns")
    assert all(0 < loss < 10 for loss in losses(copy))
    code = """
import torch
from pipeline.method.masking import Draw, select
draw = Draw(torch.arange(50), 3, 0, 0, (3, 5), 9)
visible, masked, _ = select("columns", draw)
assert visible.shape == (50, 6)
columns = {tuple(sorted(set((row % 5).tolist()))) for row in visible}
assert all(len(c) == 2 and (c[1] - c[0]) % 5 in (1, 4) for c in columns), columns
assert len(columns) == 5
"""
    env = os.environ | {"PYTHONPATH": str(copy)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=copy)


def test_an_optimizer_is_one_file_and_its_word(copy, shards):
    assert "'adamw' or 'muon'" in train(copy, shards, "optimizer.kind=sgd", code=2)
    apply(copy, sections()["An optimizer"])
    assert "optimizer: SGD with momentum" in train(copy, shards, "optimizer.kind=sgd")
    assert all(0 < loss < 10 for loss in losses(copy))
    saved = next((copy / "run/checkpoints").glob("step-*"))
    assert (saved / "momentum_buffer.safetensors").is_file()


def test_muon_trains(copy, shards):
    said = train(copy, shards, "optimizer.kind=muon")
    assert "optimizer: Muon for the matrices of the blocks" in said
    assert all(0 < loss < 10 for loss in losses(copy))


def test_a_protocol_is_one_file_and_one_row(copy, shards):
    apply(copy, sections()["An evaluation protocol"])
    train(copy, shards, recipe="mae")
    sets = ("--train", shards / "train", "--val", shards / "val", "--workers", 0)
    said = run(copy, "eval/nearest_mean.py", "--encoder", copy / "run", *sets)
    top1 = re.search(r"top-1 ([\d.]+) %", said)[1]
    run(copy, "eval/report.py", copy / "run", "--output", copy / "page.html")
    page = (copy / "page.md").read_text()
    assert "nearest mean" in page
    assert top1 in page
    assert "not shown" not in page
    shard_words = ("--train", shards / "train", "--val", shards / "val")
    plan = run(copy, "eval/reproduce.py", "--table", 4, "--scale", "mini", "--rows", "MAE",
               "--dry-run", "--also", "nearest-mean", "--set", "batch_size=64",
               *shard_words)  # fmt: skip
    assert "eval/nearest_mean.py" in plan


def test_a_data_source_is_one_function_and_one_line(copy, tmp_path, shards):
    images = sorted((shards / "images" / "train").rglob("*.*"))[:5]
    listing = tmp_path / "some.txt"
    listing.write_text("".join(f"{path}\n" for path in images))
    run(copy, "shard_tools/make_shards.py", listing, tmp_path / "no", code=2)
    apply(copy, sections()["A data source"])
    run(copy, "shard_tools/make_shards.py", listing, tmp_path / "out")
    assert "sound" in run(copy, "shard_tools/verify_shards.py", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert sum(s["samples"] for s in manifest["shards"]) == 5


LISTS = """
from kernels_compiled import compile_for, recorded, run_case
from pipeline.kernels.cases import all_cases, ops
from bench_gpu import calls
from pipeline.kernels.cases import Sizes
import torch
assert "double" in ops()
assert "double" in calls(Sizes(2, side=32, patch=8, width=16, decoder=16, keep=4))
with recorded() as launches:
    run_case(all_cases()["double"], torch.bfloat16, "vit-b16")
compiled = compile_for(launches[0], 90)
assert compiled.spills == 0 and max(compiled.loads) == 128, compiled
"""
RUN = """
import torch
from pipeline import kernels
from pipeline.kernels.double import double
x = torch.randn(3, 700)
for kind in ("reference", "triton"):
    kernels.use(kind)
    assert torch.equal(double(x), 2 * x), kind
"""


def test_a_kernel_is_a_folder_that_every_list_finds(copy):
    """Compiled for a GPU that is not here, timed by the bench's list, and run on the CPU."""
    apply(copy, sections()["A kernel"])
    paths = (copy, copy / "tests/helpers", copy / "tests/bench")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    compiling = {k: v for k, v in env.items() if k != "TRITON_INTERPRET"}
    for code, where in ((LISTS, compiling), (RUN, env | {"TRITON_INTERPRET": "1"})):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=copy, env=where
        )
        assert done.returncode == 0, done.stderr[-2000:]

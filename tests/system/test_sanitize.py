"""The C extensions under sanitizers, and proof that they see a slip in each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLIPS = {
    "pipeline/data/_entropy.h": ("(size_t)(end - at) + SLACK;", "(size_t)(end - at);"),
    "pipeline/data/_resize.h": (
        "calloc((size_t)out * axis->taps,", "calloc((size_t)out * axis->taps - 1,"),
    "shard_tools/image_file/_jpegcheck.c": (
        "(size_t)(walk->end - at) + SLACK", "(size_t)(walk->end - at)"),
    "shard_tools/image_file/_jpegmarkers.c": ("malloc(job->length + coded)", "malloc(coded)"),
}  # fmt: skip


def run(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "tests" / "sanitize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    if done.returncode == 2:
        pytest.skip("no compiler with sanitizers, or no jpeglib.h")
    return done


def test_the_extensions_are_clean() -> None:
    done = run(ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no report" in done.stdout


@pytest.mark.parametrize("name", list(SLIPS))
def test_a_slip_is_seen(tmp_path: Path, name: str) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("pipeline", "shard_tools", "tests/sanitize", "tests/helpers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    if (ROOT / "build/sanitize").exists():  # of the extensions that stay as they are
        shutil.copytree(ROOT / "build/sanitize", tmp_path / "build/sanitize")
    source, slip = tmp_path / name, SLIPS[name]
    assert slip[0] in source.read_text()
    source.write_text(source.read_text().replace(*slip))
    done = run(tmp_path)
    assert done.returncode == 1
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr

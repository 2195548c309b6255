"""The C extension under sanitizers, and proof that they see a slip in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLIP = ("calloc((size_t)out * axis->taps,", "calloc((size_t)out * axis->taps - 1,")


def run(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "tests" / "sanitize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    if done.returncode == 2:
        pytest.skip("no compiler with sanitizers, or no jpeglib.h")
    return done


def test_the_extension_is_clean_and_a_slip_in_it_is_seen(tmp_path: Path) -> None:
    done = run(ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no report" in done.stdout
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("pipeline", "shard_tools", "tests/sanitize", "tests/helpers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    source = tmp_path / "pipeline" / "data" / "_jpegcrop.c"
    assert SLIP[0] in source.read_text()
    source.write_text(source.read_text().replace(*SLIP))
    done = run(tmp_path)
    assert done.returncode == 1
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr

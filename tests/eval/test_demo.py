"""The demo: photographs, shards, two pretrainings, probes and report, by the real commands."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval import demo
from eval.shared.demo_shards import make_demo_shards
from pipeline.errors import UserError
from shard_tools.manifest import read_manifest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Page(HTMLParser):
    """Collects the sources of pictures and links."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href") and v]


def test_the_demo_from_photographs_to_report(tmp_path):
    """Everything that `make demo` does, with a smaller model and fewer images."""
    small = [
        "encoder.options={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
        "optimizer.epochs=2", "optimizer.warmup_epochs=1", "monitor.log_steps=1",
    ]  # fmt: skip
    command = [
        sys.executable, "eval/demo.py", "--output", tmp_path / "runs", "--data", tmp_path / "data",
        "--train", "256", "--val", "64", "--ranks", "2",
    ]  # fmt: skip
    for override in small:
        command += ["--set", override]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=400, cwd=ROOT,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = tmp_path / "runs/report.html"
    assert f"report: {report}" in done.stdout
    assert "gain" in done.stdout
    page = Page()
    page.feed(report.read_text())
    assert sum(s.startswith("data:image/png") for s in page.sources) >= 2
    assert not [s for s in page.sources if s.startswith(("http", "//"))]


def test_the_demo_removes_only_what_a_demo_wrote(tmp_path):
    runs, data = tmp_path / "runs", tmp_path / "data"
    (runs / "rmae-20260101").mkdir(parents=True)
    with pytest.raises(UserError, match=r"runs: has rmae-20260101, which no demo wrote"):
        demo.clear(runs)
    assert (runs / "rmae-20260101").is_dir()
    (runs / "rmae-20260101").rename(runs / "demo_rmae-best")
    with pytest.raises(UserError, match=r"demo_rmae-best, which no demo wrote"):
        demo.clear(runs)
    old = tmp_path / "old"
    (old / "demo_rmae-0").mkdir(parents=True)
    (old / "report.html").write_text("")
    demo.clear(old)
    assert not old.exists()
    (data / "shards" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data/shards: no demo wrote it"):
        make_demo_shards(data, 256, 64)
    (data / "shards/done.json").write_text('{"source": "cifar-10-python.tar.gz", "bytes": 3}')
    with pytest.raises(UserError, match=r"data/shards: no demo wrote it"):
        make_demo_shards(data, 256, 64)
    assert (data / "shards" / "train").is_dir()
    photographs = tmp_path / "mine" / "images" / "cat.jpg"
    photographs.parent.mkdir(parents=True)
    photographs.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"photographs from .* failed with exit code 2"):
        make_demo_shards(tmp_path / "mine", 256, 64)
    assert photographs.read_bytes() == b"mine"


def test_shards_that_are_there_are_left(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    done = tmp_path / "shards/done.json"
    for record, size in (({"size": 120}, 120), ({}, 80)):  # earlier ones had no size
        done.write_text(json.dumps({"train": 256, "val": 64} | record))
        make_demo_shards(tmp_path, 256, 64, size)
        assert "demo shards are there" in capsys.readouterr().out
    make_demo_shards(tmp_path, 32, 16, 40)
    assert json.loads(done.read_text()) == {"train": 32, "val": 16, "size": 40}
    assert set(read_manifest(tmp_path / "shards/train").index["width"]) == {40}


def test_bad_input_is_one_sentence_and_exit_2(tmp_path):
    (tmp_path / "file").write_text("")
    for words, sentence in (
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--ranks", "3"], "--ranks 3: must be a divisor of 8"),
        (["--output", tmp_path / "file"], f"{tmp_path}/file: cannot be written (Not a directory)"),
        (
            ["--output", tmp_path / "o", "--data", tmp_path / "file"],
            "/file: cannot be written",
        ),
    ):
        command = [sys.executable, ROOT / "eval/demo.py", *words]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert sentence in last
        assert "Traceback" not in done.stderr

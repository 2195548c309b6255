"""The demo: photographs, shards, two pretrainings, probes and report, by the real commands."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

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

"""CIFAR-10's page, and a slice of the study from the archive of images to the verdicts."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean

import pytest
from cifar_study import begun_study
from fake_cifar import CLASSES, write_archive

from eval.cifar_paper import archived_study, rebuild, write_page
from eval.shared.cifar_shards import BUILDING
from eval.studies import archive
from eval.studies.cheaper import cheaper_chapter
from eval.studies.cifar_claims import LONGER
from eval.studies.cifar_page import Facts
from eval.studies.tuning import read_trials
from shard_tools.manifest import read_manifest

ROOT = Path(__file__).parents[2]


class Tables(HTMLParser):
    """The numbers of cells of each row of each table."""

    def __init__(self):
        super().__init__()
        self.tables = []

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append(0)
        elif tag in ("td", "th"):
            self.tables[-1][-1] += 1


def test_a_page_of_a_begun_study_is_honest_and_its_archives_is_the_same(tmp_path):
    study = begun_study(tmp_path / "out")
    facts = Facts((3, 5, 9), 2, 7200.0, "core", ("mae-nothing-0 pretrain", "look"))
    (tmp_path / "out/facts.json").write_text(json.dumps(asdict(facts)))
    tables = study.tables()
    with archive.laid_out(tmp_path / "out") as folder:
        kept = replace(study, workspace=replace(study.workspace, output=folder))
        assert kept.tables() == tables  # to the last digit
        write_page(kept, facts, tmp_path / "out/report.html")
    archive.pack(tmp_path / "out", tmp_path / "a.tar.xz")
    rebuild(tmp_path / "a.tar.xz")
    for suffix in ("html", "md"):
        text = (tmp_path / f"out/report.{suffix}").read_text()
        assert (tmp_path / f"a.{suffix}").read_text() == text
        assert "Refuted here: none. Hold: 3. Undecided: 5. Not measured yet: 9." in text
        assert text.index("Claim 3 holds here") < text.index("Claim 5 is undecided here")
        assert "Claim 9" in text[text.index("5 is undecided here") :]
        assert "Not run, for want of time: 2 commands, named below." in text
        assert "mae-nothing-0 pretrain\nlook" in text
        assert "4 of 5 runs" not in text
        assert text.count("finished") >= 5  # each run's status, of its log
    lines = (tmp_path / "a.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| R-MAE - MAE"))
    assert "| PSNR (dB) (1 of 2 seeds) |" in row
    assert "no interval: fewer than two seeds" in row
    row = next(line for line in lines if line.startswith("| MAE, nothing masked"))
    assert row.split(" | ")[1:] == ["-", "-", "-", "not measured", "-", "- |"]
    row = next(line for line in lines if line.startswith("| R-MAE |"))
    assert row.split(" | ")[-2:] == ["23.7", f"{50.123456:.2f} (1 of 2 seeds) |"]
    parser = Tables()
    parser.feed((tmp_path / "a.html").read_text())
    assert len(parser.tables) > 6
    for table in parser.tables:
        assert len(set(table)) == 1, table  # no cell is missing


@pytest.mark.slow
def test_from_an_archive_of_images_to_verdicts_in_two_sittings(tmp_path):
    """Claim 6 with one seed: shards, tuning, pretraining, finetuning, training from scratch, page.

    Half a minute of two cores: nine real commands, the only run of all parts together.
    """
    source = write_archive(tmp_path / "cifar-10-binary.tar.gz", train=160, test=64)
    page = tmp_path / "page/cifar.tar.xz"
    words = [
        sys.executable, ROOT / "eval/cifar_paper.py", "--scale", "cifar-tiny", "--claims", "6",
        "--seeds", "1", "--cifar10", source, "--data", tmp_path / "data", "--output",
        tmp_path / "out", "--archive", page,
    ]  # fmt: skip
    words = list(map(str, words))
    theirs, half = tmp_path / "data/images/1.png", tmp_path / f"data/{BUILDING}/shards/train/0.tar"
    for path in (theirs, half):  # the latter of a call that was cut off
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    jobs = tmp_path / "out/jobs.jsonl"
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while first.poll() is None and not (jobs.is_file() and jobs.read_text().count("\n") >= 2):
        time.sleep(0.2)
    beside = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert beside.returncode == 2, beside.stdout + beside.stderr
    assert "another run holds this folder" in beside.stderr
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=60)[0].decode()
    assert first.returncode == 128 + signal.SIGTERM, output
    assert output.splitlines()[-1] == "error: stopped by SIGTERM"
    assert "Traceback" not in output
    assert read_manifest(tmp_path / "data/shards/train").classes == tuple(sorted(CLASSES))
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["images", "shards"]
    assert theirs.read_bytes() == b"x"
    begun = {json.loads(line)["name"] for line in jobs.read_text().splitlines()
             if json.loads(line)["code"] == 0}  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"claims": {"6": False}}
    names = Counter(json.loads(line)["name"] for line in jobs.read_text().splitlines()
                    if json.loads(line)["code"] == 0)  # fmt: skip
    assert begun <= names.keys()
    assert set(names.values()) == {1}  # nothing was done twice
    assert len(names) == 9
    trials = read_trials(tmp_path / "out/tuning.json")
    assert [(t.method, t.base_lr) for t in trials] == [("MAE", 5e-4), ("MAE", 2e-3)]
    report = (tmp_path / "out/report.md").read_text()
    assert "Claim 6 is undecided here" in report
    assert "Finetuning" not in report.split("## Learning rates")[0]
    again = subprocess.run(
        [*words[:2], "--page", str(page)], capture_output=True, text=True, timeout=100
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert (page.parent / "cifar.md").read_text() == report  # as the archive is called
    html = (tmp_path / "out/report.html").read_bytes()
    assert (page.parent / "cifar.html").read_bytes() == html
    assert "finished" in report.split("## Overview")[1]
    assert "## Learning rates" in report


def test_the_docs_have_the_archives_results():
    """Means over seeds, and how many of the differences hold."""
    text = (ROOT / "docs/cifar10.md").read_text()
    with archive.unpacked(ROOT / "docs/page/cifar10.tar.xz") as output:
        study, _ = archived_study(output)
        for name in ("MAE", "R-MAE", "C-MAE", "C-MAE without mask tokens", "MAE, cross decoder",
                     "MAE, decoder of 1 block", "MAE, 90 % masked", "MAE, growing images", "random",
                     *LONGER, "MAE, cross decoder, as long", "MAE, decoder of 1 block, as long",
                     "MAE, 90 % masked, as long", "MAE, growing images, as long",
                     "R-MAE, cross decoder, as long"):  # fmt: skip
            shown = name.replace("as long", f"for the time of {name.partition(',')[0]}")
            line = next(s for s in text.splitlines() if re.match(rf"\| {shown}[^,|]* \|", s))
            metrics = ("finetune", "fewshot", "linprobe", "psnr")
            for metric, cell in zip(metrics, line.split("|")[2:-1], strict=True):
                if cell.strip():
                    values = [study.value(name, seed, metric) for seed in range(3)]
                    digits = 2 if metric == "psnr" else 1
                    assert cell.split()[0] == f"{sum(values) / 3:.{digits}f}", (name, metric)
        judged = [one for found in study.judged().values() for one in found if one.apart]
        block, mae = ([mean(study.value(name, seed, metric) for seed in range(3))
                       for metric in ("finetune", "linprobe")]
                      for name in ("MAE, decoder of 1 block", "MAE"))  # fmt: skip
        roads = {row.cells[0].value: row.cells for row in cheaper_chapter(study).tables[0].rows}
    said = f"{block[0]:.1f} %, MAE {mae[0]:.1f} % (three seeds; linear probe {block[1]:.1f} and"
    assert f"{said} {mae[1]:.1f} %)" in " ".join((ROOT / "README.md").read_text().split())
    for name, shown in (
        ("MAE, decoder of 1 block", "decoder of 1 block (of 2)"),
        ("MAE, decoder of 1 block, as long", "decoder of 1 block, for the same time"),
        ("MAE, cross decoder, as long", "cross decoder, for the same time"),
        ("MAE, 90 % masked, as long", "90 % masked, for the same time"),
        ("MAE, growing images, as long", "growing images, for the same time"),
        ("R-MAE, cross decoder, as long", "R-MAE, cross decoder, for the same time"),
        ("R-MAE, cross decoder", "R-MAE, cross decoder, against"),
        ("MAE, cross decoder", "cross decoder"),
        ("MAE, 90 % masked", "90 % masked"),
        ("MAE, growing images", "growing images"),
    ):
        line = next(s for s in text.splitlines() if s.startswith(f"| {shown}"))
        shares = [cell.note.split()[0] for cell in roads[name][1:3]]
        judged_cells = roads[name][5], roads[name][7]
        apart = [f"{c.value} ({c.note})" if c.note else c.value for c in judged_cells]
        assert line.split("|")[2:-1] == [f" {cell} " for cell in (*shares, *apart)]
    holds = sum(one.verdict == "holds" for one in judged)
    assert f"of {len(judged)} paired differences, {holds} hold" in " ".join(text.split())
    assert all(one.verdict in ("holds", "undecided") for one in judged)
    for p, corrected in re.findall(r"p = (0\.\d+),\s+corrected (0\.\d+)", text):
        digits, more = len(p) - 2, len(corrected) - 2
        assert (p, corrected) in [(f"{x.p:.{digits}f}", f"{x.corrected:.{more}f}") for x in judged]

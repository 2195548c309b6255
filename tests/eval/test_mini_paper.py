"""Claims are judged by Student's interval; a slice of the paper in miniature, by its command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval import mini_paper
from eval.paper.commands import read_scale
from eval.reproduce import parse_args
from eval.studies.claims import CLAIMS, Difference, judge, verdict
from eval.studies.significance import interval
from eval.studies.study import wanted_metrics
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]


def values(table):
    return lambda row, metric: table[row, metric]


def test_pairs_count_not_the_spread_over_seeds():
    """Seeds that differ a lot, but always in the same direction by about the same."""
    table = {("a", "finetune"): [50.0, 70.0, 60.0], ("b", "finetune"): [48.0, 67.5, 57.9]}
    one = judge(Difference("a", "b", "finetune"), values(table))
    assert one.mean == pytest.approx((2 + 2.5 + 2.1) / 3)
    assert one.holds
    assert judge(Difference("b", "a", "finetune"), values(table)).verdict == "the opposite holds"


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ([3.0, 1.0, 2.0], [1.0, 2.0, 1.0], "undecided"),
        ([3.0], [1.0], "undecided"),  # one seed has no interval
        ([3.0, None, None], [1.0, 1.0, 1.0], "undecided"),
        ([None, None], [1.0, 1.0], "undecided"),
        ([3.0, 3.1, None], [1.0, 1.0, 1.0], "holds"),
        ([1.0, 1.0], [1.0, 1.0], "undecided"),  # no difference at all
    ],
)
def test_doubt_is_not_a_yes(first, second, word):
    one = judge(Difference("a", "b", "x"), values({("a", "x"): first, ("b", "x"): second}))
    assert one.verdict == word
    assert verdict([one]) is (word == "holds")
    assert not verdict([])


def test_a_claim_needs_all_its_differences():
    table = {("a", "x"): [3.0, 3.1], ("b", "x"): [1.0, 1.0], ("c", "x"): [3.0, 1.0]}
    sure, unsure = (judge(Difference(n, "b", "x"), values(table)) for n in ("a", "c"))
    assert verdict([sure, sure])
    assert not verdict([sure, unsure])


def test_every_claim_names_rows_and_metrics_that_are_made():
    wanted = wanted_metrics(CLAIMS, mini_paper.study_of(None, [], 1).names)
    assert wanted["random"] == ["finetune", "fewshot", "cka"]
    assert wanted["MAE"] == ["finetune", "fewshot", "psnr", "cka"]
    assert wanted["C-MAE without mask tokens"] == ["linprobe"]
    assert [mini_paper.paper_row(name).name for name in wanted][-1] == "supervised"
    assert [claim.number for claim in CLAIMS] == [1, 2, 3, 4, 5]
    expected = {"linprobe": 54.5, "finetune": 83.1, "fewshot": 67.5, "psnr": 22.2}
    assert mini_paper.paper_row("MAE").published == expected  # of Tab. 1 and of Tab. 4
    assert mini_paper.parse_args([]).options.seeds == 3
    with pytest.raises(SystemExit):
        mini_paper.parse_args(["--claims", "6"])
    assert parse_args(["--table", "1"]).options.seeds == 1


def test_cka_counts_all_blocks_where_most_is_dropped(tmp_path):
    workspace = mini_paper.Workspace(tmp_path, read_scale("mini"))
    study = mini_paper.study_of(workspace, [2], 2)
    folder = tmp_path / "mae-0" / "eval"
    folder.mkdir(parents=True)
    ways = (("kept-in-both", [[0, 0], [0.5, 0.75], [0.25, 0.5]]), ("all-kept", [[1, 1]] * 3))
    variants = [{"pool": pool, "hsic": "unbiased", "cka": table} for pool, table in ways]
    cka = {"ratios": [0.6, 0.7, 0.8], **variants[0], "variants": variants}
    (folder / "cka.json").write_text(json.dumps(cka))
    assert study.value("MAE", 0, "cka kept-in-both") == 0.5
    assert study.value("MAE", 0, "cka all-kept") == 1
    assert study.value("MAE", 1, "cka all-kept") is None


def test_a_key_that_the_rows_of_the_claims_have_may_be_changed(shards, tmp_path, capsys):
    """measure.lambda is of MAE and R-MAE (claim 5), not of C-MAE (claim 3)."""
    words = [
        "--seeds", "1", "--train", shards / "train", "--val", shards / "val", "--output",
        tmp_path / "mini", "--set", "measure.lambda=3", "--set", "batch_size=64", "--dry-run",
        "--claims",
    ]  # fmt: skip
    words = list(map(str, words))
    mini_paper.mini_paper(mini_paper.parse_args([*words, "5"]))
    out = capsys.readouterr().out
    assert "rmae-0 pretrain" in out
    assert "cmae" not in out
    with pytest.raises(UserError, match=r"cmae\.yaml: unknown key 'measure\.lambda'"):
        mini_paper.mini_paper(mini_paper.parse_args([*words, "3", "5"]))


@pytest.mark.slow
def test_a_slice_from_photographs_to_claims(shards, tmp_path):
    """Claim 5 with two seeds and a smaller model: pretrain, PSNR, report, verdict; then again."""
    small = "encoder.options={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}"
    command = [
        sys.executable, ROOT / "eval/mini_paper.py", "--claims", "5", "--seeds", "2",
        "--train", shards / "train", "--val", shards / "val", "--output", tmp_path / "mini",
        "--set", "batch_size=32", "--set", "data.samples_per_epoch=32", "--set", small,
    ]  # fmt: skip
    for _ in (1, 2):  # the second call finds that all is done
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=400, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert list(last) == ["claims"]
    assert set(last["claims"]) == {"5"}
    jobs = (tmp_path / "mini/jobs.jsonl").read_text().splitlines()
    assert len(jobs) == 8
    psnr = {
        name: [
            json.loads((tmp_path / f"mini/{name}-{seed}/eval/psnr.json").read_text())["image"]
            for seed in (0, 1)
        ]
        for name in ("mae", "rmae")
    }
    low, _ = interval([r - m for r, m in zip(psnr["rmae"], psnr["mae"], strict=True)])
    assert last["claims"]["5"] is (low > 0)
    markdown = (tmp_path / "mini/report.md").read_text()
    assert re.search(r"Claim 5 (holds|does not hold|is undecided) here", markdown)
    assert "true mean and deviation" in markdown
    page = (tmp_path / "mini/report.html").read_text()
    assert f"{sum(psnr['rmae']) / 2:.2f}" in page
    assert "<svg" in page

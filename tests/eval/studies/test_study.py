"""A study says what contradicts the paper first, corrects for all its tests, and names the seeds
that would decide what is open."""

import json
from dataclasses import replace

import pytest

from eval.paper.commands import Workspace, read_scale
from eval.paper.published import PaperRow
from eval.studies.claims import Claim, Difference
from eval.studies.study import Study, rules, summary, wanted_metrics
from pipeline.errors import UserError

ROWS = {
    "good": PaperRow("good", {}, recipe="mae"),
    "bad": PaperRow("bad", {}, recipe="rmae"),
    "open": PaperRow("open", {}, recipe="cmae"),
}
VALUES = {"good": (60.0, 61.0, 59.5), "bad": (50.0, 51.1, 49.4), "open": (60.5, 58.0, 62.0)}
CLAIMS = (
    Claim(1, "good is above open", (Difference("good", "open", "knn"),)),
    Claim(2, "good is above bad", (Difference("good", "bad", "knn"),)),
    Claim(3, "bad is above good", (Difference("bad", "good", "knn"),)),
)


@pytest.fixture
def study(tmp_path):
    for name, row in ROWS.items():
        for seed, value in enumerate(VALUES[name]):
            folder = tmp_path / f"{row.recipe}-{seed}" / "eval"
            folder.mkdir(parents=True)
            (folder / "knn.json").write_text(json.dumps({"protocol": "knn", "top1": value}))
    workspace = Workspace(tmp_path, read_scale("mini"))
    return Study(workspace, CLAIMS, 3, tuple(ROWS), ROWS.__getitem__, corrected=True)


def test_what_contradicts_the_paper_is_said_first(study):
    titles = [table.title for table in study.tables()]
    assert titles == [
        "Claim 3 does not hold here: bad is above good",
        "Claim 2 holds here: good is above bad",
        "Claim 1 is undecided here: good is above open",
    ]
    assert study.verdicts() == {"1": False, "2": True, "3": False}


def test_all_differences_are_corrected_together(study):
    judged = study.judged()
    p = judged[2][0].p
    assert judged[2][0].corrected == pytest.approx(3 * p)
    assert judged[3][0].corrected == pytest.approx(3 * p)  # as small, and never falling
    cells = study.tables()[1].rows[0].cells
    assert [cell.value for cell in cells] == [
        "good - bad", "k-NN (%)", "60.17", "50.17", "+10.00 points", "+9.92 … +10.08",
        f"{p:.2g}", "holds",
    ]  # fmt: skip
    assert cells[4].note == "+9.75 … +10.25"  # 4.303 × 0.1 / √3
    assert cells[6].note == f"Holm: {3 * p:.2g}"
    assert "corrected for the number of all differences here (Holm)" in rules(study)


def test_what_is_open_says_how_many_seeds_would_decide(study):
    cells = study.tables()[2].rows[0].cells
    need = study.judged()[1][0].seeds_needed
    assert cells[-1].value == "undecided"
    assert cells[-1].note == f"{need} seeds would decide it, were mean and deviation so" or (
        need is None and cells[-1].note.startswith("over 1000 seeds")
    )


def test_values_that_are_not_there_yet_are_a_dash(study, tmp_path):
    for seed in (1, 2):
        (tmp_path / f"cmae-{seed}/eval/knn.json").unlink()
    cells = study.tables()[2].rows[0].cells
    assert cells[4].note == "no interval: fewer than two seeds"
    assert cells[4].value == "-0.50 points"
    (tmp_path / "cmae-0/eval/knn.json").unlink()
    assert study.tables()[2].title == "Not measured yet"
    assert [cell.value for cell in study.tables()[2].rows[0].cells] == [
        "Claim 1", "good is above open",
    ]  # fmt: skip
    assert study.judged()[2][0].corrected == pytest.approx(2 * study.judged()[2][0].p)


def test_a_study_that_has_begun_says_what_is_missing(study, tmp_path):
    assert summary(study) == "Refuted here: 3. Hold: 2. Undecided: 1."
    (tmp_path / "rmae-2/eval/knn.json").unlink()
    table = study.tables()[0]
    assert table.rows[0].cells[1].note == "2 of 3 seeds"
    assert table.rows[0].cells[2].value == "50.55"  # of the pairs, and so is the other
    assert table.rows[0].cells[3].value == "60.50"
    assert len(study.judged()[2][0].apart) == 2
    for path in tmp_path.glob("rmae-*/eval/knn.json"):
        path.unlink()
    for path in tmp_path.glob("cmae-[12]/eval/knn.json"):
        path.unlink()
    assert summary(study) == "Refuted here: none. Undecided: 1. Not measured yet: 2, 3."
    titles = [table.title for table in study.tables()]
    assert titles[0] == "Claim 1 is undecided here: good is above open"
    assert titles[1:] == ["Not measured yet"]
    rows = [[cell.value for cell in row.cells] for row in study.tables()[1].rows]
    assert rows == [["Claim 2", "good is above bad"], ["Claim 3", "bad is above good"]]


def test_one_refuted_difference_refutes_a_claim_of_which_others_are_missing(study, tmp_path):
    both = Claim(4, "x", (Difference("bad", "good", "knn"), Difference("open", "good", "psnr")))
    one = Claim(5, "x", (Difference("good", "bad", "knn"), Difference("open", "good", "psnr")))
    part = replace(study, claims=(both, one))
    assert summary(part) == "Refuted here: 4. Undecided: 5."
    assert part.verdicts() == {"4": False, "5": False}


def test_a_cka_that_is_no_number_is_named(study, tmp_path):
    claim = Claim(1, "x", (Difference("good", "bad", "cka all-kept"),))
    variants = [{"pool": "all-kept", "hsic": "unbiased", "cka": [[0.5], [float("nan")]]}]
    (tmp_path / "mae-0/eval/cka.json").write_text(
        json.dumps({"ratios": [0.1, 0.9], "variants": variants})
    )
    with pytest.raises(UserError, match=r"mae-0/eval/cka\.json: not a result of"):
        replace(study, claims=(claim,)).judged()


def test_rows_are_made_in_the_given_order():
    assert wanted_metrics(CLAIMS, ("open", "bad", "good")) == {
        "open": ["knn"], "bad": ["knn"], "good": ["knn"],
    }  # fmt: skip
    assert list(wanted_metrics(CLAIMS, ("good", "open"))) == ["good", "open"]

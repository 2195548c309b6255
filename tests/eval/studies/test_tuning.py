"""Rates are tuned alike for every method, on held-out images, and every trial is recorded."""

import json

import pytest
from cifar_study import fill, settings

from eval.paper.cost import recipe_of
from eval.paper.job_runner import unique
from eval.studies import cifar_plan
from eval.studies.cifar_page import (
    Facts,
    claims_chapter,
    rate_warnings,
    tuning_chapter,
    tuning_table,
)
from eval.studies.tuning import SEED, Trial, at_edge, best, read_trials
from pipeline.errors import DIVERGED, UserError


def test_every_method_has_the_same_trials_on_held_out_images(data, tmp_path):
    tuning = cifar_plan.tuning_of(settings(data, tmp_path, "--scale", "cifar"))
    first, second = tuning.pretrainings(), tuning.finetunings({"MAE": 1.5e-3})
    pretrained = [job for job in first if recipe_of(job)]
    assert len(pretrained) == 3 * 5
    assert len(second) == 4 * 6
    assert len({job.images for job in pretrained}) == 1
    assert len({job.images for job in second}) == 1
    for job in (*first, *second):
        words = " ".join(job.command)
        assert str(data / "shards/tune-train") in words
        assert str(data / "shards/train") not in words
        assert str(data / "shards/val") not in words
        assert f"seed={SEED}" in words or f"--seed {SEED}" in words
    rates = {recipe_of(job).optimizer.base_lr for job in pretrained}
    assert rates == {5e-4, 1.5e-3, 4.5e-3}
    for job in pretrained:  # of every length an eighth warms up
        assert recipe_of(job).optimizer.warmup_epochs == recipe_of(job).optimizer.epochs / 8
    mae = [job for job in second if job.name.endswith(" MAE")]
    assert all("lr-0.0015/mae-1000" in " ".join(job.command) for job in mae)
    assert len(unique([*first, *second])) == len(first) + len(second)


def test_untuned_rows_have_the_scales_rates(data, tmp_path):
    tuning = cifar_plan.tuning_of(settings(data, tmp_path, "--untuned"))
    assert tuning.pretrainings() == tuning.finetunings({}) == []
    cifar_plan.claim_output(settings(data, tmp_path, "--untuned"))
    with pytest.raises(UserError, match="another tuned; choose another --output"):
        cifar_plan.claim_output(settings(data, tmp_path))


def test_the_best_rate_is_taken_and_every_trial_recorded(data, tmp_path):
    chosen = settings(data, tmp_path, "--claims", "5")
    tuning = cifar_plan.tuning_of(chosen)
    assert list(tuning.rows) == ["MAE", "R-MAE"]  # what the claim needs
    values = {
        ("MAE", 5e-4): 30.0,
        ("MAE", 2e-3): 40.0,
        ("R-MAE", 5e-4): 35.0,
        ("R-MAE", 2e-3): 35.0,
    }
    fill(tuning, values)
    tuning.write()
    trials = read_trials(tmp_path / "tuning.json")
    assert {(t.method, t.base_lr): t.value for t in trials} == values
    assert best(trials, "pretrain") == {"MAE": 2e-3, "R-MAE": 5e-4}  # of equals the lowest
    assert best(trials, "finetune") == {}
    assert at_edge(trials, "pretrain") == ["MAE", "R-MAE"]
    between = [Trial("MAE", "pretrain", 1e-3, "linprobe", 50.0), *trials]
    assert at_edge(between, "pretrain") == ["R-MAE"]
    assert at_edge(trials[:1], "pretrain") == at_edge(trials, "finetune") == []
    assert "pretraining of R-MAE." in tuning_chapter(between).texts[1]
    study = cifar_plan.study_of(chosen.workspace, [5], 1, 1)
    assert study.row("MAE").last == ("optimizer.base_lr=0.002",)
    table = tuning_table(trials, "pretrain")
    assert table.head == ("method", "0.0005", "0.002")
    assert [(c.value, c.note) for c in table.rows[0].cells[1:]] == [
        ("30.00", ""),
        ("40.00", "chosen"),
    ]
    part = cifar_plan.tuning_of(settings(data, tmp_path, "--claims", "4"))
    assert "R-MAE" not in part.rows
    fill(part, {("MAE", 5e-4): 31.0})
    part.write()  # a sitting of other claims
    later = read_trials(tmp_path / "tuning.json")
    assert [(t.method, t.base_lr, t.value) for t in later] == [
        ("MAE", 5e-4, 31.0), ("MAE", 2e-3, 40.0), ("R-MAE", 5e-4, 35.0), ("R-MAE", 2e-3, 35.0)
    ]  # fmt: skip
    (tmp_path / "tuning.json").write_text("[]")
    with pytest.raises(UserError, match=r"tuning\.json: no record of a tuning"):
        read_trials(tmp_path / "tuning.json")


def test_a_rate_beyond_the_grid_is_tried_where_the_best_is_at_its_end(data, tmp_path):
    """The grid of cifar is 5e-4, 1.5e-3, 4.5e-3."""
    plain = settings(data, tmp_path, "--scale", "cifar", "--claims", "3", "5")
    words = ("--scale", "cifar", "--claims", "3", "5", "--extend-tuning")
    chosen = settings(data, tmp_path, *words)
    tuning = cifar_plan.tuning_of(chosen)
    before = [job.name for job in cifar_plan.tuning_of(plain).pretrainings()]
    assert [job.name for job in tuning.pretrainings()] == before  # nothing is known yet
    grid = {"MAE": (30, 40, 50), "R-MAE": (30, 50, 40), "C-MAE": (50, 40, 30)}
    values = {(m, rate): v for m, row in grid.items()
              for rate, v in zip((5e-4, 1.5e-3, 4.5e-3), row, strict=True)}  # fmt: skip
    fill(tuning, values)
    more = [job for job in tuning.pretrainings() if job.name not in before]
    assert [job.name for job in more if recipe_of(job)] == [
        "tune 0.0135 mae-1000 pretrain", "tune 0.000167 cmae-1000 pretrain",
    ]  # fmt: skip
    first = tuning.pretrainings()[0]
    assert {job.images for job in more if recipe_of(job)} == {first.images}
    assert [recipe_of(j).optimizer.base_lr for j in more if recipe_of(j)] == [0.0135, 0.000167]
    assert [job.name for job in cifar_plan.tuning_of(plain).pretrainings()] == before
    assert more[1].needs == (more[0].name,)
    fill(tuning, {("MAE", 0.0135): 60.0, ("C-MAE", 0.000167): 45.0})
    assert len(tuning.pretrainings()) == len(before) + len(more)  # one more, no further one
    tuning.write()
    trials = read_trials(tmp_path / "tuning.json")
    assert [(t.method, t.base_lr, t.late) for t in trials if t.beyond] == [
        ("MAE", 0.0135, False), ("C-MAE", 0.000167, False),
    ]  # fmt: skip
    assert best(trials, "pretrain") == {"MAE": 0.0135, "R-MAE": 1.5e-3, "C-MAE": 5e-4}
    assert at_edge(trials, "pretrain") == ["MAE"]
    assert rate_warnings(trials) == []
    cells = tuning_table(trials, "pretrain").rows[0].cells
    assert [(c.value, c.note) for c in cells[1:]] == [
        ("-", ""), ("30.00", ""), ("40.00", ""), ("50.00", ""),
        ("60.00", "chosen, beyond the grid"),
    ]  # fmt: skip


def test_finetuning_is_extended_alike(data, tmp_path):
    tuning = cifar_plan.tuning_of(
        settings(data, tmp_path, "--scale", "cifar", "--claims", "6", "--extend-tuning")
    )
    before = [job.name for job in tuning.finetunings({"MAE": 1.5e-3})]
    for rate, value in zip((1e-3, 2e-3, 4e-3, 8e-3), (10, 20, 30, 40), strict=True):
        path = tuning.finetuned("MAE", rate)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"protocol": "finetune", "top1": value}))
    more = [job for job in tuning.finetunings({"MAE": 1.5e-3}) if job.name not in before]
    assert [job.name for job in more] == ["tune finetune 0.016 MAE"]
    assert more[0].command[-2:] == ("--base-lr", "0.016")


def test_a_rate_that_diverges_counts_as_the_worst_and_is_not_tried_again(data, tmp_path):
    tuning = cifar_plan.tuning_of(settings(data, tmp_path, "--scale", "cifar", "--claims", "5"))
    names = {job.name for job in tuning.pretrainings()}
    fill(tuning, {("MAE", 5e-4): 30.0, ("MAE", 1.5e-3): 40.0})
    lost = ["tune 0.0045 mae-1000 pretrain", "tune finetune 0.008 MAE"]
    lost += [f"tune {rate:g} rmae-1000 pretrain" for rate in (5e-4, 1.5e-3, 4.5e-3)]
    lines = [json.dumps({"name": name, "code": DIVERGED}) + "\n" for name in lost]
    (tmp_path / "jobs.jsonl").write_text("".join(lines))
    probes = {name.replace("pretrain", "linprobe") for name in lost if "finetune" not in name}
    assert names - {job.name for job in tuning.pretrainings()} == {*lost, *probes} & names
    tuning.write()
    trials = read_trials(tmp_path / "tuning.json")
    assert best(trials, "pretrain") == {"MAE": 1.5e-3}
    assert at_edge(trials, "pretrain") == []
    assert rate_warnings(trials) == []
    finetunings = {job.name for job in tuning.finetunings(best(trials, "pretrain"))}
    assert "tune finetune 0.004 MAE" in finetunings
    assert not any("0.008 MAE" in name or "R-MAE" in name for name in finetunings)
    cells = [[c.value for c in row.cells] for row in tuning_table(trials, "pretrain").rows]
    assert cells == [["MAE", "30.00", "40.00", "diverged"], ["R-MAE", *["diverged"] * 3]]


def test_a_study_that_has_begun_keeps_its_rates_and_warns(data, tmp_path):
    words = ("--claims", "5", "--seeds", "1")
    plain = settings(data, tmp_path, *words)
    record = cifar_plan.claim_output(plain)
    grid = {("MAE", 5e-4): 30.0, ("MAE", 2e-3): 40.0, ("R-MAE", 5e-4): 35.0, ("R-MAE", 2e-3): 30.0}
    fill(cifar_plan.tuning_of(plain), grid)
    cifar_plan.tuning_of(plain).write()
    text = (tmp_path / "tuning.json").read_text()
    assert "beyond" not in text
    study = cifar_plan.study_of(plain.workspace, [5], 1, 1.0)
    rows = [(j.name, j.command) for j in cifar_plan.jobs_of_rows(study)]
    extended = settings(data, tmp_path, *words, "--extend-tuning")
    assert cifar_plan.claim_output(extended) == record
    tuning = cifar_plan.tuning_of(extended)
    names = [job.name for job in tuning.pretrainings() if recipe_of(job)]
    assert names[4:] == ["tune 0.008 mae-1000 pretrain", "tune 0.000125 rmae-1000 pretrain"]
    fill(tuning, {("MAE", 8e-3): 55.0, ("R-MAE", 1.25e-4): 20.0})
    for again in (tuning, cifar_plan.tuning_of(plain)):  # what was tried stays on record
        again.write()
        trials = read_trials(tmp_path / "tuning.json")
        assert [(t.method, t.late) for t in trials if t.beyond] == [("MAE", True), ("R-MAE", True)]
        assert best(trials, "pretrain") == {"MAE": 2e-3, "R-MAE": 5e-4}
        assert at_edge(trials, "pretrain") == []
    study = cifar_plan.study_of(plain.workspace, [5], 1, 1.0)
    assert [(j.name, j.command) for j in cifar_plan.jobs_of_rows(study)] == rows
    (warning,) = rate_warnings(trials)
    assert warning.startswith("Warning: pretraining of MAE has base_lr 0.002 (40.00 %")
    assert "0.008, tried later, is better (55.00 %)" in warning
    shown = claims_chapter(study, Facts((5,), 1, 0.0, "core"), trials)
    assert shown.texts[1] == warning
    assert warning in tuning_chapter(trials).texts
    other = settings(data, tmp_path / "new", *words, "--extend-tuning")
    assert cifar_plan.claim_output(other)["extended"] is True
    resumed = cifar_plan.tuning_of(settings(data, tmp_path / "new", *words))
    assert (resumed.extend, resumed.late) == (True, False)  # as it was begun

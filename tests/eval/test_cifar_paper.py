"""CIFAR-10's study: every claim can be planned and billed, rates are tuned alike, an archive gives
the page again; and a slice of it from the archive of images to the verdicts, in two sittings."""

import json
import os
import re
import shutil
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
from eval_helpers import coloured_images, write_shards
from fake_cifar import CLASSES, write_archive

from eval.cifar_paper import (
    archived_study,
    build_parser,
    check,
    cifar_paper,
    note_facts,
    rebuild,
    settings_of,
    write_page,
)
from eval.paper.commands import (
    Workspace,
    pretrain_flops,
    read_scale,
    row_jobs,
    row_recipe,
    run_name,
)
from eval.paper.cost import START, Rates, read_rates, recipe_of, step_key, within
from eval.paper.job_runner import Command, costs, needed, unique
from eval.paper.made_with import check_recipes
from eval.paper.measuring import device_name
from eval.paper.reproduction import result_path
from eval.reporting.tables import Cell
from eval.shared.cifar_shards import BUILDING, make_cifar_shards
from eval.studies import archive, cifar_plan
from eval.studies.cheaper import cheaper_chapter
from eval.studies.cifar_claims import (
    ALL,
    AS_LONG,
    FINETUNED,
    LONGER,
    METHODS,
    NAMES,
    QUICKER,
    cifar_row,
    claims_of,
    method_of,
)
from eval.studies.cifar_page import (
    Facts,
    claims_chapter,
    rate_warnings,
    tuning_chapter,
    tuning_table,
)
from eval.studies.claims import CLAIMS
from eval.studies.significance import interval
from eval.studies.study import wanted_metrics
from eval.studies.tuning import SEED, Trial, at_edge, best, read_trials
from pipeline.config.recipe import dump_recipe
from pipeline.data.order import steps_per_epoch
from pipeline.errors import DIVERGED, UserError
from shard_tools.cores import cores
from shard_tools.manifest import read_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards as make_cifar_shards leaves them."""
    folder = tmp_path_factory.mktemp("cifar")
    for seed, (part, count) in enumerate(
        {"train": 160, "val": 32, "tune-train": 144, "tune-val": 16}.items()
    ):
        write_shards(folder / "shards" / part, *coloured_images(count, 4, seed=seed))
    (folder / "shards/done.json").write_text("{}")
    return folder


def settings(data, output, *words):
    words = ["--scale", "cifar-tiny", "--data", data, "--output", output, *words]
    return settings_of(build_parser().parse_args(list(map(str, words))))


# ------------------------------------------------------------------ rows and claims


def test_every_claim_is_on_rows_that_are_made_and_the_miniatures_come_first():
    wanted = wanted_metrics(ALL, NAMES)
    assert {d.better for c in ALL for d in c.differences} <= set(wanted)
    assert {d.worse for c in ALL for d in c.differences} <= set(wanted)
    assert sorted(c.number for c in ALL) == list(range(1, 17))
    assert {c.number for c in CLAIMS} < {c.number for c in ALL}
    assert [c.number for c in claims_of([5, 1, 14])] == [1, 5, 14]
    assert {method_of(name) for name in wanted} == set(METHODS)


def test_every_row_has_commands_of_its_own(data, tmp_path):
    chosen = settings(data, tmp_path, "--seeds", "1")
    study = cifar_plan.study_of(chosen.workspace, chosen.claims, 1, 1.5)
    names = Counter(run_name(study.row(name), 0) for name in study.names)
    assert set(names.values()) == {1}, names
    jobs = unique(study.jobs())  # UserError where one name has two command lines
    kinds = Counter(Path(job.command[1]).stem for job in jobs)
    unpretrained = ("random", "supervised", *LONGER, f"MAE{FINETUNED}")
    assert kinds["pretrain"] == len(study.names) - len(unpretrained)
    assert kinds["export"] == 2  # supervised, and MAE's after finetuning
    for job in jobs:
        script = Path(job.command[1]).stem
        assert (recipe_of(job) is not None) == (script == "pretrain")
        if script in ("linprobe", "finetune", "psnr", "cka"):
            assert job.command[job.command.index("--resize") + 1] == "32"


@pytest.mark.parametrize("name", ["cifar", "cifar-gpu"])
def test_every_row_has_a_recipe_of_32_pixels_and_as_many_images(tmp_path, name):
    scale = read_scale(name)
    times = dict.fromkeys(QUICKER, 1.5)
    for row in (cifar_row(name, {}, {}, 1.5, times) for name in NAMES):
        recipe = row_recipe(Workspace(tmp_path, scale), row)
        assert (recipe.encoder.image_size, recipe.encoder.patches) == (32, 64)
        epochs = scale.epochs * (1.5 if row.name.endswith(AS_LONG) else 1)
        assert recipe.optimizer.epochs == pytest.approx(epochs, rel=1e-5), row.name
        steps = steps_per_epoch(50_000, recipe.batch_size, recipe.data.partitions)
        assert round(scale.epochs * steps) * recipe.batch_size >= 400_000


def test_rates_reach_the_rows_of_their_method():
    base, finetune = {"MAE": 3e-3, "random": 9.0}, {"MAE": 1e-3, "random": 4e-3}

    def row(name):
        return cifar_row(name, base, finetune, 1.25)

    assert row("MAE").last == ("optimizer.base_lr=0.003",)
    assert row("MAE, decoder of 1 block").last == (
        "measure.decoder.depth=1", "optimizer.base_lr=0.003",
    )  # fmt: skip
    assert row("MAE, 1 image").finetune == {"base_lr": 1e-3}
    assert row("R-MAE").last == ()
    assert row("random").finetune == row("supervised").finetune == {"base_lr": 4e-3}
    assert row("random").last == row("supervised").last == ()
    assert [row(name).finetune["epochs"] for name in LONGER] == [125, 250]
    assert row(f"MAE{FINETUNED}").finetuned
    assert row(f"MAE{FINETUNED}").last == row("MAE").last


def test_a_finetuned_row_is_exported_from_the_classifier_of_its_own(data, tmp_path):
    workspace = settings(data, tmp_path).workspace
    row = cifar_row(f"MAE{FINETUNED}", {}, {"MAE": 2e-3}, 1)
    pretrain, finetune, export, cka = row_jobs(workspace, row, 1, ["cka"])
    assert finetune.command[-2:] == ("--base-lr", "0.002")
    assert export.needs == (finetune.name,)
    assert export.command[2] == str(tmp_path / "mae-1/eval/finetune")
    assert cka.command[-1] == export.command[-1] == str(tmp_path / "mae-finetuned-0-002-1")
    own = row_jobs(workspace, replace(row, finetuned=False), 1, ["finetune"])
    assert [pretrain, replace(finetune, weights=None)] == own  # shared with the row itself
    assert finetune.weights == tmp_path / "mae-1/eval/finetune/classifier.json"


def test_the_compute_of_mae_is_counted_in_finetunings(data, tmp_path):
    chosen = settings(data, tmp_path)
    jobs = row_jobs(chosen.workspace, cifar_row("MAE", {}, {}, 1), 0, ["finetune"])
    both, finetune = sum(j.flops for j in jobs), jobs[-1].flops
    assert cifar_plan.compute_of(chosen.workspace) == pytest.approx(both / finetune, abs=1e-4)
    assert both > finetune


# ------------------------------------------------------------------ tuning


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


def fill(tuning, values):
    """Write the results of the trials {(method, base_lr): value}."""
    for (method, rate), value in values.items():
        path = result_path(tuning.trial(rate), tuning.rows[method], SEED, "linprobe")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"protocol": "linprobe-cached", "top1": value}))


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


# ------------------------------------------------------------------ plan


def job(name, *needs):
    return Command(name, ("true",), Path("/nowhere") / name, needs)


def test_what_does_not_fit_is_left_out_with_what_needs_it():
    jobs = [job("a"), job("b"), job("b-eval", "b"), job("c")]
    kept, left = within(jobs, [10, 50, 1, 20], 40)
    assert [j.name for j in kept] == ["a", "c"]
    assert [j.name for j in left] == ["b", "b-eval"]
    assert within(jobs, [10, 50, 1, 20], 81) == (jobs, [])


def test_with_few_hours_the_report_has_what_there_is(data, tmp_path, capsys):
    """MAE's and R-MAE's rates are tuned, C-MAE's are not, for which nothing is left."""
    chosen = settings(data, tmp_path, "--claims", "5", "--seeds", "1", "--hours", "1e-9")
    cifar_plan.claim_output(chosen)
    bill = Rates(tmp_path / "rates.json", str(data / "shards/train"))
    for stage in range(3):
        for job in cifar_plan.make_plan(chosen, bill).stages[stage]:
            if job.makes.parent.name == "eval" or job.makes.parent.parent.name == "tune":
                job.makes.parent.mkdir(parents=True, exist_ok=True)
                value = {"protocol": "finetune", "top1": 40.0, "image": 20.0}
                job.makes.write_text(json.dumps(value))
        cifar_plan.tuning_of(chosen).write()
    for claims in (5,), (3, 5):
        cifar_paper(replace(chosen, claims=claims))
        output = capsys.readouterr().out
        assert json.loads(output.splitlines()[-1])["claims"].keys() == set(map(str, claims))
        few = "--hours 1e-09: too few to tune the learning rates, so the report has what is there"
        assert (few in output) == (3 in claims)
    assert not list(tmp_path.glob("cmae*"))


def test_what_would_fit_and_was_not_run_is_named_too(data, tmp_path):
    """As where the hours end within the tuning, without which no row is made."""
    chosen = settings(data, tmp_path, "--claims", "5", "--seeds", "1")
    (tmp_path / "c").touch()
    trial, row, done = job("a"), job("b", "a"), Command("c", ("true",), tmp_path / "c")
    plan = cifar_plan.Plan(((trial,), (), (row, done)), {}, kept=(row, done), left=(trial,))
    assert note_facts(chosen, plan).left == ("a", "b")


def test_what_is_done_fits_into_hours_that_are_used_up(tmp_path):
    (tmp_path / "a").touch()
    done = Command("a", ("true",), tmp_path / "a", ("b",))
    assert within([job("b"), done], [5, 5], -1) == ([done], [job("b")])


def test_what_nothing_needs_any_more_is_not_made_again(tmp_path):
    """Results stay, weights may be gone: an archive's study, or a disk that was full."""

    def made(name, *needs, **more):
        (tmp_path / "there").mkdir(exist_ok=True)
        return Command(name, ("true",), tmp_path / "there" / name, needs, **more)

    weights = tmp_path / "there/classifier"
    jobs = [
        made("data", for_others=True),
        made("pretrain", "data", for_others=True),
        made("finetune", "pretrain"),
        made("finetune", "pretrain", weights=weights),  # of the row whose classifier is read
        made("export", "finetune", for_others=True),
        made("cka", "export"),
    ]

    def planned():
        return [job.name for job in needed(jobs)]

    everything = ["data", "pretrain", "finetune", "export", "cka"]
    assert planned() == everything
    assert [job.name for job in needed(jobs[:2])] == everything[:2]  # wanted for itself
    (tmp_path / "there/finetune").touch()
    assert planned() == everything  # the classifier is missing
    assert not next(job for job in needed(jobs) if job.name == "finetune").done
    (tmp_path / "there/cka").touch()
    assert planned() == ["cka"]
    assert [job.name for job in needed(jobs[:3])] == ["finetune"]
    weights.touch()
    assert planned() == ["finetune", "cka"]
    (tmp_path / "there/finetune").unlink()
    assert planned() == ["data", "pretrain", "finetune", "cka"]  # its number is missing


def test_the_plan_is_billed_by_what_was_measured_here(data, tmp_path):
    chosen = settings(data, tmp_path / "o", "--claims", "5", "--seeds", "1", "--hours", "0")
    rates = Rates(tmp_path / "rates.json", str(data / "shards/train"))
    plan = cifar_plan.make_plan(chosen, rates)
    assert plan.left == ()
    measured = read_rates(tmp_path / "rates.json")
    assert all(0 < value < 1 for value in measured.values())
    kinds = {key.split(": ", 1)[1].split()[0] for key in measured}
    assert kinds == {"pretrain", "load", "encode"}
    (mae,) = (v for k, v in measured.items() if "pretrain" in k and '"second":"pixels"' in k)
    (load,) = (v for k, v in measured.items() if ": load" in k)
    name = next(j.name for j in plan.stages[2] if j.name == "mae-0 pretrain")
    assert plan.seconds[name] == pytest.approx(START + 320 * (mae + load))
    slow = Rates(tmp_path / "slow.json", "")
    (tmp_path / "slow.json").write_text(json.dumps({k: 100 * v for k, v in measured.items()}))
    again = cifar_plan.make_plan(chosen, slow)  # nothing is measured again: it has no shards
    assert again.seconds[name] == pytest.approx(START + 32_000 * (mae + load))
    lines = "\n".join(cifar_plan.show(chosen, plan))
    assert "rows of the claims: 5 commands" in lines
    look = plan.stages[2][-1]
    assert look.name == "look"
    assert look.needs == ("mae-0 pretrain", "rmae-0 pretrain")
    assert plan.seconds["look"] == START
    assert "0.00 core-hours used" in lines


def test_a_pretraining_of_no_step_is_not_planned(data, tmp_path):
    chosen = settings(data, tmp_path, "--claims", "5", "--seeds", "1", "--set", "batch_size=8192")
    plan = cifar_plan.make_plan(chosen, Rates(tmp_path / "r.json", str(data / "shards/train")))
    with pytest.raises(UserError, match="pretrain: has no step with batch_size 8192; set it lower"):
        check_recipes(plan.jobs)


def test_hours_leave_out_the_last_claims_first(data, tmp_path):
    words = ("--claims", "1", "14", "--seeds", "2")
    chosen = settings(data, tmp_path, *words, "--hours", "0")
    rates = Rates(tmp_path / "rates.json", str(data / "shards/train"))
    whole = cifar_plan.make_plan(chosen, rates)
    hours = 0.8 * sum(whole.seconds.values()) / 3600 / cores()
    plan = cifar_plan.make_plan(replace(chosen, hours=hours), rates)
    names = [j.name for j in plan.left if j.name != "look"]  # which costs little, and may fit
    assert names
    assert names == [j.name for j in whole.kept if j.name != "look"][-len(names) :]
    assert "do not fit into" in cifar_plan.show(replace(chosen, hours=hours), plan)[-1]
    many = replace(chosen, hours=hours, jobs=64)  # are no more cores
    assert cifar_plan.make_plan(many, rates).left == plan.left


def test_cheaper_roads_come_before_the_tables_and_change_no_job(data, tmp_path):
    def planned(*numbers):
        workspace = settings(data, tmp_path).workspace
        study = cifar_plan.study_of(workspace, numbers, 2, 1.5)
        return {job.name: job.command for job in unique(cifar_plan.jobs_of_rows(study))}

    first, roads = planned(1, 2, 3, 5, 6, 7), planned(14, 15, 16)
    tables = planned(4, *range(8, 14))
    now = planned(*range(1, 17))
    in_order = [name for jobs in (first, roads, tables) for name in jobs if name != "look"]
    assert list(now) == [*dict.fromkeys(in_order), "look"]
    assert now == tables | roads | first
    rows = 6 + 2 + len(QUICKER)
    assert len([name for name in roads if name.endswith("pretrain")]) == 2 * rows  # seeds


def known_rates(workspace, path, seconds):
    """A rates.json with the steps of rows {name: seconds} on this device, without loading."""
    device = device_name()
    known = {}
    for name, value in seconds.items():
        for _, phase in row_recipe(workspace, cifar_row(name, {}, {}, 1)).phases:
            known[f"{device}: {step_key(phase)}"] = value
            known[f"{device}: load {phase.encoder.image_size}"] = 0.0
    path.write_text(json.dumps(known))


def test_a_cheaper_road_is_given_the_time_of_its_method(data, tmp_path):
    """Claim 16: more epochs by what was measured first; later measurements change no row."""
    chosen = settings(data, tmp_path, "--claims", "16", "--seeds", "1")
    names = (*QUICKER, "MAE", "R-MAE")  # a quarter of growing images is of MAE's size
    seconds = dict(zip(names, (2.5e-3, 6e-3, 2e-3, 5e-3, 1e-3, 4e-3, 9e-3), strict=True))
    path = tmp_path / "rates.json"
    known_rates(chosen.workspace, path, seconds)
    cifar_plan.claim_output(chosen)

    def times():
        return cifar_plan.times_kept(chosen, Rates(path, ""))

    # The tiny decoder has one block as it is, and none is given fewer epochs.
    expected = dict(zip(QUICKER, (1.6, 1.5, 1.0, 1.0, 2.29), strict=True))
    assert times() == expected
    study = cifar_plan.study_of(chosen.workspace, (16,), 1, 1.0, times())
    recipe = row_recipe(chosen.workspace, study.row(f"MAE, cross decoder{AS_LONG}"))
    assert recipe.optimizer.epochs == pytest.approx(1.6 * chosen.scale.epochs)
    assert recipe.measure.decoder.attention == "cross"
    known_rates(chosen.workspace, path, seconds | {"MAE": 8e-3})
    assert times()["MAE, cross decoder"] == 3.2
    cifar_plan.note_times(chosen, expected)
    assert times() == expected
    assert cifar_plan.claim_output(chosen)["times"] == expected
    others = settings(data, tmp_path, "--claims", "5")
    assert cifar_plan.times_kept(others, Rates(path, "")) == expected
    new = settings(data, tmp_path / "new", "--claims", "5")
    assert cifar_plan.times_kept(new, Rates(path, "")) == {}


def test_the_cheaper_roads_have_costs_and_what_they_lose_in_a_table(data, tmp_path):
    workspace = settings(data, tmp_path).workspace
    road, longer = "MAE, cross decoder", f"MAE, cross decoder{AS_LONG}"
    times = {road: 1.6}
    study = cifar_plan.study_of(workspace, (5, 14, 16), 2, 1.0, times)
    results = {("MAE", 0): 60.0, ("MAE", 1): 62.0, (road, 0): 59.0, (road, 1): 62.0,
               ("R-MAE", 0): 50.0, (longer, 0): 61.0}  # fmt: skip
    for (name, seed), value in results.items():
        path = result_path(workspace, study.row(name), seed, "finetune")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"protocol": "finetune", "top1": value}))
    path_of_rates = tmp_path / "rates.json"
    known_rates(workspace, path_of_rates, {"MAE": 4e-3, road: 2.5e-3})
    (table,) = cheaper_chapter(study).tables
    rows = {row.cells[0].value: row.cells[1:] for row in table.rows}
    assert list(rows) == ["MAE", road, longer, "MAE, decoder of 1 block", "MAE, 90 % masked",
                          "MAE, growing images", "R-MAE", "R-MAE, cross decoder"]  # fmt: skip
    recipes = [row_recipe(workspace, study.row(name)) for name in ("MAE", road)]
    mae, cross = map(pretrain_flops, recipes)
    assert cross < mae
    assert rows[road][0] == Cell(f"{cross / 1e6:.1f}", f"{cross / mae:.2f} of MAE's")
    assert rows[road][1] == Cell("2.50", "0.62 of MAE's")  # to even
    assert rows["R-MAE"][1] == Cell("-")  # not measured here
    assert [rows[name][2].value for name in ("MAE", road, longer)] == ["1.00 ×", "1.00 ×", "1.60 ×"]
    assert rows["MAE"][3:5] == (Cell("61.00 ± 1.41"), Cell("-"))
    low, high = interval([-1.0, 0.0])
    assert rows[road][4] == Cell("-0.50", f"{low:+.2f} … {high:+.2f}")
    assert rows[longer][3:5] == (Cell("61.00", "1 of 2 seeds"), Cell("+1.00", "one seed"))
    assert rows[road][5:] == (Cell("not measured"), Cell("-"))
    both = read_rates(path_of_rates)
    known_rates(workspace, path_of_rates, {road: 1e-5})  # on a device without MAE's
    only = {key.replace("core", "some GPU", 1): v for key, v in read_rates(path_of_rates).items()}
    path_of_rates.write_text(json.dumps(only | both))
    (table,) = cheaper_chapter(study).tables
    assert {row.cells[0].value: row.cells[2] for row in table.rows}[road] == rows[road][1]
    assert cheaper_chapter(replace(study, claims=claims_of([5]))).empty


def test_a_study_keeps_its_compute_when_later_code_counts_otherwise(data, tmp_path, monkeypatch):
    chosen = settings(data, tmp_path, "--claims", "6", "--seeds", "1")
    before = cifar_plan.claim_output(chosen)
    rates = Rates(tmp_path / "rates.json", str(data / "shards/train"))
    names = [job.name for job in cifar_plan.make_plan(chosen, rates).stages[2]]
    monkeypatch.setattr(cifar_plan, "compute_of", lambda workspace: 7.0)
    assert cifar_plan.claim_output(chosen) == before
    again = cifar_plan.make_plan(chosen, rates).stages[2]
    assert [job.name for job in again] == names
    other = settings(data, tmp_path / "other", "--claims", "6", "--seeds", "1")
    assert cifar_plan.claim_output(other)["compute"] == 7.0


def test_a_key_that_the_rows_of_the_claims_have_may_be_changed(data, tmp_path):
    check(settings(data, tmp_path, "--set", "measure.lambda=3", "--claims", "5", "13"))
    with pytest.raises(UserError, match=r"cmae\.yaml: unknown key 'measure\.lambda'"):
        check(settings(data, tmp_path, "--set", "measure.lambda=3", "--claims", "3", "5"))


def test_other_test_images_and_recipes_do_not_mix_in_one_folder(data, tmp_path):
    record = cifar_plan.claim_output(settings(data, tmp_path / "o", "--claims", "5"))
    others = tmp_path / "other"
    for part in ("train", "val"):
        shutil.copytree(data / "shards" / part, others / "shards" / part)
    assert cifar_plan.claim_output(settings(others, tmp_path / "o")) == record
    shutil.rmtree(others / "shards/val")
    write_shards(others / "shards/val", *coloured_images(24, 4, seed=9))
    with pytest.raises(UserError, match="was made with another test_images; choose another"):
        cifar_plan.claim_output(settings(others, tmp_path / "o"))
    del record["test_images"]  # as earlier ones have none
    (tmp_path / "o/study.json").write_text(json.dumps(record))
    assert cifar_plan.claim_output(settings(others, tmp_path / "o")) == record

    chosen = settings(data, tmp_path / "o", "--claims", "5", "--seeds", "1")
    bill = Rates(tmp_path / "rates.json", str(data / "shards/train"))
    jobs = cifar_plan.make_plan(chosen, bill).stages[2]
    mae = next(job for job in jobs if job.name == "mae-0 pretrain")
    run = chosen.output / "mae-0"
    run.mkdir()
    recipe = recipe_of(mae)
    assert recipe.seed == 0
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    check_recipes(jobs)
    sparser = recipe.model_copy(update={"views": recipe.views.model_copy(update={"cutmix": 0.5})})
    (run / "recipe.yaml").write_text(dump_recipe(sparser))
    with pytest.raises(UserError, match=r"mae-0: was made with another recipe \(views.cutmix: 0.5"):
        check_recipes(jobs)


def test_other_settings_do_not_mix_in_one_folder(data, tmp_path):
    record = cifar_plan.claim_output(settings(data, tmp_path, "--claims", "5"))
    assert record["compute"] > 1
    same = cifar_plan.claim_output(settings(data, tmp_path, "--seeds", "1", "--hours", "9"))
    assert same == record
    scale = {key: value for key, value in record["scale"].items() if key != "relaxed"}
    (tmp_path / "study.json").write_text(json.dumps(record | {"scale": scale}))  # an older one
    assert cifar_plan.claim_output(settings(data, tmp_path)) == record | {"scale": scale}
    with pytest.raises(UserError, match="was made with another scale; choose another --output"):
        cifar_plan.claim_output(settings(data, tmp_path, "--set", "batch_size=32"))
    with pytest.raises(UserError, match="another scale"):
        cifar_plan.claim_output(settings(data, tmp_path, "--scale", "cifar"))
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match=r"study\.json: not the record of a study"):
        cifar_plan.claim_output(settings(data, tmp_path))


def test_a_record_that_names_this_checkout_is_still_its_own(data, tmp_path):
    record = cifar_plan.claim_output(settings(data, tmp_path))
    assert '"ds_configs/zero0.json"' in json.dumps(record)
    whole = json.dumps(record).replace('"ds_configs/', f'"{ROOT}/ds_configs/')
    (tmp_path / "study.json").write_text(whole)
    assert cifar_plan.claim_output(settings(data, tmp_path)) == json.loads(whole)
    chosen = archive.selected(tmp_path)
    assert json.loads(chosen["study.json"]) == record  # nor is it in an archive


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--hours", "-1"], "--hours -1: must be at least 0"),
        (["--hours", "nan"], "--hours nan: must be at least 0 and finite"),
        (["--hours", "inf"], "--hours inf: must be at least 0 and finite"),
        (["--untuned", "--extend-tuning"], "nothing to extend with --untuned"),
        (["--scale", "mini"], "--scale mini: has no rates to tune; take cifar or cifar-gpu"),
        (["--scale", "cifer"], "knows full, mini, cifar"),
        (["--set", "optimizer.epochs=2"], "the study chooses optimizer.epochs itself"),
        (["--set", "optimizer.base_lr = 1"], r"chooses optimizer.base_lr itself.*--untuned it do"),
        (["--set", "optimizer={betas: [0.9, 0.9], base_lr: 1}"], "chooses optimizer.base_lr itsel"),
        (["--untuned", "--set", "seed=1"], "--set seed=1: the study chooses seed itself"),
    ],
)
def test_bad_options_are_one_sentence(data, tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence):
        settings(data, tmp_path, *words)


# ------------------------------------------------------------------ data and archive


def test_shards_of_another_source_are_refused(tmp_path):
    with pytest.raises(UserError, match="name your copy: --cifar10 PATH"):
        make_cifar_shards(None, tmp_path)
    with pytest.raises(UserError, match="absent: no such file"):
        make_cifar_shards(tmp_path / "absent", tmp_path)
    done = tmp_path / "shards/done.json"
    done.parent.mkdir()
    done.write_text(json.dumps({"source": "a.zip", "bytes": 3}))
    (tmp_path / "a.zip").write_bytes(b"abc")
    (tmp_path / "b.zip").write_bytes(b"abc")
    make_cifar_shards(None, tmp_path)
    make_cifar_shards(tmp_path / "a.zip", tmp_path)
    with pytest.raises(UserError, match=r"was made of a\.zip, not of .*b\.zip"):
        make_cifar_shards(tmp_path / "b.zip", tmp_path)
    (tmp_path / "a.zip").unlink()
    make_cifar_shards(tmp_path / "a.zip", tmp_path)  # is not needed any more
    with pytest.raises(UserError, match=r"was made of a\.zip, not of .*absent"):
        make_cifar_shards(tmp_path / "absent", tmp_path)
    image = tmp_path / "cifar/train/cat/1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"1234")
    done.write_text(json.dumps({"source": "cifar", "bytes": 4}))
    make_cifar_shards(tmp_path / "cifar", tmp_path)
    (tmp_path / "cifar/.DS_Store").write_bytes(b"x")
    make_cifar_shards(tmp_path / "cifar", tmp_path)
    image.with_name("2.png").write_bytes(b"5")  # of a copy that was not complete before
    with pytest.raises(UserError, match=r"was made of another cifar, not of .*cifar; choo"):
        make_cifar_shards(tmp_path / "cifar", tmp_path)
    done.write_text(json.dumps({"source": "cifar", "bytes": 0}))  # as earlier ones have it
    make_cifar_shards(tmp_path / "cifar", tmp_path)
    done.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        make_cifar_shards(None, tmp_path)
    done.write_text('{"train": 4096, "val": 1024, "size": 80}')  # the demo's photographs
    with pytest.raises(UserError, match="shards: are no shards of CIFAR-10"):
        make_cifar_shards(None, tmp_path)


def test_shards_and_images_of_somebody_else_are_left_alone(tmp_path):
    """--data may name a folder that is in use: data/, say, with ImageNet's shards and images."""
    theirs = tmp_path / "shards/train/00000.tar", tmp_path / "images/train/cat/1.png"
    for path in theirs:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"shards: holds no finished shards of CIFAR-10"):
        make_cifar_shards(tmp_path / "images", tmp_path)
    theirs[0].unlink()
    theirs[0].parent.rmdir()
    with pytest.raises(UserError, match=r"images of .* failed with exit code 2"):
        make_cifar_shards(tmp_path / "images", tmp_path)  # it has no test images
    assert theirs[1].read_bytes() == b"theirs"


def test_shards_are_built_by_one_command_at_a_time(tmp_path):
    """A second one would remove what the first has built so far."""
    building = tmp_path / "data" / BUILDING
    half = building / "shards/train/0.tar"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"x")
    (tmp_path / "c").mkdir()
    hold = (
        "import sys, pathlib; from pipeline.runtime.run_lock import RunLock\n"
        "lock = RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", hold, str(building)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"holds this folder .*; wait for it, or choose anoth"):
            make_cifar_shards(tmp_path / "c", tmp_path / "data")
        assert half.is_file()
        first.communicate(b"\n")
    with pytest.raises(UserError, match=r"images of .* failed with exit code 2"):
        make_cifar_shards(tmp_path / "c", tmp_path / "data")  # it is empty
    assert not half.exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tuning.json", b"\xff", "no record of a tuning"),
        ("tuning.json", b"NaN", "value of MAE nan: must be finite"),
        ("tuning.json", b'"x"', "no record of a tuning"),
        ("rates.json", b"\xff", "not a file of measured rates"),
        ("rates.json", b'{"a": NaN}', "a: nan: must be at least 0 and finite"),
        ("rates.json", b'{"a": -1}', "a: -1: must be at least 0"),
        ("jobs.jsonl", b"\xff\n", "line 1: not a record of a command"),
        ("jobs.jsonl", b"NaN", "line 1: cpu_seconds nan: must be at least 0 and finite"),
        ("study.json", b"\xff", "not the record of a study"),
        ("study.json", b'"compute": NaN', "compute nan: must be above 0 and finite"),
        ("study.json", b'"compute": 2, "times": {"a": 0}', "a 0: must be above 0"),
    ],
)
def test_a_damaged_record_is_one_sentence(name, content, sentence, tmp_path):
    """Also a number that is none: with NaN spent or to be spent, everything would fit."""
    shell = {
        "tuning.json": b'{"trials": [{"method": "MAE", "stage": "finetune", "base_lr": 1e-3, '
        b'"metric": "finetune", "value": %s}]}',
        "jobs.jsonl": b'{"name": "a", "cpu_seconds": %s}\n',
        "study.json": b'{"scale": {"name": "cifar", "last": []}, %s}',
    }.get(name, b"%s")
    path = tmp_path / name
    path.write_bytes(content if b"\xff" in content else shell % content)
    read = {
        "tuning.json": read_trials,
        "rates.json": read_rates,
        "jobs.jsonl": lambda path: costs(path.parent),
        "study.json": cifar_plan.read_record,
    }
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}[:,] {sentence}"):
        read[name](path)


def test_errors_name_no_folder_that_is_gone(tmp_path):
    output = tmp_path / "out"
    begun_study(output)
    (output / "facts.json").write_text(json.dumps(asdict(Facts((5,), 2, 7200.0, "core"))))
    (output / "rates.json").write_text("[")
    sentence = "/rates.json: not a file of measured rates"
    with (
        pytest.raises(UserError, match=f"^{re.escape(str(output))}{sentence}"),
        archive.laid_out(output) as folder,
    ):
        read_rates(folder / "rates.json")
    archive.pack(output, tmp_path / "a.tar.xz")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'a.tar.xz'))}{sentence}"):
        rebuild(tmp_path / "a.tar.xz")


def test_an_archive_keeps_what_a_page_needs(tmp_path):
    run = tmp_path / "out/mae-0"
    (run / "eval").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "checkpoints/weights").write_bytes(os.urandom(100_000))
    (run / "recipe.yaml").write_text("name: mae\n")
    steps = [{"step": n, "loss": 1 / 3 + n} for n in range(1, 1001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    said = ("run: x", *(f"step {n}/9  loss" for n in range(4)), "step 3: knn 4.0",
            *(f"step {n}/9  loss" for n in range(4, 10)), "done: step 9")  # fmt: skip
    (run / "log.txt").write_text("".join(f"2026-11-26 15:18:30 {line}\n" for line in said))
    (run / "eval/knn.json").write_text(json.dumps({"protocol": "knn", "top1": 12.3456789}))
    (run / "pictures").mkdir()
    (run / "pictures/a.png").write_bytes(b"first")
    (run / "pictures/b.png").write_bytes(b"last")
    (tmp_path / "out/study.json").write_text("{}")
    (tmp_path / "out/data").mkdir()
    size = archive.pack(tmp_path / "out", tmp_path / "a.tar.xz")
    archive.pack(tmp_path / "out", tmp_path / "b.tar.xz")
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
    assert size == (tmp_path / "a.tar.xz").stat().st_size < 10_000
    with archive.unpacked(tmp_path / "a.tar.xz") as folder:
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        made = ("recipe.yaml", "metrics.jsonl", "log.txt", "eval/knn.json", "pictures/b.png")
        assert names == {"study.json", *(f"mae-0/{name}" for name in made)}
        log = (folder / "mae-0/log.txt").read_text().splitlines()
        assert [line[20:].split("/")[0] for line in log] == [
            "run: x", "step 3", "step 3: knn 4.0", "step 9", "done: step 9",
        ]  # fmt: skip
        lines = (folder / "mae-0/metrics.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        assert len(kept) == archive.STEPS
        assert (kept[0], kept[-1]) == ({"step": 1, "loss": 1.3333}, {"step": 1000, "loss": 1000.3})
        knn = json.loads((folder / "mae-0/eval/knn.json").read_text())
        assert knn["top1"] == 12.3456789  # claims hang on the digits of results
    (tmp_path / "a.tar.xz").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"a\.tar\.xz: not an archive of runs"):
        rebuild(tmp_path / "a.tar.xz")
    with pytest.raises(UserError, match="absent: no such file"):
        rebuild(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("study.json", {"scale": None}, "study.json: not the record of a study"),
        ("facts.json", {"claims": [99]}, "facts.json: names claims that there are not"),
        ("facts.json", {"seeds": 0}, "facts.json: names claims that there are not, or no seeds"),
        ("facts.json", {"claims": [[5]]}, "facts.json: is missing from the archive, or damaged"),
        ("facts.json", {"seconds": float("nan")}, "facts.json: seconds nan: must be at least 0"),
        ("study.json", None, r"b\.tar\.xz: has no study\.json"),
    ],
)
def test_an_archive_of_something_else_is_one_sentence(name, change, sentence, tmp_path):
    output = tmp_path / "out"
    begun_study(output)
    facts = asdict(Facts((5,), 2, 7200.0, "core"))
    (output / "facts.json").write_text(json.dumps(facts))
    if change is None:
        (output / name).unlink()
    else:
        (output / name).write_text(json.dumps(json.loads((output / name).read_text()) | change))
    archive.pack(output, tmp_path / "b.tar.xz")
    with pytest.raises(UserError, match=sentence):
        rebuild(tmp_path / "b.tar.xz")
    assert not (tmp_path / "b.html").exists()


def test_the_pictures_of_most_encoders_are_kept(data, tmp_path):
    """Drawn again where another method is there, and an archive's where the weights are gone."""
    chosen = settings(data, tmp_path, "--claims", "5", "--seeds", "1")
    study = cifar_plan.study_of(chosen.workspace, (5,), 1, 2.0)

    def look():
        return [job.makes.parent for job in cifar_plan.jobs_of_rows(study) if job.name == "look"]

    (two,) = look()
    two.mkdir(parents=True)
    (two / "index.html").write_text("")
    (two / "pca.png").write_bytes(b"two")
    study = replace(study, claims=claims_of([3, 5]))
    (three,) = look()
    assert three != two
    three.mkdir()
    (three / "pca.png").write_bytes(b"three")
    assert archive.selected(tmp_path)["look/pca.png"] == b"three"
    (tmp_path / "look/pca.png").write_bytes(b"archived")
    assert look() == []
    assert archive.selected(tmp_path)["look/pca.png"] == b"archived"


def begun_study(output):
    """Claims 3, 5 and 9 of two seeds: C-MAE is complete, R-MAE has one seed, claim 9 nothing but
    MAE; runs as pretraining leaves them, without their weights."""
    output.mkdir()
    scale = read_scale("cifar")
    made = json.loads(json.dumps(asdict(replace(scale, train="", val="", hours=None, tried=""))))
    record = {"scale": made, "images": "", "tuned": True, "compute": 2.3}
    (output / "study.json").write_text(json.dumps(record))
    trials = [vars(Trial("MAE", "pretrain", rate, "linprobe", 40.0)) for rate in (5e-4, 2e-3)]
    (output / "tuning.json").write_text(json.dumps({"trials": trials}))
    study = cifar_plan.study_of(Workspace(output, scale), (3, 5, 9), 2, 2.3)
    for number, (name, metrics) in enumerate(wanted_metrics(study.claims, study.names).items()):
        row = study.row(name)
        for seed in range(0 if "nothing" in name or "jitter" in name else 2 - (name == "R-MAE")):
            run = output / run_name(row, seed)
            (run / "eval").mkdir(parents=True)
            recipe = row_recipe(study.workspace, row).model_copy(update={"seed": seed})
            (run / "recipe.yaml").write_text(dump_recipe(recipe))
            steps = [{"step": n, "loss": 2 / (n + seed), "images_per_second": 300 + n % 7}
                     for n in range(25, 3141, 25)]  # fmt: skip
            (run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
            lines = ("run: x", *(f"step {s['step']}/3125  loss" for s in steps), "done: step 3125")
            said = (f"2026-11-26 15:{n // 60:02}:{n % 60:02} {x}\n" for n, x in enumerate(lines))
            (run / "log.txt").write_text("".join(said))
            value = 40.123456 + 10 * number + seed / 7
            for metric in metrics:
                result = {"protocol": metric, "image" if metric == "psnr" else "top1": value}
                if metric == "linprobe":
                    result |= {"protocol": "linprobe-cached", "feature": "cls"}
                (run / f"eval/{metric}.json").write_text(json.dumps(result))
    return study


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


def test_a_study_continues_from_its_archive(data, tmp_path, capsys):
    """Elsewhere, without the weights: trials and results count, and what is missing is made, with
    the pretrainings that it needs."""
    words = ("--claims", "5", "6", "--seeds", "1")
    begun = settings(data, tmp_path / "out", *words)
    record = cifar_plan.claim_output(begun)
    tuning = cifar_plan.tuning_of(begun)
    rates = {(m, r): 40.0 + r for m in ("MAE", "R-MAE") for r in (5e-4, 2e-3)}
    fill(tuning, rates)
    tuning.write()
    study = cifar_plan.study_of(begun.workspace, begun.claims, 1, record["compute"])
    for name, what, protocol in (("MAE", "psnr", "psnr"), ("MAE", "finetune", "finetune"),
                                 ("R-MAE", "psnr", "psnr")):  # fmt: skip
        path = result_path(begun.workspace, study.row(name), 0, what)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"protocol": protocol, "top1": 40.0, "image": 20.0}))
    archive.pack(tmp_path / "out", tmp_path / "a.tar.xz")
    words = (*words, "--restore", tmp_path / "a.tar.xz")
    chosen = settings(data, tmp_path / "elsewhere" / "new", *words)
    cifar_paper(replace(chosen, dry_run=True))
    assert f"{chosen.output}/" in capsys.readouterr().out
    assert not chosen.output.parent.exists()
    cifar_plan.restore_output(chosen, chosen.restored)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["new"]
    assert cifar_plan.claim_output(chosen) == record
    bill = Rates(tmp_path / "rates.json", str(data / "shards/train"))
    plan = cifar_plan.make_plan(chosen, bill)
    stages = [[job.name for job in stage if not job.done] for stage in plan.stages]
    longer = [f"{run_name(study.row(name), 0)} finetune" for name in LONGER]
    assert stages == [[], [], longer]
    cifar_plan.tuning_of(chosen).write()
    trials = read_trials(chosen.output / "tuning.json")
    assert {(t.method, t.base_lr): t.value for t in trials} == rates
    more = replace(chosen, claims=(5, 14))  # MAE's and R-MAE's linear probe
    names = [job.name for job in cifar_plan.make_plan(more, bill).stages[2] if not job.done]
    mae = "mae-optimizer-base-lr-0-002-0"
    again = {f"{r}{mae} {what}" for r in ("", "r") for what in ("pretrain", "linprobe")}
    new = {f"r{mae} finetune"}  # MAE's is there
    assert {name for name in names if name.split()[0].endswith(mae)} == again | new
    assert names[-1] == "look"
    cifar_plan.restore_output(chosen, chosen.restored)  # the next sitting's command is the same
    assert "has the study of" in capsys.readouterr().out
    assert (chosen.output / "tuning.json").is_file()
    for other in ({**record, "compute": 9.0}, None):
        path = chosen.output / "study.json"
        path.write_text(json.dumps(other)) if other else path.unlink()
        with pytest.raises(UserError, match=r"new holds something already; name another --output"):
            cifar_plan.restore_output(chosen, chosen.restored)


def test_what_cannot_be_restored_leaves_nothing(data, tmp_path):
    (tmp_path / "out/mae-0/eval").mkdir(parents=True)
    (tmp_path / "out/mae-0/eval/knn.json").write_text(json.dumps({"protocol": "knn", "top1": 1.0}))
    archive.pack(tmp_path / "out", tmp_path / "nothing.tar.xz")
    cifar_plan.claim_output(settings(data, tmp_path / "out", "--untuned"))
    archive.pack(tmp_path / "out", tmp_path / "other.tar.xz")
    (tmp_path / "bad.tar.xz").write_bytes(b"no tar")
    odd = archive.compressed({"study.json": b"", "study.json/a": b""})
    (tmp_path / "odd.tar.xz").write_bytes(odd)
    for name, sentence in (
        ("odd", "study.json/a: cannot be unpacked (Not a directory)"),
        ("bad", "bad.tar.xz: not an archive of runs"),
        ("absent", "absent.tar.xz: cannot be read"),
        ("nothing", "nothing.tar.xz: has no study.json, so it is not of eval/cifar_paper.py"),
        ("other", "other.tar.xz: was made with another tuned"),
    ):
        path = tmp_path / f"{name}.tar.xz"
        chosen = settings(data, tmp_path / "else/new", "--restore", path)
        with pytest.raises(UserError, match=re.escape(sentence)):
            cifar_plan.restore_output(chosen, path)
    assert not (tmp_path / "else").exists()


def test_a_plan_that_was_measured_before_keeps_no_study_from_its_archive(data, tmp_path):
    """Into a folder that --dry-run has made, by a link to another disk."""
    begun = settings(data, tmp_path / "out", "--claims", "5", "--seeds", "1")
    cifar_plan.claim_output(begun)
    (begun.output / "rates.json").write_text('{"theirs": 1.0, "both": 1.0}')
    archive.pack(begun.output, tmp_path / "a.tar.xz")
    disk, link = tmp_path / "disk", tmp_path / "new"
    disk.mkdir()
    link.symlink_to(disk)
    (disk / "rates.json").write_text('{"ours": 2.0, "both": 2.0}')
    cifar_plan.restore_output(replace(begun, output=link), tmp_path / "a.tar.xz")
    assert link.is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["rates.json", "study.json"]
    assert read_rates(disk / "rates.json") == {"theirs": 1.0, "both": 2.0, "ours": 2.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.xz", "disk", "new", "out"]


def test_pictures_leave_an_archive_before_it_is_too_large(tmp_path, monkeypatch):
    for number in range(4):
        folder = tmp_path / f"out/run{number}-0/pictures"
        folder.mkdir(parents=True)
        (folder.parent / "recipe.yaml").write_text("name: mae\n")
        (folder / "a.png").write_bytes(os.urandom(40_000))
    monkeypatch.setattr(archive, "LARGEST", 100_000)
    assert archive.pack(tmp_path / "out", tmp_path / "a") < 100_000
    with archive.unpacked(tmp_path / "a") as folder:
        assert len(list(folder.rglob("*.png"))) == 2
        assert len(list(folder.rglob("recipe.yaml"))) == 4
    monkeypatch.setattr(archive, "LARGEST", 100)
    with pytest.raises(UserError, match="are over 100"):
        archive.pack(tmp_path / "out", tmp_path / "a")


# ------------------------------------------------------------------ all of it


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
                     *LONGER):  # fmt: skip
            line = next(s for s in text.splitlines() if re.match(rf"\| {name}[^,|]* \|", s))
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
        ("MAE, 90 % masked, as long", "90 % masked, for the same time"),
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

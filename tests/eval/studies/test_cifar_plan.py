"""CIFAR-10's study: every claim can be planned and billed; what does not belong does not mix."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from cifar_study import settings
from eval_helpers import coloured_images, other_content, write_shards

from eval.cifar_paper import check, cifar_paper, note_facts
from eval.paper.commands import Workspace, read_scale, row_jobs, row_recipe, run_name
from eval.paper.cost import START, Rates, read_rates, recipe_of, within
from eval.paper.job_runner import Command, costs, needed, unique
from eval.paper.made_with import check_recipes
from eval.studies import archive, cifar_plan
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
from eval.studies.claims import CLAIMS
from eval.studies.study import wanted_metrics
from eval.studies.tuning import read_trials
from pipeline.config.recipe import dump_recipe
from pipeline.data.order import steps_per_epoch
from pipeline.errors import UserError
from shard_tools.cores import cores

ROOT = Path(__file__).parents[3]


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
    train = shutil.move(others / "shards/train", others / "before")
    other_content(train, others / "shards/train")
    with pytest.raises(UserError, match="was made with another test_images, images; choose"):
        cifar_plan.claim_output(settings(others, tmp_path / "o"))
    for key in cifar_plan.LATER:  # as earlier ones have none
        del record[key]
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

"""Rows become the commands of the recipes' README; what a table shows is of these settings."""

import json
import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from eval_helpers import coloured_images, other_content, write_shards
from tiny import tiny_recipe

from eval import linprobe, reproduce
from eval.paper import commands as rows
from eval.paper import reproduction
from eval.paper.made_with import claim_output, made_with
from eval.paper.published import read_paper
from eval.paper.reproduction import choose_rows, columns_of, find_table, our_result, result_path
from pipeline.config.recipe import RECIPES, dump_recipe, load_recipe
from pipeline.cost.dry_run import dry_run, flops_per_image
from pipeline.errors import UserError

README = RECIPES / "README.md"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    write_shards(folder / "train", *coloured_images(640, 8, seed=1), per_shard=64)
    write_shards(folder / "val", *coloured_images(32, 8, seed=2))
    return folder


def workspace_of(shards, scale, output="out"):
    return rows.Workspace(
        Path(output), rows.read_scale(scale, str(shards / "train"), str(shards / "val"))
    )


def documented():
    """Recipes that the README's commands describe, as (recipe, samples per epoch or 0)."""
    found = []
    for command in re.findall(r"`(pretrain --.*?)`", README.read_text()):
        words = shlex.split(command)
        name = Path(words[words.index("--recipe") + 1]).name
        sets = [b for a, b in pairwise(words) if a == "--set"]
        found.append(plain(load_recipe(RECIPES / name, sets)))
    return found


def plain(recipe):
    """A recipe's content without its name, its seed and how many images it draws."""
    content = recipe.model_dump(mode="json")
    content["data"].pop("samples_per_epoch")
    return json.dumps(content | {"name": "", "seed": 0}, sort_keys=True)


def test_full_scale_runs_the_commands_of_the_readme(shards):
    """Each pretraining of each table, at full scale, is a documented command's recipe."""
    known, seen = documented(), []
    workspace = workspace_of(shards, "full")
    for table in read_paper():
        for row in table.rows:
            jobs = [
                j for j in rows.pretrain_job(workspace, row, 0) if "pretrain.py" in str(j.command)
            ]
            for job in jobs:
                assert Path(job.command[0]).name == "deepspeed"
                sets = [b for a, b in pairwise(job.command) if a == "--set"]
                path = job.command[job.command.index("--recipe") + 1]
                seen.append(plain(load_recipe(path, sets)))
                assert seen[-1] in known, (table.number, row.name)
    assert len(seen) == 49


def test_few_images_draw_as_many_as_the_whole_set_has(shards):
    workspace = workspace_of(shards, "full")
    row = next(r for r in find_table(7).rows if r.name == "one per class")
    data, job = rows.pretrain_job(workspace, replace(row, images=8), 3)
    assert data.command[2:] == (
        str(shards / "train"), "out/data/train-8-one-per-class",
        "--count", "8", "--choose", "one-per-class",
    )  # fmt: skip
    assert "data.samples_per_epoch=640" in job.command
    assert "seed=3" in job.command
    assert job.needs == (data.name,)


def test_the_supervised_row_draws_as_many_images_as_the_others_and_is_billed_for_them(shards):
    """Tab. 8: 1000 images, as many draws with replacement as pretraining makes of them."""
    workspace = workspace_of(shards, "full")
    table = reproduce.find_table(8)
    others, supervised = (
        replace(reproduce.choose_rows(table, [name])[0], images=8) for name in ("MAE", "supervised")
    )
    (*_, pretrain), (_, train, _) = (
        rows.pretrain_job(workspace, row, 0) for row in (others, supervised)
    )
    words = " ".join(train.command)
    assert "--samples-per-epoch 640" in words
    assert "--batch-size" not in words  # the others' 1024 is finetuning's default
    assert train.images == 100 * 640
    assert pretrain.images == 0  # a batch of 4096 is more than these 640
    assert train.flops == pytest.approx(train.images * 3 * rows.forward_flops(
        rows.row_recipe(workspace, supervised).encoder))  # fmt: skip


def test_evaluations_of_a_row(shards):
    workspace = workspace_of(shards, "full")
    table = find_table(4)
    row = choose_rows(table, ["C-MAE, BYOL"])[0]
    jobs = rows.row_jobs(workspace, row, 1, columns_of(table, row))
    names = [Path(job.command[1]).name for job in jobs]
    assert names == ["pretrain.py", "linprobe.py", "finetune.py", "finetune.py"]
    probe, whole, few = (" ".join(job.command[2:]) for job in jobs[1:])
    assert "--fraction 0.1 --subset-seed 1" in few
    assert "--fraction" not in whole
    assert "--protocol" not in probe  # MAE's
    assert all(job.needs == (jobs[0].name,) for job in jobs[1:])
    random = next(r for r in find_table(1).rows if r.name == "random, 300 epochs")
    (job,) = rows.row_jobs(workspace, random, 0, ["finetune"])
    words = " ".join(job.command)
    assert "--encoder random --arch vit_base_patch16_224" in words
    assert words.endswith("--epochs 300")
    (mini,) = rows.row_jobs(workspace_of(shards, "mini"), random, 0, ["finetune"])
    assert rows.option(mini.command, "--epochs", None) == "12"  # three times the scale's 4


@pytest.mark.parametrize(
    ("table", "name", "rate"),
    [
        (1, "MAE, 100 epochs", 0.1),
        (1, "R-MAE", 0.2),
        (1, "R-MAE†", 0.2),
        (1, "R-MAE‡", 0.2),
        (4, "C-MAE without mask tokens", 0.3),
    ],
)
def test_a_scale_changes_recipes_by_what_they_measure(table, name, rate):
    rates = {
        "reconstruction": ("optimizer.base_lr=0.1", "views.mask_ratio=0.8"),
        "relaxed": ("optimizer.base_lr=0.2",),
        "contrast": ("optimizer.base_lr=0.3",),
    }
    scale = rows.Scale("s", "python", "train", "val", **rates)
    (row,) = choose_rows(find_table(table), [name])
    recipe = rows.row_recipe(rows.Workspace(Path("out"), scale), row)
    assert recipe.optimizer.base_lr == rate
    assert recipe.views.mask_ratio == (0.75 if rate == 0.3 else 0.8)
    told = replace(scale, last=("optimizer.base_lr=0.4",))
    assert rows.row_recipe(rows.Workspace(Path("out"), told), row).optimizer.base_lr == 0.4


@pytest.mark.parametrize(
    ("scale", "chosen", "other"),
    [("full", "cls", "mean_patch"), ("mini", "mean_patch", "cls")],
)
def test_one_feature_counts_in_a_table_and_the_other_is_beside_it(
    shards, tmp_path, scale, chosen, other
):
    workspace = workspace_of(shards, scale, str(tmp_path))
    table = reproduce.find_table(8)
    chosen_rows = reproduce.choose_rows(table, ["MAE", "supervised"])
    mae, supervised = (rows.row_jobs(workspace, r, 0, ["linprobe"])[-1] for r in chosen_rows)
    args, last = (linprobe.build_parser().parse_args(job.command[2:]) for job in (mae, supervised))
    assert (args.feature, list(args.also)) == (chosen, [other])
    assert (last.feature, list(last.also)) == ("mean_patch", [])  # it was trained with
    mae.makes.parent.mkdir(parents=True)
    result = {"protocol": "linprobe-mae", "feature": chosen, "top1": 40.0, "top5": 80.0,
              "also": [{"feature": other, "top1": 30.25}]}  # fmt: skip
    mae.makes.write_text(json.dumps(result))
    shown = reproduction.beside("x", [(chosen_rows[0], ["linprobe"])], workspace, 1)
    names = {"cls": "cls token", "mean_patch": "mean of patches"}
    assert (shown.rows[0].cells[2].value, shown.rows[0].cells[2].note) == (
        "40.00", f"{names[other]} 30.25",
    )  # fmt: skip
    assert f"Our linear probes read the {names[chosen]}." in shown.notes


def test_a_run_is_shared_by_the_tables_that_name_it():
    first = next(r for r in find_table(1).rows if r.name == "MAE, 100 epochs")
    fourth = next(r for r in find_table(4).rows if r.name == "MAE")
    assert rows.run_name(first, 2) == rows.run_name(fourth, 2) == "mae-2"
    names = {}
    for table in read_paper():
        for row in table.rows:
            if row.recipe or row.initial:
                names.setdefault(rows.run_name(row, 0), set()).add((row.recipe, row.set, row.images,
                    row.sampling if row.images else "", row.strong, row.classes, row.initial,
                    str(row.finetune)))  # fmt: skip
    assert all(len(kinds) == 1 for kinds in names.values()), names


def test_every_row_has_a_plan_in_miniature(shards):
    """Of one block each, whose dry runs take a third of the time."""
    workspace = workspace_of(shards, "mini")
    scale = workspace.scale
    one = "measure.decoder.depth=1"
    scale = replace(
        scale, reconstruction=(*scale.reconstruction, one), relaxed=(*scale.relaxed, one)
    )
    workspace = replace(workspace, scale=replace(scale, last=("encoder.options={depth: 1}",)))
    for table in read_paper():
        for row in choose_rows(table, None):
            for job in rows.row_jobs(workspace, row, 0, columns_of(table, row)):
                assert job.flops < 1e14 / 4, job.name


def test_flops_are_those_of_a_vit_b():
    """17.56 G multiply-adds of ViT-B/16 at 224 by hand: 12 blocks of 12 n d² + 2 n² d, and the
    patch embedding."""
    recipe = load_recipe(RECIPES / "mae.yaml")
    n, d = 197, 768
    adds = 12 * (12 * n * d**2 + 2 * n**2 * d) + 196 * d * 768
    assert adds == pytest.approx(17.56e9, rel=1e-3)
    assert rows.forward_flops(recipe.encoder) == 2 * adds


@pytest.mark.parametrize("name", ["mae", "rmae", "cmae"])
def test_pretraining_is_billed_by_the_exact_dry_run(name):
    """What estimate counts, which is what a real step does (test_estimate); rows that differ in
    epochs, batch and data share it."""
    recipe = tiny_recipe(name)
    assert rows.pretrain_flops(recipe) == dry_run(recipe, 8, "fp32").flops / 8
    rows._step_flops.cache_clear()
    assert rows.pretrain_flops(recipe) == flops_per_image(recipe, 8, 1)
    longer = tiny_recipe(name, "optimizer.epochs=77", "seed=5")
    assert rows.pretrain_flops(longer) == rows.pretrain_flops(recipe)
    assert rows._step_flops.cache_info().misses == 1
    hidden = tiny_recipe(name, "views.mask_ratio=0.5")
    assert rows.pretrain_flops(hidden) != rows.pretrain_flops(recipe)


def test_the_plan_bills_images_times_the_dry_run(shards):
    row = choose_rows(find_table(1), ["R-MAE"])[0]
    workspace = workspace_of(shards, "mini")
    (job,) = rows.pretrain_job(workspace, row, 0)
    recipe = rows.row_recipe(workspace, row)
    assert job.images == 28 * 640 // 128 * 128
    assert recipe.batch_size >= 128
    assert job.flops == pytest.approx(job.images * dry_run(recipe, 128, "fp32").flops / 128)


def test_a_result_without_its_metric_is_named(tmp_path, shards):
    workspace = replace(workspace_of(shards, "mini"), output=tmp_path)
    row = choose_rows(find_table(1), ["R-MAE"])[0]
    path = result_path(workspace, row, 0, "finetune")
    path.parent.mkdir(parents=True)
    for text, sentence in (
        ("{", "is not JSON"), ("{}", "has no top1; remove it"),
        ('{"protocol": "finetune", "top1": null}', "top1 is None, not a number"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{path}.*{sentence}"):
            our_result(workspace, row, 0, "finetune")
    path.write_text('{"protocol": "finetune", "top1": 50.5}')
    assert our_result(workspace, row, 0, "finetune") == 50.5
    assert our_result(workspace, row, 1, "finetune") is None


# ------------------------------------------------------------------ command


def test_dry_run_prints_commands_and_costs_and_runs_nothing(shards, tmp_path, capsys):
    words = ["--table", "1", "--scale", "mini", "--rows", "R-MAE", "--dry-run", "--seeds", "2"]
    words += ["--set", "optimizer.epochs=7"]
    data = ["--train", shards / "train", "--val", shards / "val", "--output", tmp_path / "o"]
    reproduce.reproduce(reproduce.parse_args([*words, *map(str, data)]))
    printed = capsys.readouterr().out
    assert "rmae-1 pretrain" in printed
    assert printed.count("--set optimizer.epochs=28 --set optimizer.epochs=7 --set seed=") == 2
    assert "6 of 6 commands to run" in printed
    assert not (tmp_path / "o").exists()


def test_results_of_other_settings_do_not_pass_for_these(shards, tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def run_commands(*_):
        raise Begun

    def begin(*more):
        words = ["--table", "1", "--scale", "mini", "--rows", "R-MAE", "--output", tmp_path / "o"]
        words += ["--train", shards / "train", "--val", shards / "val", *more]
        reproduce.reproduce(reproduce.parse_args(list(map(str, words))))

    monkeypatch.setattr(reproduction, "run_commands", run_commands)
    (tmp_path / "few.txt").write_text("a.jpg")
    for same in ([], ["--seeds", 2, "--also", "fewshot"], ["--set", "data.workers=2"]):
        with pytest.raises(Begun):
            begin(*same)
    for option, value in (
        ("--set", "optimizer.base_lr=0.5"), ("--val", shards / "train"), ("--scale", "cifar-tiny"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"o: was made with another {option}; choose another"):
            begin(option, value, "--dry-run")
    others = other_content(shards / "train", tmp_path / "others")
    with pytest.raises(UserError, match="o: was made with another --train; choose another"):
        begin("--train", others, "--dry-run")
    earlier = json.loads((tmp_path / "o/reproduction.json").read_text())
    del earlier["training images"], earlier["validation images"]  # as earlier ones have none
    (tmp_path / "o/reproduction.json").write_text(json.dumps(earlier))
    with pytest.raises(Begun):
        begin()
    listed = replace(workspace_of(shards, "mini"), few_labels=str(tmp_path / "few.txt"))
    made = made_with(listed, [(find_table(1).rows[0], ["fewshot"])])
    with pytest.raises(UserError, match="o: was made with another --few-labels; choose another"):
        claim_output(tmp_path / "o", made)
    (tmp_path / "o/rmae-0").mkdir()
    (tmp_path / "o/rmae-0/recipe.yaml").write_text(dump_recipe(load_recipe("rmae")))
    with pytest.raises(UserError, match=r"o/rmae-0: was made with another recipe \(batch_size"):
        begin()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--table", "9"], "--table 9: the paper's tables are 1, 2"),
        (["--table", "4", "--rows", "MEA"], "rows of table 4 are: MAE; MAE, jitter"),
        (["--table", "4", "--scale", "huge"], "knows full, mini"),
        (["--table", "4", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--table", "4", "--train", "/nowhere"], "/nowhere: no such folder"),
        (["--table", "4"], "train: 640 samples are fewer than one batch of 1024"),
        (["--table", "4", "--set", "seed=7"], "--set seed=7: seeds are what --seeds N says"),
    ],
)
def test_bad_input_is_one_sentence(shards, words, sentence):
    data = ["--train", str(shards / "train"), "--val", str(shards / "val"), "--dry-run"]
    with pytest.raises(UserError, match=sentence):
        reproduce.reproduce(reproduce.parse_args([*data, *words]))


def test_batches_larger_than_the_demos_data_are_refused_before_they_are_built():
    words = ["--table", "4", "--scale", "mini", "--dry-run", "--set", "batch_size=8192"]
    with pytest.raises(UserError, match="4096 samples are fewer than one batch of 8192"):
        reproduce.reproduce(reproduce.parse_args(words))


def test_only_the_miniature_is_made_of_the_demos_photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/cifar10/shards/train: no such folder"):
        reproduce.reproduce(reproduce.parse_args(["--table", "1", "--scale", "cifar"]))
    assert not Path("data").exists()


def test_a_list_of_labelled_images_takes_the_place_of_a_drawn_tenth(shards):
    row = choose_rows(find_table(1), None)[0]
    drawn = workspace_of(shards, "mini")
    listed = replace(drawn, few_labels="lists/10percent.txt")
    (first,), (second,) = (
        [j for j in rows.row_jobs(w, row, 0, ["fewshot"]) if j.name.endswith("fewshot")]
        for w in (drawn, listed)
    )
    assert "--fraction 0.1" in " ".join(map(str, first.command))
    assert "--subset lists/10percent.txt" in " ".join(map(str, second.command))
    assert "--fraction" not in map(str, second.command)
    assert first.flops == second.flops

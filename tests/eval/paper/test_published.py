"""Every published row is there once, can be run, and finds the runs of its method."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from eval.paper.beside import one_table, paper_tables
from eval.paper.published import PaperTable, find_row, read_paper, row_recipe
from eval.paper.recipe_table import README, rewrite
from eval.protocols import headings
from eval.reporting.run_records import Group, Run
from eval.reporting.tables import accuracy_table
from pipeline.config.recipe import RECIPES, dump_recipe, load_recipe
from pipeline.config.schema import IMAGENET_IMAGES
from pipeline.config.texts import flatten
from pipeline.errors import UserError

# Baselines of Tab. 5 and 8 whose recipes are not masked image modelling.
BASELINES = {"mocov3", "supervised"}


def table(number: int) -> PaperTable:
    return next(t for t in read_paper() if t.number == number)


def run(recipe: str, *overrides: str, results: tuple[dict, ...] = ()) -> Run:
    path = RECIPES / f"{recipe}.yaml"
    tree = yaml.safe_load(dump_recipe(load_recipe(path, overrides)))
    return Run(Path(recipe), tree, {}, {}, (), (), results, flatten(tree))


def test_all_tables_are_there() -> None:
    sizes = {t.number: len(t.rows) for t in read_paper()}
    assert sizes == {1: 11, 2: 8, 3: 4, 4: 7, 5: 17, 6: 9, 7: 3, 8: 6}
    for t in read_paper():
        assert set(t.columns) <= set(headings())
        assert len({row.name for row in t.rows}) == len(t.rows)
        assert all(row.published for row in t.rows)


def test_tables_1_and_2_print_every_published_row() -> None:
    """In the paper's order, cited ones too (Tab. 1 and 2 of the paper)."""
    shown = {
        t.number: [(row.name.split(" (")[0], row.published["finetune"]) for row in t.rows]
        for t in read_paper()
    }
    cited = [("MoCo v3, 300 epochs", 83.2), ("DINO, 800 epochs", 82.8)]
    assert shown[1] == [
        ("random, 100 epochs", 80.9), ("random, 300 epochs", 82.1), *cited,
        ("BEiT, 300 epochs", 82.9), ("MAE, 1600 epochs", 83.6), ("CAE, 300 epochs", 83.3),
        ("MAE, 100 epochs", 83.1), ("R-MAE", 82.7), ("R-MAE†", 82.8), ("R-MAE‡", 82.7),
    ]  # fmt: skip
    assert shown[2] == [
        ("random, 100 epochs", 80.9), *cited, ("MAE, 1600 epochs", 83.6),
        ("MAE, 100 epochs", 83.1), ("C-MAE, 100 epochs", 82.9),
        ("MAE, 400 epochs", 83.2), ("C-MAE, 400 epochs", 83.1),
    ]  # fmt: skip
    runs = paper_tables([Group("mine", (run("mae", results=(result("finetune", 50.0),)),))])
    printed = {t.title[:6]: [row.cells[0].value for row in t.rows] for t in runs}
    assert len(printed["Tab. 1"]) == 11
    assert len(printed["Tab. 2"]) == 8


@pytest.mark.parametrize(
    ("number", "name", "published"),
    [
        (1, "R-MAE", {"finetune": 82.7, "psnr": 23.7}),
        (2, "C-MAE, 400 epochs", {"finetune": 83.1}),
        (3, "token-wise, patches", {"finetune": 82.9}),
        (4, "C-MAE without mask tokens", {"linprobe": 56.2, "finetune": 82.6, "fewshot": 67.5}),
        (5, "MAE, mask, cutmix", {"finetune": 86.1}),
        (5, "C-MAE, cutmix, colour", {"finetune": 83.1}),
        (6, "10 images, 2 epochs", {"finetune": 81.9}),
        (8, "R-MAE", {"linprobe": 25.9, "finetune": 82.1, "fewshot": 58.8}),
    ],
)
def test_figures_are_the_published_ones(number: int, name: str, published: dict) -> None:
    assert next(r for r in table(number).rows if r.name == name).published == published


def test_every_row_names_a_recipe_that_loads() -> None:
    for t in read_paper():
        for row in t.rows:
            path = RECIPES / f"{row.recipe}.yaml"
            if row.recipe and not (row.recipe in BASELINES and not path.is_file()):
                load_recipe(path, row.set)


def test_rows_find_the_runs_of_their_method() -> None:
    small = ("encoder.options={depth: 2}", "measure.decoder.width=64", "batch_size=64")
    cases = {
        ("mae",): "MAE",
        ("mae", "views.jitter.where=visible"): "MAE, jitter of the visible patches",
        ("cmae",): "C-MAE",
        (
            "cmae",
            "encoder.masked_tokens=drop",
            "measure.tokens=mean_patch",
        ): "C-MAE without mask tokens",
        ("cmae", "measure={kind: byol}"): "C-MAE, BYOL",
        ("rmae",): None,
        ("mae", "views.mask_ratio=0.5"): None,
    }
    for case, name in cases.items():
        row = find_row(table(4), run(*case))
        assert (row.name if row else None) == name, case
    row = find_row(table(1), run("rmae", *small))
    assert row is not None
    assert row.name == "R-MAE"


def test_schedule_decides_between_rows_of_one_method() -> None:
    long = find_row(table(2), run("mae", "optimizer.epochs=400"))
    short = find_row(table(2), run("mae", "optimizer.epochs=7", "optimizer.warmup_epochs=1"))
    assert long is not None
    assert short is not None
    assert (long.name, short.name) == ("MAE, 400 epochs", "MAE, 100 epochs")


def test_small_data_rows_are_not_taken_for_the_whole_set() -> None:
    assert all(row_recipe(row) is None for row in table(7).rows)
    assert find_row(table(8), run("mae")) is None


def result(protocol: str, top1: float, fraction: float = 1.0, **encoder: object) -> dict:
    settings = {"fraction": fraction, "epochs": 100}
    return {"protocol": protocol, "top1": top1, "settings": settings, "encoder": encoder}


def test_ours_stand_beside_the_published_figures() -> None:
    results = (
        result("linprobe-cached", 11.0),
        result("linprobe-mae", 12.0),
        result("finetune", 50.0),
        result("finetune", 30.0, fraction=0.1),
        result("finetune", 20.0, random=True, random_seed=0),
    )
    shown = paper_tables([Group("mine", (run("mae", results=results),))])
    assert [t.title.split(":")[0] for t in shown] == ["Tab. 1", "Tab. 2", "Tab. 4"]
    rows = {row.cells[0].value: [cell.value for cell in row.cells[1:]] for row in shown[2].rows}
    assert rows["MAE"] == ["54.5", "12.00", "83.1", "50.00", "67.5", "30.00"]
    assert rows["C-MAE"] == ["41.1", "-", "82.9", "-", "66.4", "-"]
    first = {row.cells[0].value: [cell.value for cell in row.cells[1:]] for row in shown[0].rows}
    assert first["random, 100 epochs"] == ["80.9", "20.00", "-", "-"]
    assert first["random, 300 epochs"] == ["82.1", "-", "-", "-"]


def test_a_table_has_one_feature_and_says_which() -> None:
    main = result("linprobe-mae", 12.0) | {"feature": "cls"}
    beside = main | {"feature": "mean_patch", "top1": 99.0, "beside": True}
    shown = paper_tables([Group("mine", (run("mae", results=(main, beside)),))])
    (fourth,) = (t for t in shown if t.title.startswith("Tab. 4"))
    rows = {row.cells[0].value: [cell.value for cell in row.cells[1:3]] for row in fourth.rows}
    assert rows["MAE"] == ["54.5", "12.00"]
    assert "Our linear probes read the cls token." in fourth.notes
    assert not any("linear probes" in note for t in shown if t is not fourth for note in t.notes)


@pytest.mark.parametrize(("name", "shown"), [("lists/10percent.txt", "30.00"), ("some.txt", "-")])
def test_a_list_of_names_is_never_all_labels(name: str, shown: str) -> None:
    few = result("finetune", 30.0)
    few["settings"]["subset"] = name
    group = Group("mine", (run("mae", results=(few, result("finetune", 50.0))),))
    rows = {row.cells[0].value: row for row in paper_tables([group])[2].rows}
    assert [cell.value for cell in rows["MAE"].cells[3:]] == ["83.1", "50.00", "67.5", shown]
    accuracies = accuracy_table([group])
    assert accuracies is not None
    named = f"finetuning, the labels of {Path(name).name} (%)"
    assert set(accuracies.head[1:]) == {"finetuning (%)", named}


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_random_encoder_trained_longer_stands_in_its_own_row(pretrained: bool) -> None:
    def trained(top1: float, epochs: int, **encoder: object) -> dict:
        found = result("finetune", top1, **encoder)
        found["settings"]["epochs"] = epochs
        return found

    random = {"random": True, "random_seed": 0}
    longer, usual = trained(40.0, 12, **random), trained(20.0, 4, **random)
    elsewhere = trained(99.0, 7, **random)
    mae = Group("mine", (run("mae", results=(trained(50.0, 4),)),))
    alone = Group("alone", (run("mae", results=(longer, usual, elsewhere)),))
    shown = one_table(
        table(1), {"MAE, 100 epochs": [mae]} if pretrained else {}, [mae, alone][not pretrained :]
    )
    rows = {row.cells[0].value: row.cells[2].value for row in shown.rows}
    assert rows["random, 100 epochs"] == "20.00"
    assert rows["random, 300 epochs"] == "40.00"
    assert rows["MAE, 100 epochs"] == ("50.00" if pretrained else "-")


def test_a_misspelt_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "paper.yaml"
    row = {"name": "MAE", "recipes": "mae", "published": {"finetune": 1}}
    path.write_text(yaml.safe_dump({1: {"title": "", "columns": ["finetune"], "rows": [row]}}))
    with pytest.raises(UserError, match=r"table 1, MAE: .*'recipes'"):
        read_paper(path)


def test_the_recipes_readme_is_made_from_these_rows() -> None:
    """`python -m eval.paper.recipe_table` would change nothing, and every row that is pretrained
    has its command there."""
    text = README.read_text()
    assert rewrite(text) == text
    for t in read_paper():
        for row in t.rows:
            if row.recipe and row.recipe != "supervised" and not row.initial:
                assert f"| {row.name} | `pretrain " in text


def test_the_command_that_the_readme_names_for_its_tables_starts() -> None:
    """From its own folder as a script it took statistics.py there for Python's."""
    (words,) = re.findall(r"`python ([^`]*recipe_table[^`]*)`", README.read_text())
    run = [sys.executable, *words.split(), "--help"]
    assert subprocess.run(run, cwd=RECIPES.parents[1], capture_output=True).returncode == 0


def test_the_recipes_readme_makes_the_shards_that_it_names() -> None:
    text = README.read_text()
    made = re.findall(r"subset\.py \S+ data/shards/([\w-]+)", text)
    assert set(re.findall(r"data/shards/([\w-]+)", text)) == {"train", "val", *made}


def test_the_readmes_supervised_row_has_the_draws_of_the_others() -> None:
    """As reproduce.py has it; without them 100 epochs of 1000 images are 100 steps."""
    (line,) = re.findall(r".*finetune\.py .*--output runs/supervised/.*", README.read_text())
    assert f"--samples-per-epoch {IMAGENET_IMAGES}" in line
    assert "--batch-size" not in line


def test_a_table_without_its_comments_is_named() -> None:
    text = README.read_text().replace("<!-- rows of Tab. 3 -->", "")
    with pytest.raises(UserError, match=r"no comment `rows of Tab\. 3`"):
        rewrite(text)
    stale = README.read_text().replace("measure.tokens=cls`", "measure.tokens=patch`")
    assert rewrite(stale) == README.read_text() != stale


def test_a_key_that_came_later_had_todays_default() -> None:
    """A run of a version that knew no `views.predicted` is still MAE; one that used it is not."""
    now = run("mae")
    old = {key: value for key, value in now.flat.items() if key != "views.predicted"}
    assert find_row(table(4), replace(now, flat=old)) == find_row(table(4), now) is not None
    assert find_row(table(4), run("mae", "views.predicted=0.3")) is None

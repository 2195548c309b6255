"""The cheaper roads: their place in the plan, the time they are given, their table."""

import json
from dataclasses import replace

import pytest
from cifar_study import settings

from eval.paper.commands import pretrain_flops, row_recipe
from eval.paper.cost import Rates, read_rates, step_key
from eval.paper.job_runner import unique
from eval.paper.measuring import device_name
from eval.paper.reproduction import result_path
from eval.reporting.tables import Cell
from eval.studies import cifar_plan
from eval.studies.cheaper import cheaper_chapter
from eval.studies.cifar_claims import AS_LONG, QUICKER, cifar_row, claims_of
from eval.studies.significance import interval


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

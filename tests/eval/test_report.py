"""The report is one page that holds everything, says what it shows, and renders."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from eval import report
from eval.paper.beside import metrics
from eval.protocols import PROTOCOLS, Work, by_key
from eval.reporting import cka_charts
from eval.reporting.run_records import Group, group_runs, read_lines, read_run, short_names
from eval.reporting.tables import accuracy_table, against_random
from eval.reporting.variants import with_variants
from pipeline.config.recipe import RECIPES as RECIPES_DIR
from pipeline.config.recipe import dump_recipe, load_recipe
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = {
    "mae": {"kind": "reconstruction", "norm_pix": True},
    "rmae": {"kind": "reconstruction", "norm_pix": False},
    "cmae": {"kind": "infonce", "tokens": "patch"},
}


def png(width: int, height: int) -> bytes:
    """A grey PNG, written by hand so that the size is known."""
    pixels = zlib.compress((b"\0" + b"\x7f" * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = b""
    for name, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        chunks += struct.pack(">I", len(data)) + name + data + checksum
    return b"\x89PNG\r\n\x1a\n" + chunks


def result(top1: float, protocol: str = "linprobe-cached", **encoder: object) -> dict:
    return {
        "protocol": protocol,
        "feature": "cls",
        "top1": top1,
        "top5": 90.0,
        "images": 37,
        "settings": {"epochs": 90, "batch_size": 512},
        "encoder": {"arch": "vit", "options": {}, **encoder},
    }


def write_run(folder: Path, name: str, seed: int, top1: float) -> Path:
    """A run folder as pretraining leaves it, with two results."""
    run = folder / f"{name}-{seed}"
    for part in ("eval", "pictures"):
        (run / part).mkdir(parents=True)
    recipe = {"name": name, "seed": seed, "measure": RECIPES[name], "optimizer": {"epochs": 3}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}}')
    (run / "versions.json").write_text('{"torch": "2.9 <x&y>", "ranks": 2, "device": "cpu"}')
    with (run / "metrics.jsonl").open("w") as file:
        for step in (10, 20, 30):
            row = {"step": step, "epoch": step / 10, "loss": 3.0 / step, "lr": 0.1 * step}
            row |= {"similarity": 2.0 / step, "constraint": 1.0 / step}
            row |= {"images_per_second": 5.0 * step, "data_wait": 0.25, "memory_gb": 1.5}
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 40, "los')  # still being written
    (run / "pictures/step-00000010.png").write_bytes(png(12, 8))
    (run / "pictures/step-00000030.png").write_bytes(png(48, 20))
    (run / "eval/linprobe-cached.json").write_text(json.dumps(result(top1)))
    random = result(20.0 + seed, random=True, random_seed=seed)
    (run / f"eval/linprobe-cached-random-{seed}.json").write_text(json.dumps(random))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("report")
    cells = [("mae", 0, 30.0), ("rmae", 0, 40.0), ("rmae", 1, 44.0), ("cmae", 0, 35.0)]
    return [write_run(folder, *cell) for cell in cells]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    return report.write_report(runs, runs[0].parent / "out" / "report.html", "Title & <more>")[0]


class Page(HTMLParser):
    """Tags with their attributes, open tags, ids and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "wbr", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_well_formed_and_needs_no_network(page: Path) -> None:
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == []
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value[:80])
    assert not re.findall(r"url\((?!#)", text)
    assert "@import" not in text
    assert [script.get("src") for script in parsed.named("script")] == [None]
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(a.get("href") or "#")[1:] for a in parsed.named("a")}
    assert targets <= set(ids)


def test_pictures_are_the_latest_of_each_recipe(page: Path) -> None:
    *pictures, _ = Page(page.read_text()).named("img")  # the last one is the dialog's
    # 48 × 20 pixels, each shown as 12 × 12 of the screen
    assert [(p["width"], p["height"], p["class"]) for p in pictures] == [
        ("576", "240", "sharp")
    ] * 3
    captions = [p["alt"] for p in pictures]
    assert captions[0] == (
        "mae, step 30: original | masked | prediction of the masked patches | full prediction "
        "(true patch statistics)"
    )
    assert "true patch statistics" not in str(captions[1])
    assert captions[2] == "cmae, step 30: original | first view | second view"
    assert "mae: predictions are patch-normalised pixels (norm_pix)" in page.read_text()


def test_charts_show_the_logged_values(page: Path) -> None:
    text = page.read_text()
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    names = [chart.get("aria-label") for chart in charts]
    assert names == [
        "Loss: mae", "Loss: rmae", "Loss: cmae", "Learning rate", "Throughput", "Data wait",
    ]  # fmt: skip
    words = " ".join(t.text or "" for t in charts[1].iter("{http://www.w3.org/2000/svg}text"))
    assert "similarity" in words
    assert "constraint" in words
    assert all(chart.get("viewBox") for chart in charts)


def test_accuracy_is_mean_and_spread_over_seeds(runs: list[Path]) -> None:
    table = accuracy_table(group_runs([read_run(run) for run in runs]))
    assert table is not None
    cells = {row.cells[0].value: row.cells[1] for row in table.rows}
    # Random encoders: seeds 0 and 1, each once although three runs hold seed 0: 20.5 ± 0.71.
    assert cells["random encoder"].value == "20.50 ± 0.71"
    assert cells["rmae"].value == "42.00 ± 2.83"
    assert cells["rmae"].note == "+21.50 over random"
    assert against_random(-1.204, 2) == "1.20 below random"
    assert cells["mae"].value == "30.00"


def test_another_number_of_epochs_is_another_column(runs: list[Path]) -> None:
    """A random encoder finetuned three times as long is no baseline of the others."""
    longer = runs[0].parent / "random-longer"
    (longer / "eval").mkdir(parents=True)
    found = result(60.0, random=True, random_seed=0)
    found["settings"]["epochs"] = 270
    (longer / "eval/linprobe-cached.json").write_text(json.dumps(found))
    table = accuracy_table(group_runs([read_run(run) for run in (*runs, longer)]))
    assert table is not None
    assert table.head[1:] == (
        "linear probe, cached, cls token, 90 epochs (%)",
        "linear probe, cached, cls token, 270 epochs (%)",
    )
    cells = {row.cells[0].value: row.cells[1:] for row in table.rows}
    assert [c.value for c in cells["random encoder"]] == ["20.50 ± 0.71", "60.00"]
    assert (cells["rmae"][0].note, cells["rmae"][1].value) == ("+21.50 over random", "-")
    longer = "linear probe, cached, cls token, 270 epochs: 37 val"
    assert any(note.startswith(longer) for note in table.notes)


def knn(run: Path, name: str, top1: float, **more: object) -> None:
    """A result of k-NN in a run; more: settings, and the note of its encoder."""
    found = result(top1, "knn", note=more.pop("note", ""))
    found["settings"] = {"k": 20, "temperature": 0.07, "train": "t", "val": "v"} | more
    (run / f"eval/{name}.json").write_text(json.dumps(found))


def table_of(runs: list[Path]) -> dict[str, dict[str, str]]:
    """Row → column → value."""
    table = accuracy_table(with_variants(group_runs([read_run(run) for run in runs])))
    assert table is not None
    return {row.cells[0].value: {head: cell.value for head, cell in
            zip(table.head[1:], row.cells[1:], strict=True)} for row in table.rows}  # fmt: skip


def test_results_of_other_settings_are_not_averaged(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path, "rmae", seed, 40.0) for seed in (0, 1))
    for run, top1 in ((first, 10.0), (second, 14.0)):
        knn(run, "knn", top1, seed=int(top1))
    cells = table_of([first, second])["rmae"]
    assert cells["k-NN (%)"] == "12.00 ± 2.83"  # a seed of its own and no more
    knn(first, "knn-ema", 30.0, note="weights of the EMA teacher", seed=10)
    cells = table_of([first, second])["rmae"]
    assert cells["k-NN, as trained (%)"] == "12.00 ± 2.83"
    assert cells["k-NN, weights of the EMA teacher (%)"] == "30.00"
    knn(second, "knn", 14.0, k=5, seed=14)
    cells = table_of([first, second])["rmae"]
    assert cells["k-NN, k 20, as trained (%)"] == "10.00"
    assert cells["k-NN, k 5, as trained (%)"] == "14.00"
    assert cells["k-NN, k 20, weights of the EMA teacher (%)"] == "30.00"


def test_results_on_other_images_are_not_averaged(tmp_path: Path) -> None:
    """Wherever they are; a path that says it is enough, and earlier results say nothing."""

    def holds(run: Path, name: str, content: dict[str, str] | None) -> None:
        path = run / f"eval/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"content": content or {}}))

    first, second = (write_run(tmp_path, "rmae", seed, 40.0) for seed in (0, 1))
    for run, top1, path in ((first, 10.0, "v"), (second, 14.0, "elsewhere")):
        knn(run, "knn", top1, val=path)
        holds(run, "knn", {"train": "aa", "val": "bb"})
    assert table_of([first, second])["rmae"]["k-NN (%)"] == "12.00 ± 2.83"
    holds(second, "knn", None)
    assert table_of([first, second])["rmae"]["k-NN (%)"] == "12.00 ± 2.83"
    holds(second, "knn", {"train": "aa", "val": "cc"})
    cells = table_of([first, second])["rmae"]
    assert cells["k-NN, val images bb (%)"] == "10.00"
    assert cells["k-NN, val images cc (%)"] == "14.00"
    knn(first, "knn-later", 30.0)
    holds(first, "knn-later", {"train": "aa", "val": "cc"})
    assert table_of([first])["rmae"]["k-NN, val images cc (%)"] == "30.00"
    knn(first, "knn-later", 30.0, val="w")
    holds(first, "knn-later", {"train": "aa", "val": "cc"})
    assert table_of([first])["rmae"]["k-NN, val w (%)"] == "30.00"


def test_methods_on_other_images_are_not_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name, 0, 40.0) for name in ("mae", "rmae")]
    for run, images in zip(runs, ("bb", "cc"), strict=True):
        knn(run, "knn", 10.0)
        path = run / "eval/knn.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"content": {"val": images}}))
    table = table_of(runs)
    assert table["mae"]["k-NN, val images bb (%)"] == "10.00"
    assert table["rmae"]["k-NN, val images cc (%)"] == "10.00"


def test_runs_whose_folders_are_called_alike_are_told_apart(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / part, "mae", 0, 60.0) for part in ("a", "b")]
    runs.append(write_run(tmp_path / "a", "rmae", 1, 60.0))
    _, markdown = report.write_report(runs, tmp_path / "page", "x")
    text = markdown.read_text()
    for name in ("a/mae-0", "b/mae-0", "rmae-1"):
        assert name in text
    assert "a/rmae-1" not in text
    (tmp_path / "wd").mkdir()
    monkeypatch.chdir(tmp_path / "wd")
    assert short_names(["x/y/run", "y/run", "run/"]) == ["x/y/run", "wd/y/run", "wd/run"]


@pytest.mark.parametrize("key", ["val", "seed", "resize"])
def test_two_results_of_one_run_are_two_columns(key: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, "mae", 0, 40.0)
    for number, value in enumerate((1, 2)):
        knn(run, f"knn-{number}", 10.0 * value, **{key: value})
    cells = table_of([run])["mae"]
    assert (cells[f"k-NN, {key} 1 (%)"], cells[f"k-NN, {key} 2 (%)"]) == ("10.00", "20.00")


def test_one_result_in_two_files_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, "mae", 0, 40.0)
    for name in ("a", "b"):
        knn(run, name, 10.0)
    with pytest.raises(UserError, match=r"a\.json and .*eval/b\.json: two results of one eval"):
        report.write_report([run], tmp_path / "r.html", "T")


def test_a_run_counts_once_however_it_is_called(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path, "mae", 0, 40.0)
    (tmp_path / "latest").symlink_to(run)
    words = [str(run), f"{run}/", str(tmp_path / "latest"), f"{run}/../{run.name}"]
    assert report.parse_args(words).runs == (run,)
    assert f"latest: is {run}, and counts once" in capsys.readouterr().err


@pytest.mark.parametrize(("output", "page"), [
    ("rp.v1.2", "rp.v1.2.html"), ("a.md", "a.html"), ("a.html", "a.html"), ("a", "a.html"),
])  # fmt: skip
def test_the_page_is_called_as_asked(output: str, page: str) -> None:
    assert report.page_of(f"x.y/{output}") == Path("x.y") / page


def test_the_papers_tables_have_the_result_of_the_usual_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path, "mae", 0, 40.0)
    found = result(70.0) | {"resize": 64}
    (run / "eval/linprobe-cached-resize64.json").write_text(json.dumps(found))
    groups = with_variants(group_runs([read_run(run)]))
    assert metrics(groups[0].runs, "linprobe") == [40.0]


def test_a_feature_that_was_probed_beside_has_its_own_column(
    runs: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    path = run / "eval/linprobe-cached.json"
    also = [{"feature": "mean_patch", "top1": 12.5}, {"feature": "own", "diverged": True}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"also": also}))
    read = read_run(run)
    assert [r.get("beside") for r in read.results].count(True) == 1
    shown = accuracy_table(group_runs([read]))
    assert shown is not None
    assert shown.head[1:] == (
        "linear probe, cached, cls token (%)",
        "linear probe, cached, mean of patches (%)",
    )
    assert [cell.value for cell in shown.rows[0].cells[1:]] == ["30.00", "12.50"]


def test_cka_is_drawn_as_in_figure_1(runs: list[Path], tmp_path: Path) -> None:
    copies = []
    for run in runs[:2]:
        copies.append(tmp_path / run.name)
        shutil.copytree(run, copies[-1])
    table = {
        "protocol": "cka",
        "pool": "mean_patch",
        "ratios": [0.1, 0.9],
        "cka": [[1, 0.9], [0.5, 0.4]],
    }
    (copies[0] / "eval/cka-mean.json").write_text(json.dumps(table | {"encoder": {}}))
    random = table | {"encoder": {"random": True}, "cka": [[1, 1], [0.2, 0.1]]}
    (copies[1] / "eval/cka-mean-random-0.json").write_text(json.dumps(random))
    page, _ = report.write_report(copies, tmp_path / "cka.html", "CKA")
    text = page.read_text()
    what = "mean of all patches against those kept"
    for name in (f"CKA of the last block, {what}", f"CKA with 90% dropped, {what}"):
        svg = re.search(rf'<svg class="chart" role="img" aria-label="{name}".*?</svg>', text, re.S)
        assert svg, name
        words = [t.text for t in ElementTree.fromstring(svg[0]).iter() if t.tag.endswith("text")]
        assert {"mae", "random encoder"} <= set(words)
        assert "rmae" not in words


def test_every_way_to_pool_and_estimate_has_its_charts(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    pools, estimators = ("kept-in-both", "all-kept", "cls"), ("unbiased", "biased")
    ways = [(pool, hsic) for pool in pools for hsic in estimators]
    variants = [
        {"pool": p, "hsic": h, "cka": [[0.1 * n], [0.05 * n]]} for n, (p, h) in enumerate(ways)
    ]
    result = {"protocol": "cka", **variants[0], "ratios": [0.1, 0.9], "variants": variants}
    for name in ("cka-kept-in-both", "cka-cls"):  # two files of one run count once
        (run / f"eval/{name}.json").write_text(json.dumps(result | {"encoder": {}}))
    groups = group_runs([read_run(run)])
    for number, (pool, hsic) in enumerate(ways):
        tables = cka_charts.tables_of(groups, pool, hsic, random=False)
        assert tables == [([0.1, 0.9], [[0.1 * number], [0.05 * number]])]
    assert len(cka_charts.cka_charts(groups)) == 12


def test_ckas_of_other_shares_are_lines_of_their_own(tmp_path: Path) -> None:
    table = {"protocol": "cka", "pool": "kept-in-both", "encoder": {}}
    first, second = (write_run(tmp_path, "rmae", seed, 40.0) for seed in (0, 1))
    for run, ratios in ((first, [0.5, 0.25]), (second, [0.9, 0.1])):
        found = table | {"ratios": ratios, "cka": [[0.4, ratios[0]], [0.3, ratios[1]]]}
        (run / "eval/cka.json").write_text(json.dumps(found))
        teacher = found | {"cka": [[0, 0], [0, 0]]}  # of --pool all-kept --ema, named before it
        (run / "eval/cka-all-kept-ema.json").write_text(json.dumps(teacher))
    (group,) = group_runs([read_run(run) for run in (first, second)])
    tables = cka_charts.tables_of([group], "kept-in-both", "unbiased", random=False)
    found = [(ratios, values.tolist()) for ratios, values in cka_charts.averages(tables)]
    assert found == [
        ([0.25, 0.5], [[0.3, 0.25], [0.4, 0.5]]),
        ([0.1, 0.9], [[0.3, 0.1], [0.4, 0.9]]),
    ]
    by_ratio, by_block = cka_charts.cka_charts([group])
    assert "CKA with 90% dropped" in by_block
    assert [chart.count(">rmae<") for chart in (by_ratio, by_block)] == [1, 1]
    curves = [re.findall("clip-path[^>]*#0072b2", chart) for chart in (by_ratio, by_block)]
    assert [len(found) for found in curves] == [2, 1]


def test_runs_that_differ_by_more_than_the_seed_are_told_apart(runs: list[Path]) -> None:
    twin = runs[0].parent / "longer"
    shutil.copytree(runs[0], twin)
    recipe = yaml.safe_load((twin / "recipe.yaml").read_text())
    recipe["optimizer"]["epochs"] = 9
    (twin / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    labels = [g.label for g in group_runs([read_run(r) for r in (*runs, twin)])]
    assert labels == ["mae (epochs 3)", "rmae", "cmae", "mae (epochs 9)"]


def test_runs_of_a_version_before_a_key_stay_with_those_after_it(tmp_path: Path) -> None:
    """As where a study continues with later code; a value of the key makes another method."""
    recipes = [load_recipe(RECIPES_DIR / "mae.yaml", [f"seed={seed}"]) for seed in (0, 1)]
    whole = [yaml.safe_load(dump_recipe(recipe)) for recipe in recipes]
    for section, key in (
        ("data", "sizes"), ("optimizer", "layer_decay"), ("views", "predicted"),
        ("measure", "norm_pix"),
    ):  # fmt: skip
        del whole[0][section][key]
    del whole[0]["measure"]["decoder"]["attention"]
    growing = load_recipe(RECIPES_DIR / "mae.yaml", ["data.sizes=[[0.5, 160], [1, 224]]"])
    whole.append(yaml.safe_load(dump_recipe(growing)))
    for number, recipe in enumerate(whole):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    groups = group_runs([read_run(tmp_path / str(number)) for number in range(3)])
    assert [[run.name for run in group.runs] for group in groups] == [["0", "1"], ["2"]]
    assert [g.label for g in groups] == ["mae (sizes [])", "mae (sizes [[0.5, 160], [1.0, 224]])"]


def test_what_describes_a_run_is_no_term_of_its_loss(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: mae\n")
    row = {"step": 1, "loss": 2.0, "similarity": 1.0, "mfu": 0.4, "image_size": 160}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row | {"lr_first_layer": 0.1}) + "\n")
    assert read_run(tmp_path).terms == ("similarity",)


def test_results_of_an_earlier_step_are_not_those_of_the_run(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path, "rmae", seed, 40.0) for seed in (0, 1))
    for run, step, top1 in ((first, 30, 14.0), (second, 10, 10.0)):
        found = result(top1, "knn", step=step)
        (run / "eval/knn.json").write_text(json.dumps(found))
    cells = table_of([first, second])["rmae"]
    assert cells["k-NN, step 30 (%)"] == "14.00"
    assert cells["k-NN, step 10 (%)"] == "10.00"
    notes = accuracy_table(with_variants(group_runs([read_run(second)]))).notes
    assert "k-NN, 90 epochs: rmae-1's is of step 10, and the run is at step 30." in notes
    notes = accuracy_table([Group("a", (read_run(first),))]).notes
    assert not any("is of step" in note for note in notes)


def bias(run: Path, classifier: str, value: float | None, **encoder: object) -> None:
    found = {"protocol": "shape-bias", "shape_bias": value, "trials": 9}
    found["settings"] = {"classifier": f"{run}/eval/{classifier}", "images": "cue"}
    found["encoder"] = {"arch": "vit", "options": {}} | encoder
    (run / f"eval/shape-bias-{classifier}.json").write_text(json.dumps(found))


def test_shape_biases_of_several_classifiers_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, "mae", 0, 30.0)
    bias(run, "finetune", 0.4)
    bias(run, "finetune-random-0", 0.1, random=True, random_seed=0)
    rows = table_of([run])
    assert rows["mae"]["shape bias"] == "0.400"
    assert rows["random encoder"]["shape bias"] == "0.100"
    bias(run, "finetune-10percent", 0.2)
    cells = table_of([run])["mae"]
    assert cells["shape bias, classifier finetune"] == "0.400"
    assert cells["shape bias, classifier finetune-10percent"] == "0.200"


def test_a_shape_bias_without_a_decision_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, "mae", 0, 30.0)
    bias(run, "finetune", None)
    page, markdown = report.write_report([run], tmp_path / "out", "T")
    for content in (page.read_text(), markdown.read_text()):
        assert "not shown" in content
        assert "no trial was decided for shape or texture" in content


def test_a_name_is_no_tag_and_no_cell_in_markdown(tmp_path: Path) -> None:
    run = write_run(tmp_path, "mae", 0, 30.0).rename(tmp_path / "a|b <img src=x>")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"name": "c|d <i>e"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "failure.txt").write_text("first <b>\nsecond | third < 4\n")
    page, markdown = report.write_report([run], tmp_path / "out", "<u>")
    text = re.sub(r"^```$.*?^```$", "", markdown.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"(?<!\\)<\w", text)
    assert r"### a\|b \<img src=x>: failed, first \<b> second \| third < 4" in text
    assert r"| c\|d \<i>e | 30.00 (+10.00 over random) |" in text
    assert "<b>" not in page.read_text()


def test_a_file_beside_the_page_stays(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for name in ("README.html", "README.md", "README"):
        with pytest.raises(UserError, match="md: is there without README"):
            report.check_page(tmp_path / name)
    report.write_report(runs[:1], tmp_path / "report", "R")
    report.check_page(tmp_path / "report")


def test_text_is_escaped_and_markdown_has_the_same_numbers(page: Path) -> None:
    text = page.read_text()
    assert "2.9 &lt;x&amp;y&gt;" in text
    assert "<h1>Title &amp; &lt;more&gt;</h1>" in text
    markdown = page.with_suffix(".md").read_text()
    assert "| rmae (2 seeds) | 42.00 ± 2.83 (+21.50 over random) |" in markdown
    assert "| mae-0 | 125.0 | 25.0 % | 1.50 | 30 | cpu | 2 |" in markdown


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 2, "loss": 3}\n')
    assert [row["loss"] for row in read_lines(path)] == [5, 3]


def test_bare_run_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: mae\n")
    page, _ = report.write_report([tmp_path], tmp_path / "r.html", "Bare")
    assert "Settings" in page.read_text()


def test_bad_input_is_one_sentence(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no recipe\.yaml"):
        read_run(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / "metrics.jsonl").write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1, is not a logged step"):
        read_run(broken)
    (broken / "metrics.jsonl").write_bytes(b'{"step": 1, "x": "\xff"}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl is not UTF-8"):
        read_run(broken)
    for step in ("Infinity", '"5"', "null"):
        (broken / "metrics.jsonl").write_text(f'{{"step": {step}}}\n{{"step": 1}}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl, line 1, is not a logged step"):
            read_run(broken)
    (broken / "metrics.jsonl").unlink()
    path = broken / "eval/knn.json"
    for key, value in (("encoder", "x"), ("settings", []), ("also", {"a": 1}), ("also", ["x"]),
                       ("encoder", {"options": None}), ("feature", ["cls"])):  # fmt: skip
        path.write_text(json.dumps(result(1.0, "knn") | {key: value}))
        with pytest.raises(UserError, match=r"knn\.json: no result of an evaluation of ours"):
            read_run(broken)
    table = {"pool": "cls", "hsic": "unbiased", "cka": [[0.5], [0.4]]}
    cka = {"protocol": "cka", "ratios": [0.1, 0.9], **table, "variants": [table]}
    path.write_text(json.dumps(cka))
    read_run(broken)
    for key, value in (("ratios", None), ("ratios", []), ("ratios", ["0.1", "0.9"]),
                       ("ratios", [0.1]), ("variants", ["x"]), ("variants", [table | {"cka": 1}]),
                       ("variants", [table | {"cka": [[0.5], []]}]),
                       ("variants", [table | {"pool": ["cls"]}])):  # fmt: skip
        path.write_text(json.dumps(cka | {key: value}))
        with pytest.raises(UserError, match=r"knn\.json: no result of an evaluation of ours"):
            read_run(broken)
    path.unlink()
    (broken / "pictures").mkdir(exist_ok=True)
    (broken / "pictures/step-99999999.png").write_bytes(png(0, 9))
    with pytest.raises(UserError, match=r"step-99999999\.png is not a PNG"):
        report.write_report([broken], tmp_path / "r.html", "Broken")
    (broken / "recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"recipe\.yaml is not YAML"):
        read_run(broken)
    done = subprocess.run(
        [sys.executable, report.__file__, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_chapters_answer_first_and_compare_last(runs: list[Path], tmp_path: Path) -> None:
    groups = group_runs([read_run(run) for run in runs])
    titles = [chapter.title for chapter in report.build_chapters(groups)]
    assert titles == [
        "Overview", "Reconstructions and views", "Loss", "Throughput and schedule", "Accuracy",
        "Settings",
    ]  # fmt: skip
    mae = RECIPES_DIR / "mae.yaml"
    run = tmp_path / "mae"
    shutil.copytree(runs[0], run)
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(mae)))
    (run / "eval/finetune.json").write_text(json.dumps(result(50.0, "finetune")))

    def order(images: int) -> list[str]:
        (run / "versions.json").write_text(json.dumps({"images": images}))
        chapters = report.build_chapters(group_runs([read_run(run)]))
        return [chapter.id for chapter in chapters]

    assert order(4096)[-2:] == ["settings", "paper"]
    assert order(1281167)[-3:] == ["accuracy", "paper", "settings"]


def test_seeds_are_a_line_with_a_band(page: Path) -> None:
    text = page.read_text()
    rmae = re.search(r'aria-label="Loss: rmae".*?</svg>', text, re.S)
    mae = re.search(r'aria-label="Loss: mae".*?</svg>', text, re.S)
    assert rmae
    assert mae
    assert "FillBetween" in rmae[0]
    assert "FillBetween" not in mae[0]
    assert ": #0072b2" not in rmae[0]  # colours are the page's variables: dark mode


def colours(text: str, dark: bool) -> dict[str, tuple[float, float, float]]:
    """The page's colour variables, in light or in dark."""
    light, _, rest = text.partition("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light))
    if dark:
        found |= dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", rest.partition("* {")[0]))
    return {k: tuple(int(v[n : n + 2], 16) / 255 for n in (1, 3, 5)) for k, v in found.items()}  # type: ignore[misc]


def luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(page: Path, dark: bool) -> None:
    """At least 4.5 of text, 1.9 of curves (whose names are in text), on both grounds."""
    found = colours(page.read_text(), dark)
    for ground in ("paper", "tint"):
        for name in ("ink", "soft", "accent", "good", "look", "bad", *(f"c{n}" for n in range(8))):
            pair = sorted((luminance(found[ground]), luminance(found[name])))
            ratio = (pair[1] + 0.05) / (pair[0] + 0.05)
            assert ratio >= (1.9 if name.startswith("c") else 4.5), (name, ground, ratio)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
AXE = Path(os.environ.get("AXE", ROOT / "build/axe/package/axe.min.js"))
TITLE = "addEventListener('message', e => document.title = JSON.stringify(e.data));"
CHECK = """
addEventListener('load', async () => {
  const d = document, charts = [...d.querySelectorAll('svg.chart')], seen = {};
  const pictures = [...d.querySelectorAll('figure img')];
  seen.broken = pictures.filter(i => !i.complete || !i.naturalWidth).length;
  seen.images = pictures.length;
  seen.charts = charts.length;
  seen.flat = charts.filter(s => s.clientHeight < 50).length;
  seen.wide = d.documentElement.scrollWidth - innerWidth;
  seen.spilled = [...d.querySelectorAll('.card')].filter(c => c.scrollWidth > c.clientWidth).length;
  seen.width = innerWidth;
  seen.dark = matchMedia('(prefers-color-scheme: dark)').matches;
  seen.ground = getComputedStyle(d.body).backgroundColor;
  const zoom = d.querySelector('button.zoom'), dialog = d.querySelector('dialog');
  zoom.focus(); zoom.click();
  seen.open = dialog.open;
  seen.large = dialog.querySelector('img').getBoundingClientRect().width;
  seen.sharp = getComputedStyle(dialog.querySelector('img')).imageRendering;
  dialog.querySelector('button').click();
  seen.closed = !dialog.open;
  seen.focus = d.activeElement === zoom;
  if (window.axe) {
    const found = await axe.run(d, {resultTypes: ['violations']});
    seen.rules = found.passes.length;
    seen.axe = found.violations.map(v => v.id + ': ' + v.nodes[0].html.slice(0, 200));
  }
  parent.postMessage(seen, '*');
});
"""


def browse(page: Path, folder: Path, width: int, dark: bool, axe: bool) -> tuple[dict, str]:
    """What CHECK sees of a page in a headless browser, and the browser's log.

    The page is in a frame, since a browser's window cannot be as narrow as a telephone's.
    """
    scripts = [AXE.read_text()] if axe else []
    extra = "".join(f"<script>{text}</script>" for text in (*scripts, CHECK))
    (folder / "page.html").write_text(page.read_text().replace("</body>", extra + "</body>"))
    (folder / "frame.html").write_text(
        f"<script>{TITLE}</script><iframe src=page.html width={width} height=900 "
        "style='border:0; color-scheme: light dark'></iframe>"
    )
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--enable-logging=stderr --user-data-dir={folder / 'profile'} "
        f"--window-size=1400,1000 --virtual-time-budget=20000 --dump-dom"
    ).split()
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [str(BROWSER), *options, (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    return json.loads(unescape(title[1])), done.stderr


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium (Debian: apt-get install chromium)"
)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (400, False)])
def test_page_renders_in_a_browser(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Every picture decodes, nothing is wider than the window, a picture enlarges and closes and
    the focus returns to it, the console stays silent."""
    seen, log = browse(page, tmp_path, width, dark, axe=False)
    assert "CONSOLE" not in log
    assert (seen["width"], seen["dark"]) == (width, dark)
    assert seen["ground"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert (seen["broken"], seen["images"], seen["charts"], seen["flat"]) == (0, 3, 6, 0)
    assert seen["wide"] <= 0
    assert (seen["open"], seen["closed"], seen["focus"]) == (True, True, True)
    assert seen["large"] >= 1200
    assert seen["sharp"] == "pixelated"


@needs_browser
@pytest.mark.parametrize("width", [1200, 400])
def test_a_long_word_stays_within_its_card(tmp_path: Path, width: int) -> None:
    runs = [write_run(tmp_path, "mae", seed, 30.0) for seed in (0, 1)]
    (runs[0] / "failure.txt").write_text(f"error: /{'long' * 50}: cannot be read\n")
    page, _ = report.write_report(runs, tmp_path / "report.html", "t")
    seen, _ = browse(page, tmp_path, width, False, axe=False)
    assert (seen["spilled"], seen["wide"] <= 0) == (0, True)


@needs_browser
@pytest.mark.skipif(not AXE.is_file(), reason=f"no axe-core at {AXE} (make test-page gets it)")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (400, False)])
def test_axe_finds_nothing(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """axe-core, every rule it has: contrast, names, landmarks, keyboard access, headings."""
    seen, _ = browse(page, tmp_path, width, dark, axe=True)
    assert seen["axe"] == []
    assert seen["rules"] > 20


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.2)


def test_watch_follows_a_run_and_ends_with_a_still_page(runs: list[Path], tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(runs[0], run)
    command = [sys.executable, report.__file__, run, "--output", page, "--watch", "1"]
    child = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(page.is_file)
        assert "location.reload()" in page.read_text()
        assert "reloads every 1 s" in page.read_text()
        written = page.stat().st_mtime_ns
        time.sleep(2.5)
        assert page.stat().st_mtime_ns == written  # nothing changed
        with (run / "metrics.jsonl").open("a") as file:
            file.write('s": 1}\n{"step": 77777, "loss": 0.125}\n')
        wait_for(lambda: "77777" in page.with_suffix(".md").read_text())
        good = page.read_text()
        (run / "eval/bad.json").write_text("{")  # a later fault is said, and does not end it
        time.sleep(2.5)
        assert child.poll() is None
        assert page.read_text() == good
        (run / "eval/bad.json").unlink()
        child.send_signal(signal.SIGTERM)
        output, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0, errors
    assert "warning: " in errors
    assert "eval/bad.json is not JSON" in errors
    assert output.splitlines()[-1] == f"report: {page}"
    assert "location.reload" not in page.read_text()


@pytest.mark.parametrize("seconds", ["0.5", "-3", "inf", "nan", "x"])
def test_watch_needs_a_second(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        report.parse_args(["run", "--watch", seconds])
    assert stop.value.code == 2
    assert "--watch" in capsys.readouterr().err
    assert report.parse_args(["run", "--watch"]).watch == 30
    assert report.parse_args(["run"]).watch == 0


def test_watch_of_no_run_ends_at_once(tmp_path: Path) -> None:
    settings = report.Settings((tmp_path,), tmp_path / "page.html", watch=1)
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        report.watch(settings)


def test_a_result_of_an_unknown_protocol_is_named(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    (run / "eval/new.json").write_text('{"protocol": "attentive-x", "top1": 55.5}')
    page, text = report.write_report([run], tmp_path / "page.html", "x")
    for written in (page, text):
        content = Path(written).read_text()
        assert "attentive-x" in content
        assert "new.json" in content
        assert "not shown" in content


@pytest.mark.parametrize("value", ['"n/a"', "NaN", "null", "true"])
def test_a_metric_that_is_no_number_is_one_sentence(value, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    (run / "eval/bad.json").write_text(f'{{"protocol": "knn", "top1": {value}}}')
    with pytest.raises(UserError, match=r"eval/bad\.json: top1 is .*, not a number"):
        report.write_report([run], tmp_path / "page.html", "x")


def test_every_protocol_has_its_script():
    for protocol in PROTOCOLS:
        assert (Path(report.__file__).with_name(f"{protocol.script}.py")).is_file(), protocol.name
        assert by_key(protocol.key).script == protocol.script


def test_costs_of_protocols():
    """FLOPs of 10 training and 4 validation images at 100 FLOPs per forward pass."""
    for key, options, expected in (
        ("linprobe", (), 90 * 10 * 100),
        ("linprobe", ("--protocol", "cached"), 10 * 100),
        ("finetune", ("--epochs", "5"), 5 * 10 * 3 * 100),
        ("fewshot", ("--epochs", "5", "--fraction", "0.1"), 5 * 1 * 3 * 100),
        ("finetune", ("--epochs", "5", "--samples-per-epoch", "80"), 5 * 80 * 3 * 100),
        ("knn", (), 14 * 100),
        ("psnr", (), 4 * 100),
        ("cka", (), 5.5 * 4 * 100),
        ("cka", ("--images", "2"), 5.5 * 2 * 100),
    ):
        assert by_key(key).cost(Work(100, 10, 4, options))[1] == expected, key

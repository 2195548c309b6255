"""A sweep plans every cell, runs each once, refuses what would mix, and says what is best."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from eval_helpers import coloured_images, other_content, write_shards

from eval import sweep as command
from eval.protocols import Work
from eval.studies.significance import interval
from eval.studies.sweep_chapter import ahead, best_text, parameter_chart, sweep_chapter
from eval.studies.sweep_plan import (
    Cell,
    Sweep,
    check_cells,
    claim_output,
    lost,
    plan,
    read_eval_args,
    read_evals,
    read_grid,
    recipe_of,
)
from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = (
    "encoder.options={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}", "batch_size=32",
    "optimizer.epochs=2", "optimizer.warmup_epochs=1", "data.workers=0", "monitor.log_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_shards(folder / "train", *coloured_images(128, 4, seed=1), per_shard=16)
    write_shards(folder / "val", *coloured_images(32, 4, seed=2))
    return folder


def sweep_of(data, output, grid=("views.mask_ratio=0.5,0.75",), **changed):
    settings = {"seeds": 2, "evals": ("knn",), "overrides": TINY} | changed
    return Sweep("demo_mae", read_grid(grid), output=output, train=str(data / "train"),
                 val=str(data / "val"), **settings)  # fmt: skip


def words(data, output, *more, grid="views.mask_ratio=0.5,0.75", evals="knn"):
    result = ["demo_mae", "--grid", grid, "--eval", evals, "--train", data / "train", "--val",
              data / "val", "--output", output, *more]  # fmt: skip
    for text in TINY:
        result += ["--set", text]
    return list(map(str, result))


# ------------------------------------------------------------------ grid


def test_a_grid_is_every_combination_with_every_seed(data, tmp_path):
    grid = ("views.mask_ratio=0.5,0.75", "optimizer.base_lr=1e-3,2e-3,3e-3")
    sweep = sweep_of(data, tmp_path, grid)
    names = [cell.name for cell in sweep.cells]
    assert len(names) == len(set(names)) == 12
    assert names[:3] == [
        "mask_ratio-0.5-base_lr-1e-3-0", "mask_ratio-0.5-base_lr-1e-3-1",
        "mask_ratio-0.5-base_lr-2e-3-0",
    ]  # fmt: skip
    assert sweep.cells[0].label == "mask_ratio 0.5, base_lr 1e-3"


def test_commas_in_brackets_do_not_part_values():
    grid = read_grid(["encoder.options={depth: 1, num_heads: 2},{depth: 2, num_heads: 4}"])
    assert grid == {"encoder.options": ("{depth: 1, num_heads: 2}", "{depth: 2, num_heads: 4}")}
    assert read_grid(["optimizer.betas=[0.9, 0.95],[0.9, 0.999]"])["optimizer.betas"][1] == (
        "[0.9, 0.999]"
    )


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        (["views.mask_ratio"], "should be KEY=VALUE"),
        (["views.mask_ratio="], "should be KEY=VALUE"),
        (["views.mask_ratio=0.5,,0.6"], "should be KEY=VALUE"),
        (["=0.5"], "should be KEY=VALUE"),
        (["a=1,2,1"], "a value is there twice"),
        (["a=1", "a=2"], "a is there twice"),
        (["seed=1,2"], "--seeds N"),
    ],
)
def test_a_bad_grid_is_one_sentence(grid, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_grid(grid)


def test_bad_values_are_found_before_anything_runs(data, tmp_path):
    for grid, sentence in (
        (("views.mask_ratio=0.5,1.5",), "mask_ratio"),
        (("mask_ratio=0.5",), "views.mask_ratio"),  # the full key is suggested
        (("optimizer.epochs=2,1", "optimizer.warmup_epochs=1"), "warmup"),
        (("batch_size=32,1024",), "fewer than one batch of 1024"),
        (("monitor.held_out=a/b,a b",), "would share"),
        (("optimizer.epochs=0.01", "optimizer.warmup_epochs=0"), "too few for one step"),
        (("views.mask_ratio=0.5,0.50",), "mask_ratio 0.5 and mask_ratio 0.50 are the same sett"),
        (("measure.norm_pix=true,yes",), "norm_pix true and norm_pix yes are the same settings"),
        (("encoder.options.depth=1,2", "encoder.options={depth: 1}"), "are the same settings"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_cells(sweep_of(data, tmp_path / "out", grid))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"/nowhere: no such folder"):
        check_cells(Sweep("demo_mae", {}, 1, (), tmp_path, "/nowhere", str(data / "val")))


def test_evaluations_are_named():
    assert read_evals("knn, linprobe,knn") == ("knn", "linprobe")
    with pytest.raises(UserError, match="--eval kn: should be one of linprobe, finetune"):
        read_evals("knn,kn")
    assert read_eval_args(['linprobe=--protocol cached --feature "mean_patch"'], ["linprobe"]) == {
        "linprobe": ("--protocol", "cached", "--feature", "mean_patch")
    }
    with pytest.raises(UserError, match="PROTOCOL=OPTIONS of one of --eval"):
        read_eval_args(["knn=--k 3"], ["linprobe"])


def test_options_of_an_evaluation_add_up():
    given = ["knn=--k 3", "psnr=--seed 1", "knn=--temperature 0.1"]
    assert read_eval_args(given, ["knn", "psnr"]) == {
        "knn": ("--k", "3", "--temperature", "0.1"), "psnr": ("--seed", "1"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--set", "seed=7"], "--set seed=7: seeds are what --seeds N says"),
        (["--set", "views.mask_ratio=0.6"], "--set views.mask_ratio=0.6: views.mask_ratio is what"),
        (["--grid", "ema={momentum: 0.9},{momentum: 0.8}", "--set", "ema.momentum=0"],
         "--set ema.momentum=0: ema is what --grid says"),
        (["--eval", ","], "--eval ',': names no evaluation; there are linprobe, "),
        (["--slurm", "-N 1", "--jobs", "2"], "--jobs does nothing with --slurm: every cell is a"),
        (["--report", "--jobs", "2"], "--jobs does nothing with --report"),
        (["--report", "--dry-run"], "--dry-run does nothing with --report"),
        (["--slurm", '-N "1'], """--slurm '-N "1': cannot be parted into words (No closing"""),
        (["--eval-args", 'knn=--k "5'], """--eval-args knn '--k "5': cannot be parted into"""),
    ],
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused(data, tmp_path, more, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        command.parse_args([*words(data, tmp_path), *more])


def test_a_cost_reads_every_form_of_an_option():
    def epochs(*given):
        return Work(1.0, 10, 0, given).option("--epochs", 90)

    assert epochs("--k", "3") == 90
    assert epochs("--epochs", "5") == epochs("--epochs=5") == epochs("--epo=5") == "5"
    assert epochs("--epochs=5", "--epochs", "6", "--epochs-not", "7") == "6"
    assert epochs("--", "5") == 90


def test_what_an_evaluation_would_refuse_is_said_before_the_first_pretraining(data, tmp_path):
    for evals, args, words in (
        (("linprobe",), {}, "--eval linprobe: .*too few for --batch-size 16384"),
        (("knn",), {"knn": ("--k", "0")}, "--eval-args knn=--k 0: --k 0: must be between 1 and"),
        (("knn",), {"knn": ("--kk", "3")}, "--eval-args knn=--kk 3: unrecognized arguments: --kk"),
        (("psnr",), {"psnr": ("--seed", "x")}, "--eval-args psnr=--seed x: argument --seed: x: m"),
        (("knn",), {"knn": ("--output", "x")}, "--eval-args knn=--output x: --output is that of"),
        (("psnr",), {"psnr": ("--encoder=x",)}, "--eval-args psnr=--encoder=x: --encoder is that"),
    ):
        with pytest.raises(UserError, match=words):
            command.check_evals(sweep_of(data, tmp_path, evals=evals, eval_args=args))
    good = {
        "knn": ("--k", "3"),
        "linprobe": ("--batch-size", "8"),
        "fewshot": ("--batch-size", "2"),
    }
    command.check_evals(sweep_of(data, tmp_path, evals=(*good, "psnr"), eval_args=good))
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------ commands


def test_a_result_of_a_random_encoder_that_is_there_hinders_no_sweep(data, tmp_path, monkeypatch):
    """The random baseline of another data set, say, evaluated in the same checkout."""
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(data, tmp_path / "sweep")
    path = Path(f"runs/random-{recipe_of(sweep, sweep.cells[0]).encoder.arch}/eval")
    path.mkdir(parents=True)
    theirs = {"protocol": "knn", "feature": "cls", "settings": {"k": 5, "val": "another"}}
    (path / "knn-random-0.json").write_text(json.dumps(theirs))
    command.check_evals(sweep)


def test_a_cell_is_pretrained_and_evaluated_by_launch_sh(data, tmp_path):
    sweep = sweep_of(
        data, tmp_path, evals=("knn", "fewshot", "psnr"), eval_args={"knn": ("--k", "3")},
        pretrain_args=("--ds_config", "zero1"),
    )  # fmt: skip
    pretrain, knn, few, psnr = plan(sweep)[Cell((("views.mask_ratio", "0.75"),), 1)]
    assert all(c.command[0] == str(ROOT / "launch.sh") for c in (pretrain, knn, few, psnr))
    line = " ".join(pretrain.command[1:])
    assert line.startswith("--script pipeline/pretrain.py -- --recipe demo_mae --data ")
    assert line.endswith("--set views.mask_ratio=0.75 --set seed=1 --ds_config zero1")
    assert pretrain.step == 2 * 128 // 32
    assert pretrain.images == 256
    assert pretrain.flops > 0
    assert " ".join(knn.command).endswith(
        f"--k 3 --output {tmp_path}/mask_ratio-0.75-1/eval/knn.json"
    )
    assert "--fraction 0.1 --subset-seed 1" in " ".join(few.command)
    assert "--train" not in psnr.command
    assert all(c.needs == (pretrain.name,) for c in (knn, few, psnr))


def test_dry_run_prints_the_plan_and_runs_nothing(data, tmp_path, capsys):
    command.run_sweep(command.parse_args(words(data, tmp_path / "o", "--dry-run", "--seeds", "3")))
    printed = capsys.readouterr().out
    assert "12 of 12 commands to run" in printed
    assert "TFLOP" in printed
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("more", [["--dry-run"], ["--report"], []])
def test_options_of_evaluations_are_checked_before_the_plan_and_the_folder(data, tmp_path, more):
    for protocol, options, sentence in (
        ("linprobe", "--epochs x", "argument --epochs: invalid int value: 'x'"),
        ("linprobe", "--epochs", "argument --epochs: expected one argument"),
        ("knn", "--k nope", "argument --k: invalid int value: 'nope'"),
    ):
        given = ["--eval-args", f"{protocol}={options}", *more]
        line = words(data, tmp_path / "o", *given, evals=protocol)
        with pytest.raises(UserError, match=re.escape(f"{protocol}={options}: {sentence}")):
            command.run_sweep(command.parse_args(line))
    assert not (tmp_path / "o").exists()


def test_the_plan_counts_the_epochs_that_are_given(data, tmp_path):
    def images(*args):
        sweep = sweep_of(data, tmp_path, evals=("linprobe",), eval_args={"linprobe": args})
        return next(iter(plan(sweep).values()))[1].images

    assert images("--epochs=5") == images("--epochs", "5") == 5 * 128
    assert images() == 90 * 128


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--report"], "has no run of this sweep yet"),
        (["--cell", "4"], "--cell 4: the grid has cells 0 to 1"),
        (["--slurm", ""], "--slurm: sbatch is not on PATH"),
    ],
)
def test_a_sweep_that_is_refused_claims_no_folder(data, tmp_path, monkeypatch, more, sentence):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=sentence):
        command.run_sweep(command.parse_args(words(data, tmp_path / "o", *more)))
    assert not (tmp_path / "o").exists()


def test_a_page_notes_no_evaluation_that_was_not_made(data, tmp_path, monkeypatch):
    claim_output(sweep_of(data, tmp_path))
    before = (tmp_path / "sweep.json").read_text()
    sweep = sweep_of(data, tmp_path, evals=("knn", "psnr"))
    run = tmp_path / sweep.cells[0].name
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe_of(sweep, sweep.cells[0])))
    pages = []
    monkeypatch.setattr(command, "write_page", pages.append)
    command.run_sweep(command.Settings(sweep, 0, report=True))
    assert pages == [sweep]
    assert (tmp_path / "sweep.json").read_text() == before


def test_other_settings_do_not_mix_in_one_folder(data, tmp_path, monkeypatch):
    sweep = sweep_of(data, tmp_path)
    claim_output(sweep)
    monkeypatch.chdir(sweep.train)
    claim_output(replace(sweep, train="."))  # the same shards by another path
    with pytest.raises(UserError, match="another train"):
        claim_output(replace(sweep, train=sweep.val))
    others = other_content(data / "train", tmp_path / "others")
    with pytest.raises(UserError, match="with another train; choose"):
        claim_output(replace(sweep, train=str(others)))
    record = json.loads((tmp_path / "sweep.json").read_text())
    del record["training images"], record["validation images"]  # as earlier ones have none
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    claim_output(sweep_of(data, tmp_path, grid=("views.mask_ratio=0.9",), seeds=5))  # grows
    claim_output(sweep_of(data, tmp_path, evals=("linprobe",), eval_args={"linprobe": ("--k",)}))
    for changed, sentence in (
        ({"overrides": (*TINY, "optimizer.base_lr=1")}, "another recipe"),
        ({"pretrain_args": ("--ds_config", "zero1")}, "another pretrain_args"),
        ({"eval_args": {"knn": ("--k", "3")}}, "another --eval-args of knn"),
        ({"evals": ("linprobe",)}, "another --eval-args of linprobe"),
    ):
        with pytest.raises(UserError, match=sentence):
            claim_output(sweep_of(data, tmp_path, **changed))
    claim_output(sweep_of(data, tmp_path))
    decoders = sweep_of(data, tmp_path, grid=("measure.decoder.depth=1,2",), seeds=1)
    for cell in decoders.cells:
        (tmp_path / cell.name).mkdir()
        (tmp_path / cell.name / "recipe.yaml").write_text(dump_recipe(recipe_of(decoders, cell)))
    check_cells(decoders)
    with pytest.raises(UserError, match=r"depth-1-0: was made with another recipe \(measure.dec"):
        check_cells(sweep_of(data, tmp_path, grid=("encoder.options.depth=1,2",), seeds=1))
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"sweep\.json: not a record of a sweep"):
        claim_output(sweep_of(data, tmp_path))


@pytest.mark.slow
def test_a_real_grid_runs_once_and_ends_in_a_page(data, tmp_path):
    line = [sys.executable, ROOT / "eval/sweep.py", *words(data, tmp_path / "out", "--jobs", "2")]
    for _ in (1, 2):  # the second call finds that all is done
        done = subprocess.run(
            list(map(str, line)), capture_output=True, text=True, timeout=400, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "out/jobs.jsonl").read_text().splitlines()) == 4
    values = [
        json.loads((tmp_path / f"out/mask_ratio-{r}-0/eval/knn.json").read_text())["top1"]
        for r in (0.5, 0.75)
    ]
    for ratio, value in zip((0.5, 0.75), values, strict=True):
        assert f"| {ratio} | 1 of 1 | {value:.2f} |" in done.stdout
        recipe = (tmp_path / f"out/mask_ratio-{ratio}-0/recipe.yaml").read_text()
        assert f"mask_ratio: {ratio}" in recipe
    page = (tmp_path / "out/sweep.html").read_text()
    assert 'aria-label="k-NN (%) against views.mask_ratio"' in page
    assert "Best by k-NN (%): mask_ratio" in page


SBATCH = """#!/bin/bash
# Slurm's part here: keep what was submitted, number it, run it at once as it would be run.
echo "$@" >> "$SUBMITTED/calls"
env > "$SUBMITTED/env"
number=$(wc -l < "$SUBMITTED/calls")
echo "$number"
"""


def test_slurm_gets_an_array_and_a_job_for_the_page(data, tmp_path, monkeypatch, capsys):
    """sbatch stands in for Slurm's; the script of a task is run as Slurm would run it, until it
    refuses a cell that is not there."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SUBMITTED", str(tmp_path))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    out = tmp_path / "out dir"
    more = ("--slurm", "-N 1 --gpus-per-node=8", "--seeds", "2")
    command.run_sweep(command.parse_args(words(data, out, *more)))
    assert "job array 1 of 4 cells, then job 2" in capsys.readouterr().out
    assert "DS_ACCELERATOR" not in (tmp_path / "env").read_text()  # though there is no GPU here
    array, page = (tmp_path / "calls").read_text().splitlines()
    assert array.startswith(f"--parsable --array 0-3 --output {out}/logs/slurm-%A_%a.log")
    assert f"-N 1 --gpus-per-node=8 {out}/array.sbatch" in array
    assert "--dependency afterany:1" in page
    script = (out / "array.sbatch").read_text()
    assert script.startswith("#!/bin/bash\n")
    assert "--slurm" not in script
    done = subprocess.run(
        ["bash", out / "array.sbatch"], env=os.environ | {"SLURM_ARRAY_TASK_ID": "4"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().endswith("--cell 4: the grid has cells 0 to 3")
    done = subprocess.run(
        ["bash", out / "page.sbatch"], capture_output=True, text=True, timeout=120
    )
    assert done.stderr.strip() == f"error: {out}: has no run of this sweep yet"


def test_an_abbreviated_slurm_is_not_repeated_in_the_jobs():
    for given in (["--slurm", "-N 1"], ["--slurm=-N 1"], ["--slu", "-N 1"], ["--sl=-N 1"]):
        line = ["mae", "--seeds", "2", *given, "--set", "a=1"]
        assert command.without_slurm(line) == ["mae", "--seeds", "2", "--set", "a=1"]


def test_what_sbatch_refuses_claims_no_folder(data, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho no such partition >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="no such partition"):
        command.run_sweep(command.parse_args(words(data, tmp_path / "o", "--slurm", "-p x")))
    assert not (tmp_path / "o/sweep.json").exists()


# ------------------------------------------------------------------ page


def fill(sweep, table):
    """Write the results {(point values): [by seed]} of k-NN."""
    for cell in sweep.cells:
        values = table[tuple(value for _, value in cell.point)]
        if cell.seed < len(values):
            folder = sweep.output / cell.name / "eval"
            folder.mkdir(parents=True)
            result = {"protocol": "knn", "top1": values[cell.seed], "encoder": {}}
            (folder / "knn.json").write_text(json.dumps(result))


def test_the_page_has_mean_spread_and_the_best(data, tmp_path):
    sweep = sweep_of(data, tmp_path, grid=("views.mask_ratio=0.5,0.75,0.9",), seeds=3)
    fill(sweep, {("0.5",): [50.0, 52.0], ("0.75",): [60.0, 62.0, 64.0], ("0.9",): []})
    chapter = sweep_chapter(sweep)
    rows = [[cell.value for cell in row.cells] for row in chapter.tables[0].rows]
    assert rows == [
        ["0.5", "2 of 3", "51.00 ± 1.41"], ["0.75", "3 of 3", "62.00 ± 2.00"],
        ["0.9", "0 of 3", "-"],
    ]  # fmt: skip
    assert chapter.tables[0].head == ("views.mask_ratio", "seeds done", "k-NN (%)")
    # Pairs of seeds 0 and 1: 10 and 10.
    assert chapter.texts[0] == (
        "Best by k-NN (%): mask_ratio 0.75, 62.00 ± 2.00; by 10.00 (95 % interval +10.00 … +10.00) "
        "ahead of mask_ratio 0.5."
    )
    assert len(chapter.charts) == 1


def test_a_cell_that_diverges_ends_no_sweep(data, tmp_path, monkeypatch, capsys):
    """The others run, the page says it, and the same command does not train it again."""
    script = tmp_path / "launch.sh"
    script.write_text(FAKE_LAUNCH)
    script.chmod(0o755)
    monkeypatch.setattr("eval.studies.sweep_plan.LAUNCH", script)
    line = words(data, tmp_path / "out", "--jobs", "1", "--seeds", "2", grid=DIVERGES)
    page = tmp_path / "out/sweep.md"
    for number in (1, 2):
        command.run_sweep(command.parse_args(line))
        said = capsys.readouterr().out
        assert "| 1e9 | 1 of 2 | 50.00 (1 diverged) |" in page.read_text(), number
        assert "Best by k-NN (%): base_lr 1e-3, 40.00" in page.read_text()
        assert "A point that diverged in a seed is not among the best." in page.read_text()
        name = "base_lr-1e9-1 pretrain: diverged"
        assert f"{name} before; to try" in said if number == 2 else f"{name}, so" in said
    log = (tmp_path / "out/jobs.jsonl").read_text().splitlines()
    assert [json.loads(row)["code"] for row in log].count(76) == 1
    assert len(log) == 7  # of 8: its evaluation was not run
    (tmp_path / "out/base_lr-1e9-1/recipe.yaml").unlink()
    command.run_sweep(command.parse_args(line))
    assert len((tmp_path / "out/jobs.jsonl").read_text().splitlines()) == 8
    (tmp_path / "out/jobs.jsonl").unlink()  # and so of a task of an array
    sweep = command.parse_args(line).sweep
    (tmp_path / "out/base_lr-1e9-1/recipe.yaml").unlink()
    command.run_sweep(command.parse_args([*line, "--cell", "3"]))
    assert lost(sweep) == {"base_lr-1e9-1 pretrain"}


DIVERGES = "optimizer.base_lr=1e-3,1e9"
FAKE_LAUNCH = f"""#!{sys.executable}
import json, sys
from pathlib import Path
words = sys.argv
out = Path(words[words.index("--output") + 1])
if "pipeline/pretrain.py" in words:
    (out / "encoder").mkdir(parents=True, exist_ok=True)
    sys.path[:0] = {[str(ROOT)]}
    from pipeline.config.recipe import dump_recipe, load_recipe
    sets = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
    (out / "recipe.yaml").write_text(dump_recipe(load_recipe("demo_mae", sets)))
    if out.name == "base_lr-1e9-1":
        sys.exit(76)
    (out / "encoder/encoder.json").write_text(json.dumps({{"step": 1000}}))
else:
    out.parent.mkdir(parents=True, exist_ok=True)
    top1 = 50 if "1e9" in str(out) else 40
    out.write_text(json.dumps({{"protocol": "knn", "top1": top1, "encoder": {{}}}}))
"""


def test_best_is_not_claimed_without_evidence():
    found = {(("a", "1"),): {0: 5.0, 1: 1.0}, (("a", "2"),): {0: 3.0, 1: 2.0}}
    low, high = interval([2.0, -1.0])
    assert ahead([0.0, 0.0]) == "in every seed the same as"
    assert ahead([2.0, -1.0]) == (
        f"by 0.50 (95 % interval {low:+.2f} … {high:+.2f}) not surely ahead of"
    )
    assert "not surely ahead of a 2" in best_text("knn", found)
    assert "with one seed it is not known" in best_text(
        "knn", {point: {0: values[0]} for point, values in found.items()}
    )
    assert best_text("knn", {(("a", "1"),): {}}) == ""


def test_each_parameter_is_plotted_with_a_line_per_other_value(data, tmp_path):
    sweep = sweep_of(
        data, tmp_path, ("views.mask_ratio=0.9,0.5", "views.mask=random,block"), seeds=1
    )
    found = {
        (("views.mask_ratio", r), ("views.mask", m)): {0: float(r) * 10}
        for r in ("0.9", "0.5") for m in ("random", "block")
    }  # fmt: skip
    chart = parameter_chart(sweep, "knn", "views.mask_ratio", found)
    assert ">mask random<" in chart
    assert ">mask block<" in chart
    named = parameter_chart(sweep, "knn", "views.mask", found)
    assert ">random<" in named  # the ticks are the values' names
    assert ">mask_ratio 0.9<" in named
    assert parameter_chart(sweep, "knn", "views.mask", {point: {} for point in found}) == ""

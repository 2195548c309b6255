"""A grid of recipe settings with several seeds: pretrained, evaluated, and compared on one page.

    python eval/sweep.py demo_mae --grid views.mask_ratio=0.6,0.75,0.9 --seeds 3 --eval knn,linprobe

--dry-run prints every command and its cost. Runs are in OUTPUT/<key>-<value>-<seed>; what is done
is skipped, so the same command resumes, and a larger grid, more seeds or evaluations add to it.
Every command goes through launch.sh, over all GPUs; on a CPU several run side by side. With
--slurm the cells become a job array, and the page a job after it. The page is OUTPUT/sweep.html.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote
from typing import NoReturn

from eval.paper.job_runner import run_commands, show_plan
from eval.protocols import by_key
from eval.report import write_report
from eval.reporting.page import markdown_table
from eval.shared.command import run_command
from eval.shared.processes import stop_on_sigterm
from eval.studies.sweep_chapter import sweep_chapter
from eval.studies.sweep_plan import (
    CELLS,
    ROOT,
    Sweep,
    check_cells,
    check_overrides,
    claim_output,
    lost,
    plan,
    read_eval_args,
    read_evals,
    read_grid,
    recipe_of,
    record_of,
    shell_words,
    without_lost,
)
from pipeline.command import check_unused
from pipeline.errors import UserError, check_range, naming
from pipeline.help_text import HelpFormatter
from shard_tools.atomic import check_writable, write_atomic
from shard_tools.cores import cores

TASK = "SLURM_ARRAY_TASK_ID"
CELL = "the encoder of a cell"  # that is not there yet


@dataclass(frozen=True)
class Settings:
    """A sweep and what to do with it: print the plan, run it `jobs` commands at a time (0: one on
    GPUs, elsewhere one per core), run one cell, only write the page, or (slurm: options of sbatch)
    submit it.

    again: the words of the command line that name the same sweep.
    """

    sweep: Sweep
    jobs: int
    dry_run: bool = False
    report: bool = False
    cell: int | None = None
    slurm: tuple[str, ...] | None = None
    again: tuple[str, ...] = ()


def parse_args(argv: Sequence[str] | None = None) -> Settings:
    """The command line. UserError for values that cannot be."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0],
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a file, or a bundled name such as mae")
    add("--grid", action="append", required=True, metavar="KEY=VALUE,…",
        help="a recipe key and its values; several span a grid")  # fmt: skip
    add("--seeds", type=int, default=1, help="run seeds 0 … N - 1")
    add("--eval", default="knn", metavar="PROTOCOL,…", help="evaluations of every cell")
    add("--eval-args", action="append", default=[], metavar="PROTOCOL=OPTIONS",
        help='further options of an evaluation: linprobe="--protocol cached"')  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key everywhere")
    add(
        "--ds_config", "--ds-config", metavar="FILE", help="of pretraining (default: pretrain.py's)"
    )
    add("--train", default="data/shards/train", help="shards to train on")
    add("--val", default="data/shards/val", help="shards to evaluate on")
    add("--output", type=Path, help="folder of the runs (default: runs/sweep-<recipe>)")
    add("--jobs", type=int, default=0, help="commands side by side (default: cores, or 1 on GPUs)")
    add("--dry-run", action="store_true", help="print the plan and its cost, run nothing")
    add("--report", action="store_true", help="only write the page from what is there")
    add("--slurm", metavar="OPTIONS", help='submit as a job array; options of sbatch: "-N 1 -G 8"')
    add("--cell", type=int, help=argparse.SUPPRESS)  # one cell, in a task of the array
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    check_range("--seeds", args.seeds, at_least=1)
    check_range("--jobs", args.jobs, at_least=0)
    if args.slurm is not None:
        check_unused(parser, args, ["jobs"], "with --slurm: every cell is a job")
    if args.report:
        check_unused(parser, args, ["jobs", "slurm", "dry_run"], "with --report")
    evals, grid = read_evals(args.eval), read_grid(args.grid)
    check_overrides(args.set, tuple(grid))
    output = args.output or Path("runs") / f"sweep-{Path(args.recipe).stem}"
    sweep = Sweep(
        args.recipe, grid, args.seeds, evals, output, args.train, args.val,
        tuple(args.set), read_eval_args(args.eval_args, evals),
        ("--ds_config", args.ds_config) if args.ds_config else (),
    )  # fmt: skip
    slurm = None if args.slurm is None else shell_words("--slurm", args.slurm)
    again = tuple(without_slurm(words))
    return Settings(sweep, args.jobs, args.dry_run, args.report, args.cell, slurm, again)


def without_slurm(words: Sequence[str]) -> list[str]:
    """The words of a command line without --slurm, in full or abbreviated, and its value."""
    kept, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        named = not skip and len(name) > len("--s") and "--slurm".startswith(name)
        if not skip and not named:
            kept.append(word)
        skip = named and not equals
    return kept


def slots() -> int:
    """Commands that run side by side: one on GPUs, elsewhere one per core."""
    import torch

    return 1 if torch.cuda.is_available() else cores()


def submit(settings: Settings, cells: int, given: Mapping[str, str]) -> None:
    """A job array with a task per cell, and a job after it that writes the page. given: the
    environment that the jobs get."""
    assert settings.slurm is not None
    output = settings.sweep.output
    logs = output / "logs"
    with naming(logs, "cannot be written"):
        logs.mkdir(parents=True, exist_ok=True)
    line = join([sys.executable, str(ROOT / "eval/sweep.py"), *settings.again])
    go = f"cd {quote(os.getcwd())} && exec {line}"
    job = sbatch(
        output / "array.sbatch", f'{go} --cell "${TASK}"',
        ["--array", f"0-{cells - 1}", "--output", str(logs / "slurm-%A_%a.log"), *settings.slurm],
        given,
    )  # fmt: skip
    page = sbatch(
        output / "page.sbatch", f"{go} --report",
        ["--dependency", f"afterany:{job}", "--output", str(logs / "slurm-page-%j.log")],
        given,
    )  # fmt: skip
    print(f"submitted: job array {job} of {cells} cells, then job {page} for the page", flush=True)


def sbatch(path: Path, line: str, options: Sequence[str], given: Mapping[str, str]) -> str:
    """Submit one line as a batch script, kept at `path`, with an environment; the job's number."""
    with naming(path, "cannot be written"):
        write_atomic(path, f"#!/bin/bash\n{line}\n")
    command = ["sbatch", "--parsable", *options, str(path)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip().split(";")[0]


def made_runs(sweep: Sweep) -> list[Path]:
    """The runs that are there. UserError where there is none."""
    runs = [sweep.output / cell.name for cell in sweep.cells]
    made = [run for run in runs if (run / "recipe.yaml").is_file()]
    if not made:
        raise UserError(f"{sweep.output}: has no run of this sweep yet")
    return made


def write_page(sweep: Sweep) -> None:
    """OUTPUT/sweep.html and sweep.md from what is done so far; prints the table."""
    made, chapter = made_runs(sweep), sweep_chapter(sweep)
    title = f"Sweep of {sweep.recipe}: {', '.join(sweep.grid)}"
    page, _ = write_report(made, sweep.output / "sweep.html", title, [chapter])
    for table in chapter.tables:
        print("\n".join(markdown_table(table)))
    print(f"report: {page}", flush=True)


def check_evals(sweep: Sweep) -> None:
    """UserError for what an evaluation would be refused for after hours of pretraining."""
    for protocol in sweep.evals:
        how, words = by_key(protocol), sweep.eval_args.get(protocol, ())
        script = importlib.import_module(f"eval.{how.script}")
        parser: argparse.ArgumentParser = script.build_parser()
        text = f"--eval-args {protocol}={' '.join(words)}" if words else f"--eval {protocol}"

        def refuse(message: str, text: str = text) -> NoReturn:
            raise UserError(f"{text}: {message}")

        parser.error = refuse  # type: ignore[method-assign]
        needed = ["--encoder", CELL, "--val", sweep.val]
        needed += ["--train", sweep.train] if how.train else []
        args = parser.parse_args([*needed, *how.words(0), *words])
        for name, own in (("encoder", CELL), ("output", None)):
            if getattr(args, name) != own:
                refuse(f"--{name} is that of the cell; leave it out")
        args.encoder = "random"
        args.output = str(sweep.output / "none.json")  # nor of what is beside this sweep
        if hasattr(args, "arch"):  # a random encoder will do for what does not depend on it
            args.arch = args.arch or recipe_of(sweep, sweep.cells[0]).encoder.arch
            try:
                script.prepare(args)
            except UserError as error:
                refuse(str(error))


def check_way(settings: Settings, cells: int) -> None:
    """UserError where a sweep cannot be run the way that was asked for, or not in its folder."""
    if settings.cell is not None and not 0 <= settings.cell < cells:
        raise UserError(f"--cell {settings.cell}: the grid has cells 0 to {cells - 1}")
    if settings.slurm is not None and shutil.which("sbatch") is None:
        raise UserError("--slurm: sbatch is not on PATH; leave it out to run the grid here")
    record_of(settings.sweep)
    if settings.report:
        made_runs(settings.sweep)


def run_sweep(settings: Settings) -> None:
    """Check it, plan it, then do what the settings say. OUTPUT is this sweep's only then."""
    sweep = settings.sweep
    given = dict(os.environ)  # before imports note there that a login node has no GPU
    check_cells(sweep)
    if not settings.dry_run:
        check_writable(sweep.output, folder=True, advice="; choose another --output")
    check_evals(sweep)
    commands, gone = plan(sweep), lost(sweep)
    commands = {cell: without_lost(jobs, gone) for cell, jobs in commands.items()}
    for name in sorted(gone):
        print(f"{name}: diverged before; to try it again remove its run", flush=True)
    everything = [command for group in commands.values() for command in group]
    if settings.dry_run:
        for line in show_plan(everything):
            print(line, flush=True)
        return
    check_way(settings, len(commands))
    if settings.report:
        write_page(sweep)
    elif settings.cell is not None:
        cell, own = list(commands.items())[settings.cell]
        claim_output(sweep)
        run_commands(own, 1, sweep.output / CELLS / cell.name, trials=True)
    elif settings.slurm is not None:
        submit(settings, len(commands), given)
        claim_output(sweep)  # not where sbatch refuses it
    else:
        claim_output(sweep)
        run_commands(everything, settings.jobs or slots(), sweep.output, trials=True)
        write_page(sweep)


def main() -> None:
    stop_on_sigterm()
    run_sweep(parse_args())


if __name__ == "__main__":
    run_command(main)

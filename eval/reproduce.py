"""The paper's tables made again: every row pretrained and evaluated, ours beside the published.

    python eval/reproduce.py --table 4 --scale full --dry-run     what it would run, and its cost
    python eval/reproduce.py --table 4 --scale mini --seeds 3     in miniature, on a CPU

The rows come from eval/paper/paper.yaml, their size from eval/paper/scales.yaml. Each command runs
as a process of its own, is printed by --dry-run, and is skipped where its result is there already:
a rerun resumes, also a pretraining or finetuning that was cut off. Runs go to
OUTPUT/<recipe>-<seed>, shared by the tables; the page and its Markdown to OUTPUT/table-<n>.html.
"""

import argparse
import json
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from eval.demo import make_shards
from eval.paper.commands import Place, read_scale, row_jobs, run_name
from eval.paper.job_runner import Job, run_jobs, show_plan
from eval.paper.published import PaperRow, PaperTable, read_paper
from eval.protocols import by_key, headings, keys
from eval.report import Section, markdown_table, write_report
from eval.reporting.tables import NONE, Cell, Row, Table
from eval.shared.cli import run_command
from pipeline.errors import UserError
from shard_tools.cores import cores


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--table", type=int, required=True, help="number of the paper's table")
    parser.add_argument("--scale", default="full", help="full, mini: see eval/paper/scales.yaml")
    parser.add_argument("--rows", nargs="+", help="names of rows (default: all)")
    add_options(parser)
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every reproduction has."""
    add = parser.add_argument
    add("--seeds", type=int, default=1, help="run seeds 0 … N - 1")
    add("--output", type=Path, help="folder of the runs (default: runs/reproduce-<scale>)")
    add("--train", default="", help="training shards (default: the scale's)")
    add("--val", default="", help="validation shards (default: the scale's)")
    add("--classes", default="imagenet100.txt", help="list of Tab. 5's classes, full scale")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe, last")
    add("--jobs", type=int, default=0, help="commands side by side (default: cores, or 1 on GPUs)")
    add("--also", nargs="+", default=[], choices=[k for k in keys() if k not in ("shape-bias",)],
        metavar="PROTOCOL", help="evaluate every row by these too: %(choices)s")  # fmt: skip
    add("--dry-run", action="store_true", help="print the plan and its cost, run nothing")


def make_place(args: argparse.Namespace, scale_name: str) -> Place:
    """Where and how large; the demo's shards are built where the scale's own are not there."""
    scale = replace(read_scale(scale_name, args.train, args.val), last=tuple(args.set))
    if scale.name != "full" and not args.train and not args.val:
        data = Path(scale.train).parent.parent
        make_shards(data, train=4096, val=1024)
    if args.seeds < 1 or args.jobs < 0:
        raise UserError("--seeds must be at least 1 and --jobs not negative")
    args.jobs = args.jobs or (1 if scale.launch != "python" else cores())
    return Place(args.output or Path(f"runs/reproduce-{scale.name}"), scale, args.classes)


@cache
def known_tables() -> dict[int, PaperTable]:
    """The paper's tables by number."""
    return {table.number: table for table in read_paper()}


def find_table(number: int) -> PaperTable:
    """A table of paper.yaml by its number."""
    tables = known_tables()
    if number not in tables:
        raise UserError(f"--table {number}: the paper's tables are {', '.join(map(str, tables))}")
    return tables[number]


def choose_rows(table: PaperTable, names: Sequence[str] | None) -> list[PaperRow]:
    """The rows to run, those cited from other papers left out."""
    known = {row.name: row for row in table.rows if row.recipe or row.initial}
    for name in names or ():
        if name not in known:
            listed = "; ".join(known)
            raise UserError(f"--rows {name!r}: rows of table {table.number} are: {listed}")
    return [known[name] for name in names or known]


def columns_of(table: PaperTable, row: PaperRow) -> list[str]:
    """The figures that a row is given: the published ones."""
    return [name for name in table.columns if name in row.published]


def figure(place: Place, row: PaperRow, seed: int, protocol: str) -> float | None:
    """Our figure of a row and seed, None where its result is not there."""
    path = place.output / run_name(row, seed) / "eval" / f"{protocol}.json"
    if not path.is_file():
        return None
    return float(json.loads(path.read_text(encoding="utf-8"))[by_key(protocol).metric])


def spread_text(values: Sequence[float]) -> str:
    """`mean ± standard deviation` of what is there."""
    if not values:
        return NONE
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def beside(
    title: str, rows: Sequence[tuple[PaperRow, Sequence[str]]], place: Place, seeds: int
) -> Table:
    """Rows with some of their figures: the paper's, and ours as mean ± deviation over seeds."""
    titles = headings()
    columns = [c for c in titles if any(c in wanted for _, wanted in rows)]
    head = ["row"] + [text for c in columns for text in (f"{titles[c]}: paper", "ours")]
    lines = []
    for row, wanted in rows:
        cells = [Cell(row.name)]
        for column in columns:
            found = [figure(place, row, seed, column) for seed in range(seeds)]
            ours = spread_text([value for value in found if value is not None])
            shown = ours if column in wanted else NONE
            cells += [Cell(str(row.published.get(column, NONE))), Cell(shown)]
        lines.append(Row(tuple(cells), baseline=row.initial == "random"))
    facts = f"scale {place.scale.name}, {seeds} seed{'s' if seeds > 1 else ''}"
    notes = [f"Ours: {facts}; ± is the sample standard deviation over seeds."]
    if any(c == "psnr" for c in columns):
        notes.append(
            "PSNR: with the true mean and deviation of each patch where the recipe predicts "
            "patch-normalised pixels."
        )
    notes += [f"{row.name}: {row.caveat}." for row, _ in rows if row.caveat]
    return Table(tuple(head), tuple(lines), title, tuple(notes))


def run_folders(place: Place, jobs: Sequence[Job]) -> list[Path]:
    """The run folders that the jobs have made, in their order."""
    folders = [
        job.makes.parent.parent for job in jobs if job.makes.parent.name in ("eval", "encoder")
    ]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def stop_children(*_: object) -> None:
    """SIGTERM ends this command as Ctrl-C does: its children are stopped first."""
    raise KeyboardInterrupt


def reproduce(args: argparse.Namespace) -> None:
    """Plan, run, and write a table."""
    place = make_place(args, args.scale)
    table = find_table(args.table)
    rows = [
        (row, list(dict.fromkeys([*columns_of(table, row), *args.also])))
        for row in choose_rows(table, args.rows)
    ]
    jobs = [
        job
        for seed in range(args.seeds)
        for row, wanted in rows
        for job in row_jobs(place, row, seed, wanted)
    ]
    if args.dry_run:
        print("\n".join(show_plan(jobs)), flush=True)
        return
    run_jobs(jobs, args.jobs, place.output)
    ours = beside(f"Tab. {table.number}: {table.title}", rows, place, args.seeds)
    texts = (table.note,) if table.note else ()
    section = Section("reproduced", "Beside the paper", texts, (ours,))
    output = place.output / f"table-{table.number}.html"
    page, _ = write_report(run_folders(place, jobs), output, f"Table {table.number}", [section])
    print("\n".join(markdown_table(ours)))
    print(f"report: {page}", flush=True)


def main() -> None:
    signal.signal(signal.SIGTERM, stop_children)
    reproduce(parse_args())


if __name__ == "__main__":
    run_command(main)

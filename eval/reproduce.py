"""The paper's tables recomputed: every row pretrained and evaluated, ours beside the published.

    python eval/reproduce.py --table 4 --scale full --dry-run     what it would run, and its cost
    python eval/reproduce.py --table 4 --scale mini --seeds 3     in miniature, on a CPU

The rows come from eval/paper/paper.yaml, their size from eval/paper/scales.yaml. Each command runs
as a process of its own, is printed by --dry-run, and is skipped where its result is there already:
a rerun resumes, also a pretraining or finetuning that was cut off. Runs go to
OUTPUT/<recipe>-<seed>, shared by the tables; the page and its Markdown to OUTPUT/table-<n>.html.
"""

import argparse
from dataclasses import dataclass

from eval.paper.commands import row_jobs
from eval.paper.reproduction import (
    Options,
    add_options,
    beside,
    check_rows,
    choose_rows,
    columns_of,
    find_table,
    prepare_data,
    read_options,
    run_folders,
    run_jobs,
)
from eval.report import write_report
from eval.reporting.page import Chapter, markdown_table
from eval.shared.command import run_command
from eval.shared.processes import stop_on_sigterm
from pipeline.help_text import HelpFormatter


@dataclass(frozen=True)
class Settings:
    """A table of the paper to make again, some of its rows or (None) all, and how."""

    table: int
    options: Options
    rows: tuple[str, ...] | None = None


def parse_args(argv: list[str] | None = None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0],
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--table", type=int, required=True, help="number of the paper's table")
    parser.add_argument("--scale", default="full", help="full, mini: see eval/paper/scales.yaml")
    parser.add_argument("--rows", nargs="+", help="names of rows (default: all)")
    add_options(parser)
    args = parser.parse_args(argv)
    rows = None if args.rows is None else tuple(args.rows)
    return Settings(args.table, read_options(args, args.scale), rows)


def reproduce(settings: Settings) -> None:
    """Plan, run, and write a table."""
    options, table = settings.options, find_table(settings.table)
    workspace = options.workspace
    rows = [
        (row, list(dict.fromkeys([*columns_of(table, row), *options.also])))
        for row in choose_rows(table, settings.rows)
    ]
    check_rows(options, rows)
    prepare_data(workspace)
    jobs = [
        job
        for seed in range(options.seeds)
        for row, wanted in rows
        for job in row_jobs(workspace, row, seed, wanted)
    ]
    run_jobs(options, rows, jobs)
    if options.dry_run:
        return
    ours = beside(f"Tab. {table.number}: {table.title}", rows, workspace, options.seeds)
    texts = (table.note,) if table.note else ()
    chapter = Chapter("reproduced", "Beside the paper", texts, (ours,))
    output = workspace.output / f"table-{table.number}.html"
    title = f"Table {table.number}"
    page, _ = write_report(run_folders(workspace, jobs), output, title, [chapter])
    print("\n".join(markdown_table(ours)))
    print(f"report: {page}", flush=True)


def main() -> None:
    stop_on_sigterm()
    reproduce(parse_args())


if __name__ == "__main__":
    run_command(main)

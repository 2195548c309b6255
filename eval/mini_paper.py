"""The paper in miniature: which of its claims hold on 16 photographs, with a confidence interval.

    make mini-paper                                  three seeds, on two CPU cores
    python eval/mini_paper.py --claims 3 5 --seeds 2 a part of it

Makes rows of the paper's tables with eval/reproduce.py's commands at the scale `mini`, evaluates
them, and judges each claim by Student's 95 % interval of the paired differences over seeds: true
only where the interval is entirely above 0. Writes OUTPUT/report.html and report.md; the last line
printed is {"claims": {"1": true, …}}.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.paper.commands import Workspace
from eval.paper.job_runner import costs
from eval.paper.published import PaperRow
from eval.paper.reproduction import (
    Options,
    add_options,
    beside,
    check_rows,
    prepare_data,
    published_row,
    read_options,
    run_folders,
    run_jobs,
)
from eval.report import write_report
from eval.reporting.page import Chapter, markdown_table
from eval.shared.command import run_command
from eval.shared.processes import stop_on_sigterm
from eval.studies.cifar_claims import PUBLISHED, SUPERVISED
from eval.studies.claims import CLAIMS
from eval.studies.study import Study, rules, summary, wanted_metrics
from pipeline.help_text import HelpFormatter

# What a claim calls a row → the table and the name of the row in paper.yaml.
ROWS = {
    **{
        name: PUBLISHED[name]
        for name in ("MAE", "R-MAE", "C-MAE", "C-MAE without mask tokens", "MAE, 1 image")
    },
    "random": (1, "random, 100 epochs"),
}


@dataclass(frozen=True)
class Settings:
    """Numbers of the claims to judge, and how."""

    claims: tuple[int, ...]
    options: Options


def parse_args(argv: list[str] | None = None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0],
        formatter_class=HelpFormatter,
    )
    numbers = [claim.number for claim in CLAIMS]
    parser.add_argument(
        "--claims",
        type=int,
        nargs="+",
        choices=numbers,
        default=numbers,
        metavar="N",
        help="which of the five claims",
    )
    add_options(parser, "runs/mini-paper")
    parser.set_defaults(seeds=3, output=Path("runs/mini-paper"))
    args = parser.parse_args(argv)
    return Settings(tuple(args.claims), read_options(args, "mini"))


def paper_row(name: str) -> PaperRow:
    """The row that a claim names, with the metrics that the paper's other tables give it."""
    if name == SUPERVISED.name:
        return SUPERVISED
    return published_row(*ROWS[name])


def study_of(workspace: Workspace, numbers: Sequence[int], seeds: int) -> Study:
    """The claims of these numbers on rows of the paper's tables."""
    claims = tuple(claim for claim in CLAIMS if claim.number in numbers)
    return Study(workspace, claims, seeds, (*ROWS, SUPERVISED.name), paper_row)


def chapters(study: Study, cpu: float) -> list[Chapter]:
    """The report's first chapters: the claims, and the rows beside the paper's."""
    workspace = study.workspace
    texts = (
        summary(study),
        rules(study),
        f"Scale: {workspace.scale.name} of eval/paper/scales.yaml: a small model, a short "
        "schedule, 16 photographs. What fails here may hold at the paper's scale, and the reverse.",
        workspace.scale.tried,
        f"Cost: {cpu:.0f} CPU seconds.",
    )
    wanted = wanted_metrics(study.claims, study.names)
    rows = [(paper_row(name), metrics) for name, metrics in wanted.items() if name in ROWS]
    return [
        Chapter("claims", "The paper's claims", texts, tuple(study.tables())),
        Chapter("reproduced", "Beside the paper", (), (beside("", rows, workspace, study.seeds),)),
    ]


def mini_paper(settings: Settings) -> None:
    """Plan, run, judge, write; prints the claims last."""
    options, workspace = settings.options, settings.options.workspace
    study = study_of(workspace, settings.claims, options.seeds)
    wanted = wanted_metrics(study.claims, study.names)
    rows = [(paper_row(name), metrics) for name, metrics in wanted.items()]
    check_rows(options, rows)
    prepare_data(workspace)
    jobs = study.jobs()
    run_jobs(options, rows, jobs)
    if options.dry_run:
        return
    names = {job.name for job in jobs}
    cpu = sum(seconds for name, seconds in costs(workspace.output).items() if name in names)
    first = chapters(study, cpu)
    output = workspace.output / "report.html"
    page, _ = write_report(run_folders(workspace, jobs), output, "The paper in miniature", first)
    for table in (*first[0].tables, *first[1].tables):
        print("\n".join(markdown_table(table)))
    print(f"{cpu:.0f} CPU seconds; report: {page}")
    print(json.dumps({"claims": study.verdicts()}), flush=True)


def main() -> None:
    stop_on_sigterm()
    mini_paper(parse_args())


if __name__ == "__main__":
    run_command(main)

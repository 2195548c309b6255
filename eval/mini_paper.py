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
from dataclasses import dataclass, replace
from pathlib import Path

from eval.paper.claims import CLAIMS, CONFIDENCE, REFUTED, Claim, Judged, judge, verdict
from eval.paper.commands import Workspace, row_jobs, run_name
from eval.paper.job_runner import Command, costs, run_commands, show_plan
from eval.paper.published import PaperRow
from eval.paper.reproduction import (
    Options,
    add_options,
    beside,
    choose_rows,
    find_table,
    known_tables,
    our_result,
    prepare_data,
    read_options,
    result_path,
    run_folders,
)
from eval.protocols import headings, keys
from eval.report import write_report
from eval.reporting.cka_charts import cka_table
from eval.reporting.page import Chapter, markdown_table
from eval.reporting.run_records import read_result
from eval.reporting.tables import Cell, Row, Table
from eval.shared.cli import run_command
from eval.shared.processes import stop_on_sigterm
from pipeline.errors import UserError

# What a claim calls a row → the table and the name of the row in paper.yaml.
ROWS = {
    "MAE": (4, "MAE"),
    "R-MAE": (1, "R-MAE"),
    "C-MAE": (4, "C-MAE"),
    "C-MAE without mask tokens": (4, "C-MAE without mask tokens"),
    "MAE, 1 image": (6, "1 image, stronger augmentation, 5 epochs"),
    "random": (1, "random, 100 epochs"),
}
LARGE = 0.7  # share of dropped patches from which a CKA counts as of a large one
SUPERVISED = PaperRow("supervised", {}, recipe="supervised")


@dataclass(frozen=True)
class Settings:
    """Numbers of the claims to judge, and how."""

    claims: tuple[int, ...]
    options: Options


def parse_args(argv: list[str] | None = None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    numbers = [claim.number for claim in CLAIMS]
    parser.add_argument("--claims", type=int, nargs="+", choices=numbers, default=numbers)
    add_options(parser)
    parser.set_defaults(seeds=3, output=Path("runs/mini-paper"))
    args = parser.parse_args(argv)
    return Settings(tuple(args.claims), read_options(args, "mini"))


def paper_row(name: str) -> PaperRow:
    """The row that a claim names, with the metrics that the paper's other tables give it."""
    if name == SUPERVISED.name:
        return SUPERVISED
    table, called = ROWS[name]
    row = choose_rows(find_table(table), [called])[0]
    others = [other for known in known_tables().values() for other in known.rows]
    same = [o for o in others if (o.recipe or o.initial) and run_name(o, 0) == run_name(row, 0)]
    published = {metric: value for o in same for metric, value in o.published.items()}
    return replace(row, published=published)


def wanted_metrics(claims: Sequence[Claim]) -> dict[str, list[str]]:
    """Row → the metrics that the claims need of it, both in a fixed order."""
    pairs = {
        (name, protocol_of(difference.metric))
        for claim in claims
        for difference in claim.differences
        for name in (difference.better, difference.worse)
    }
    names = [name for name in (*ROWS, SUPERVISED.name) if any(name == row for row, _ in pairs)]
    return {name: [p for p in keys() if (name, p) in pairs] for name in names}


def protocol_of(metric: str) -> str:
    """The protocol that a claim's metric is of: `cka <pool>` are several of one."""
    return metric.split()[0]


def plan(workspace: Workspace, claims: Sequence[Claim], seeds: int) -> list[Command]:
    """Every job of the claims: seed by seed, in each the pretrainings first."""
    jobs = []
    for seed in range(seeds):
        for name, metrics in wanted_metrics(claims).items():
            jobs += row_jobs(workspace, paper_row(name), seed, metrics)
    return jobs


def our_value(workspace: Workspace, name: str, seed: int, what: str) -> float | None:
    """Our result of a row and seed; of `cka <pool>` its mean over all blocks where most is
    dropped."""
    row = paper_row(name)
    if protocol_of(what) != "cka":
        return our_result(workspace, row, seed, what)
    path = result_path(workspace, row, seed, "cka")
    if not path.is_file():
        return None
    result = read_result(path)
    try:
        by_ratio = zip(result["ratios"], cka_table(result, what.split()[1]) or (), strict=True)
        rows = [values for ratio, values in by_ratio if ratio > LARGE - 1e-6]
        return sum(map(sum, rows)) / sum(map(len, rows))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: not a result of today's eval/cka.py with {LARGE:.0%} dropped and more; "
            "remove it to run it again"
        ) from error


def claim_table(claim: Claim, judged: Sequence[Judged]) -> Table:
    """A claim's differences: both means, the difference with its interval, the verdict."""
    head = ("difference", "metric", "first", "second", "difference (95 % interval)", "verdict")
    rows = []
    for one in judged:
        d, digits = one.difference, 3 if protocol_of(one.difference.metric) == "cka" else 2
        means = [f"{sum(v) / len(v):.{digits}f}" if v else "-" for v in (one.better, one.worse)]
        bounds = f"{one.low:+.{digits}f} … {one.high:+.{digits}f}"
        if len(one.better) < 2:
            bounds = "no interval: fewer than two seeds"
        apart = f"{one.mean:+.{digits}f} {d.unit}".rstrip()
        cells = [
            f"{d.better} - {d.worse}",
            headings().get(d.metric, d.metric.replace("cka ", "CKA, ")),
            *means,
        ]
        rows.append(Row((*map(Cell, cells), Cell(apart, bounds), Cell(one.verdict))))
    refuted = any(one.verdict == REFUTED for one in judged)
    mark = "holds" if verdict(judged) else "does not hold" if refuted else "is undecided"
    return Table(head, tuple(rows), f"Claim {claim.number} {mark} here: {claim.text}")


def chapters(
    workspace: Workspace, claims: Sequence[Claim], seeds: int, cpu: float
) -> list[Chapter]:
    """The report's first chapters: the claims, and the rows beside the paper's."""
    tables = [claim_table(claim, judge_claim(workspace, claim, seeds)) for claim in claims]
    texts = (
        f"{seeds} seed{'s' if seeds > 1 else ''}; each seed has its own pretraining, its own "
        "finetuning and its own 10 % of the labels, and pairs are of one seed. A claim holds where "
        f"Student's {CONFIDENCE:.0%} interval of each paired difference is above 0; intervals "
        "are not corrected for their number.",
        f"Scale: {workspace.scale.name} of eval/paper/scales.yaml: a small model, a short "
        "schedule, 16 photographs. What fails here may hold at the paper's scale, and the reverse.",
        workspace.scale.tried,
        f"Cost: {cpu:.0f} CPU seconds.",
    )
    rows = [(paper_row(n), metrics) for n, metrics in wanted_metrics(claims).items() if n in ROWS]
    ours = beside("", rows, workspace, seeds)
    return [
        Chapter("claims", "The paper's claims", texts, tuple(tables)),
        Chapter("reproduced", "Beside the paper", (), (ours,)),
    ]


def judge_claim(workspace: Workspace, claim: Claim, seeds: int) -> list[Judged]:
    """A claim's differences, judged."""

    def values(name: str, what: str) -> list[float | None]:
        return [our_value(workspace, name, seed, what) for seed in range(seeds)]

    return [judge(difference, values) for difference in claim.differences]


def mini_paper(settings: Settings) -> None:
    """Plan, run, judge, write; prints the claims last."""
    options, workspace = settings.options, settings.options.workspace
    prepare_data(workspace)
    claims = [claim for claim in CLAIMS if claim.number in settings.claims]
    jobs = plan(workspace, claims, options.seeds)
    if options.dry_run:
        print("\n".join(show_plan(jobs)), flush=True)
        return
    run_commands(jobs, options.jobs, workspace.output)
    names = {job.name for job in jobs}
    cpu = sum(seconds for name, seconds in costs(workspace.output).items() if name in names)
    first = chapters(workspace, claims, options.seeds, cpu)
    output = workspace.output / "report.html"
    page, _ = write_report(run_folders(workspace, jobs), output, "The paper in miniature", first)
    for table in (*first[0].tables, *first[1].tables):
        print("\n".join(markdown_table(table)))
    print(f"{cpu:.0f} CPU seconds; report: {page}")
    found = {str(c.number): verdict(judge_claim(workspace, c, options.seeds)) for c in claims}
    print(json.dumps({"claims": found}), flush=True)


def main() -> None:
    stop_on_sigterm()
    mini_paper(parse_args())


if __name__ == "__main__":
    run_command(main)

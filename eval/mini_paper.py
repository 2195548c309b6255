"""The paper in miniature: which of its claims hold on 16 photographs, with a confidence interval.

    make mini-paper                                  three seeds, on two CPU cores
    python eval/mini_paper.py --claims 3 5 --seeds 2 a part of it

Makes rows of the paper's tables with eval/reproduce.py's commands at the scale `mini`, evaluates
them, and judges each claim by Student's 95 % interval of the paired differences over seeds: true
only where the whole interval lies above 0. Writes OUTPUT/report.html and report.md; the last line
printed is {"claims": {"1": true, …}}.
"""

import argparse
import json
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.paper.claims import CLAIMS, CONFIDENCE, REFUTED, Claim, Judged, judge, verdict
from eval.paper.commands import Place, row_jobs, run_name
from eval.paper.job_runner import Job, costs, run_jobs, show_plan
from eval.paper.published import PaperRow
from eval.protocols import headings, keys
from eval.report import Section, markdown_table, write_report
from eval.reporting.tables import Cell, Row, Table
from eval.reproduce import (
    add_options,
    beside,
    choose_rows,
    figure,
    find_table,
    known_tables,
    make_place,
    run_folders,
    stop_children,
)
from eval.shared.cli import run_command

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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    numbers = [claim.number for claim in CLAIMS]
    parser.add_argument("--claims", type=int, nargs="+", choices=numbers, default=numbers)
    add_options(parser)
    parser.set_defaults(seeds=3, output=Path("runs/mini-paper"))
    return parser.parse_args(argv)


def paper_row(name: str) -> PaperRow:
    """The row that a claim names, with the figures that the paper's other tables give it."""
    if name == SUPERVISED.name:
        return SUPERVISED
    table, called = ROWS[name]
    row = choose_rows(find_table(table), [called])[0]
    others = [other for known in known_tables().values() for other in known.rows]
    same = [o for o in others if (o.recipe or o.initial) and run_name(o, 0) == run_name(row, 0)]
    published = {figure: value for o in same for figure, value in o.published.items()}
    return replace(row, published=published)


def wanted_figures(claims: Sequence[Claim]) -> dict[str, list[str]]:
    """Row → the figures that the claims need of it, both in a fixed order."""
    pairs = {
        (name, difference.figure)
        for claim in claims
        for difference in claim.differences
        for name in (difference.better, difference.worse)
    }
    names = [name for name in (*ROWS, SUPERVISED.name) if any(name == row for row, _ in pairs)]
    return {name: [p for p in keys() if (name, p) in pairs] for name in names}


def plan(place: Place, claims: Sequence[Claim], seeds: int) -> list[Job]:
    """Every job of the claims: seed by seed, in each the pretrainings first."""
    jobs = []
    for seed in range(seeds):
        for name, figures in wanted_figures(claims).items():
            jobs += row_jobs(place, paper_row(name), seed, figures)
    return jobs


def our_figure(place: Place, name: str, seed: int, what: str) -> float | None:
    """Our figure of a row and seed; of CKA its mean over all blocks where most is dropped."""
    row = paper_row(name)
    if what != "cka":
        return figure(place, row, seed, what)
    path = place.output / run_name(row, seed) / "eval" / "cka.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        values
        for ratio, values in zip(result["ratios"], result["cka"], strict=True)
        if ratio > LARGE - 1e-6
    ]
    return sum(map(sum, rows)) / sum(map(len, rows))


def claim_table(claim: Claim, judged: Sequence[Judged]) -> Table:
    """A claim's differences: both means, the difference with its interval, the verdict."""
    head = ("difference", "figure", "first", "second", "difference (95 % interval)", "verdict")
    rows = []
    for one in judged:
        d, digits = one.difference, 3 if one.difference.figure == "cka" else 2
        means = [f"{sum(v) / len(v):.{digits}f}" if v else "-" for v in (one.better, one.worse)]
        bounds = f"{one.low:+.{digits}f} … {one.high:+.{digits}f}"
        if len(one.better) < 2:
            bounds = "no interval: fewer than two seeds"
        apart = f"{one.mean:+.{digits}f} {d.unit}".rstrip()
        cells = [f"{d.better} - {d.worse}", headings().get(d.figure, d.figure.upper()), *means]
        rows.append(Row((*map(Cell, cells), Cell(apart, bounds), Cell(one.verdict))))
    refuted = any(one.verdict == REFUTED for one in judged)
    mark = "holds" if verdict(judged) else "does not hold" if refuted else "is undecided"
    return Table(head, tuple(rows), f"Claim {claim.number} {mark} here: {claim.text}")


def sections(place: Place, claims: Sequence[Claim], seeds: int, cpu: float) -> list[Section]:
    """The report's first chapters: the claims, and the rows beside the paper's."""
    tables = [claim_table(claim, judge_claim(place, claim, seeds)) for claim in claims]
    texts = (
        f"{seeds} seed{'s' if seeds > 1 else ''}; each seed has its own pretraining, its own "
        "finetuning and its own 10 % of the labels, and pairs are of one seed. A claim holds where "
        f"Student's {CONFIDENCE:.0%} interval of each paired difference lies above 0; intervals "
        "are not corrected for their number.",
        f"Scale: {place.scale.name} of eval/paper/scales.yaml: a small model, a short schedule, 16 "
        "photographs. What fails here may hold at the paper's scale, and the reverse.",
        place.scale.tried,
        f"Cost: {cpu:.0f} CPU seconds.",
    )
    rows = [(paper_row(n), figures) for n, figures in wanted_figures(claims).items() if n in ROWS]
    ours = beside("", rows, place, seeds)
    return [
        Section("claims", "The paper's claims", texts, tuple(tables)),
        Section("reproduced", "Beside the paper", (), (ours,)),
    ]


def judge_claim(place: Place, claim: Claim, seeds: int) -> list[Judged]:
    """A claim's differences, judged."""

    def values(name: str, what: str) -> list[float | None]:
        return [our_figure(place, name, seed, what) for seed in range(seeds)]

    return [judge(difference, values) for difference in claim.differences]


def mini_paper(args: argparse.Namespace) -> None:
    """Plan, run, judge, write; prints the claims last."""
    place = make_place(args, "mini")
    claims = [claim for claim in CLAIMS if claim.number in args.claims]
    jobs = plan(place, claims, args.seeds)
    if args.dry_run:
        print("\n".join(show_plan(jobs)), flush=True)
        return
    run_jobs(jobs, args.jobs, place.output)
    names = {job.name for job in jobs}
    cpu = sum(seconds for name, seconds in costs(place.output).items() if name in names)
    first = sections(place, claims, args.seeds, cpu)
    output = place.output / "report.html"
    page, _ = write_report(run_folders(place, jobs), output, "The paper in miniature", first)
    for table in (*first[0].tables, *first[1].tables):
        print("\n".join(markdown_table(table)))
    print(f"{cpu:.0f} CPU seconds; report: {page}")
    found = {str(c.number): verdict(judge_claim(place, c, args.seeds)) for c in claims}
    print(json.dumps({"claims": found}), flush=True)


def main() -> None:
    signal.signal(signal.SIGTERM, stop_children)
    mini_paper(parse_args())


if __name__ == "__main__":
    run_command(main)

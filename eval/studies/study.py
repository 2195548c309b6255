"""A study: claims of the paper judged on rows that we make, and what its report says of them.

What eval/mini_paper.py and eval/cifar_paper.py share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from eval.paper.commands import Workspace, row_jobs
from eval.paper.job_runner import Command
from eval.paper.published import PaperRow
from eval.paper.reproduction import our_result, result_path
from eval.protocols import headings, keys
from eval.reporting.cka_charts import cka_table
from eval.reporting.run_records import read_result
from eval.reporting.tables import NONE, UNMEASURED, Cell, Row, Table
from eval.studies.claims import CONFIDENCE, REFUTED, Claim, Judged, correct, judge, verdict
from pipeline.errors import UserError
from shard_tools.cli import counted

LARGE = 0.7  # share of dropped patches from which a CKA counts as of a large one


@dataclass(frozen=True)
class Study:
    """Claims to judge on seeds 0 … seeds - 1 of a workspace.

    names: what claims call rows, in the order in which they are made; row: the row of a name.
    corrected: p-values are corrected for the number of differences (Holm).
    """

    workspace: Workspace
    claims: tuple[Claim, ...]
    seeds: int
    names: tuple[str, ...]
    row: Callable[[str], PaperRow]
    corrected: bool = False

    def jobs(self) -> list[Command]:
        """Every job of the claims: seed by seed, in each the pretrainings first."""
        wanted = wanted_metrics(self.claims, self.names)
        return [
            job
            for seed in range(self.seeds)
            for name, metrics in wanted.items()
            for job in row_jobs(self.workspace, self.row(name), seed, metrics)
        ]

    def value(self, name: str, seed: int, what: str) -> float | None:
        """Our result of a row and seed, None where there is none yet; of `cka <pool>` its mean over
        all blocks where most is dropped."""
        row = self.row(name)
        if protocol_of(what) != "cka":
            return our_result(self.workspace, row, seed, what)
        path = result_path(self.workspace, row, seed, "cka")
        if not path.is_file():
            return None
        result = read_result(path)
        try:
            by_ratio = zip(result["ratios"], cka_table(result, what.split()[1]) or (), strict=True)
            rows = [values for ratio, values in by_ratio if ratio > LARGE - 1e-6]
            value = sum(map(sum, rows)) / sum(map(len, rows))
            if not isfinite(value):
                raise ValueError(f"a CKA of {value}")
            return value
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"{path}: not a result of today's eval/cka.py with {LARGE:.0%} dropped and more; "
                "remove it to run it again"
            ) from error

    def judged(self) -> dict[int, list[Judged]]:
        """Claim number → its differences, judged."""
        found = {
            claim.number: [
                judge(
                    difference,
                    lambda name, what: [self.value(name, seed, what) for seed in range(self.seeds)],
                )
                for difference in claim.differences
            ]
            for claim in self.claims
        }
        if not self.corrected:
            return found
        together = iter(correct([one for judged in found.values() for one in judged]))
        return {number: [next(together) for _ in judged] for number, judged in found.items()}

    def verdicts(self) -> dict[str, bool]:
        """Claim number → whether it holds."""
        return {str(number): verdict(judged) for number, judged in self.judged().items()}

    def tables(self) -> list[Table]:
        """A table per claim: those that contradict the paper first, then those that hold; last
        one of all claims that are not measured."""
        judged = self.judged()
        said = {claim: word(judged[claim.number]) for claim in self.claims}
        tables = [
            claim_table(claim, judged[claim.number], self.seeds)
            for what in (REFUTED, "holds", "undecided")
            for claim in self.claims
            if said[claim] == what
        ]
        missing = [claim for claim in self.claims if said[claim] == UNMEASURED]
        return [*tables, unmeasured_table(missing)] if missing else tables


def wanted_metrics(claims: Sequence[Claim], names: Sequence[str]) -> dict[str, list[str]]:
    """Row → the protocols that the claims need of it, both in a fixed order."""
    pairs = {
        (name, protocol_of(difference.metric))
        for claim in claims
        for difference in claim.differences
        for name in (difference.better, difference.worse)
    }
    wanted = [name for name in names if any(name == row for row, _ in pairs)]
    return {name: [p for p in keys() if (name, p) in pairs] for name in wanted}


def protocol_of(metric: str) -> str:
    """The protocol that a claim's metric is of: `cka <pool>` are several of one."""
    return metric.split()[0]


def word(judged: Sequence[Judged]) -> str:
    """A claim's verdict in a word: it holds where all its differences do, and the opposite where
    that of one does, whether or not the others are measured."""
    if verdict(judged):
        return "holds"
    if any(one.verdict == REFUTED for one in judged):
        return REFUTED
    return "undecided" if any(one.apart for one in judged) else UNMEASURED


def summary(study: Study) -> str:
    """The verdicts in a sentence or a few, what contradicts a claim first."""
    judged = study.judged()
    found: dict[str, list[str]] = {}
    for number in sorted(judged):
        found.setdefault(word(judged[number]), []).append(str(number))
    names = ((REFUTED, "Refuted here"), ("holds", "Hold"), ("undecided", "Undecided"),
             (UNMEASURED, "Not measured yet"))  # fmt: skip
    return " ".join(
        f"{name}: {', '.join(found[what]) if what in found else 'none'}."
        for what, name in names
        if what in found or what == REFUTED
    )


def claim_table(claim: Claim, judged: Sequence[Judged], seeds: int) -> Table:
    """A claim's differences: both means, the difference with its intervals, p, the verdict."""
    head = ("difference", "metric", "first", "second", "difference (95 % interval)", "bootstrap",
            "p", "verdict")  # fmt: skip
    marks = {"holds": "holds", REFUTED: "does not hold", "undecided": "is undecided"}
    rows = tuple(Row(tuple(claim_cells(one, seeds))) for one in judged)
    return Table(head, rows, f"Claim {claim.number} {marks[word(judged)]} here: {claim.text}")


def unmeasured_table(claims: Sequence[Claim]) -> Table:
    """Claims of which nothing is measured."""
    rows = tuple(Row((Cell(f"Claim {c.number}"), Cell(c.text))) for c in claims)
    return Table(("claim", "what it says"), rows, "Not measured yet", text=True)


def claim_cells(one: Judged, seeds: int) -> list[Cell]:
    """A difference as a row of `claim_table`; seeds: as many pairs as there should be."""
    d, digits = one.difference, 3 if protocol_of(one.difference.metric) == "cka" else 2
    means = [f"{sum(v) / len(v):.{digits}f}" if v else NONE for v in (one.better, one.worse)]
    names = f"{d.better} - {d.worse}"
    metric = headings().get(d.metric, d.metric.replace("cka ", "CKA, "))
    allowed = f"may be {d.margin:g} {d.unit} less" if d.margin else ""
    pairs = len(one.apart)
    partly = f"{pairs} of {seeds} seeds" if 0 < pairs < seeds else ""
    cells = [Cell(names, allowed), Cell(metric, partly), *map(Cell, means)]
    if not pairs:
        return [*cells, *[Cell(NONE)] * 3, Cell(one.verdict, UNMEASURED)]
    if pairs < 2:
        apart = f"{one.mean:+.{digits}f} {d.unit}".rstrip()
        cells += [Cell(apart, "no interval: fewer than two seeds"), Cell(NONE), Cell(NONE)]
        return [*cells, Cell(one.verdict)]
    between = [
        f"{a:+.{digits}f} … {b:+.{digits}f}" for a, b in ((one.low, one.high), one.bootstrap)
    ]
    corrected = "" if one.corrected == one.p else f"Holm: {one.corrected:.2g}"
    n = one.seeds_needed
    need = "" if one.verdict != "undecided" else f"{n} seeds" if n else "over 1000 seeds"
    need = need and f"{need} would decide it, were mean and deviation so"
    return [
        *cells,
        Cell(f"{one.mean:+.{digits}f} {d.unit}".rstrip(), between[0]),
        Cell(between[1]),
        Cell(f"{one.p:.2g}", corrected),
        Cell(one.verdict, need),
    ]


def rules(study: Study) -> str:
    """How the study's claims are judged, as a sentence of its report."""
    text = (
        f"{counted(study.seeds, 'seed')}; each seed has its own pretraining, its own "
        "finetuning and its own 10 % of the labels, and pairs are of one seed. A claim holds where "
        f"Student's two-sided test at {1 - CONFIDENCE:.0%} finds each paired difference above 0 "
        "(or above minus what its row may be less: then p is of that), and is refuted where it "
        "finds one below; intervals are over seeds, on one set of test images; "
    )
    if study.corrected:
        return text + (
            "p-values are corrected for the number of all differences here (Holm), intervals are "
            "not."
        )
    return text + "p-values and intervals are not corrected for their number."

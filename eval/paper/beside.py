"""Our results beside the published ones, for the report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.paper.published import PaperRow, PaperTable, find_row, read_paper
from eval.protocols import PROTOCOLS, headings, metric_of
from eval.reporting.page import Chapter
from eval.reporting.run_records import Group, Run
from eval.reporting.tables import (
    FEATURE_NAMES,
    NONE,
    Cell,
    Column,
    Row,
    Table,
    accuracy_cell,
    is_random,
    random_key,
)


def paper_chapter(groups: Sequence[Group]) -> Chapter:
    """Ours beside the published tables."""
    texts = (
        "The paper's numbers are those of ViT-B/16 (Tab. 5: ViT-S) on ImageNet. Ours are matched "
        "by method; they compare only where model, data and schedule are the paper's, too.",
    )
    return Chapter("paper", "Beside the paper", texts, tuple(paper_tables(groups)))


def paper_tables(groups: Sequence[Group]) -> list[Table]:
    """The paper's tables in which a group has a result, each with all its published rows."""
    tables = []
    for table in read_paper():
        members: dict[str, list[Group]] = {}
        for group in groups:
            row = find_row(table, group.runs[0])
            if row and any(metrics(group.runs, name) for name in table.columns):
                members.setdefault(row.name, []).append(group)
        if members:
            tables.append(one_table(table, members, groups))
    return tables


def one_table(table: PaperTable, members: dict[str, list[Group]], groups: Sequence[Group]) -> Table:
    """A published table with two columns per metric: the paper's and ours."""
    rows = []
    for row in table.rows:
        for group in members.get(row.name, []):
            rows.append(one_row(table, row, group.label, group.runs))
        if row.name not in members:
            rows.append(one_row(table, row, "", random_runs(row, groups)))
    head = ["row"]
    for name in table.columns:
        head += [f"{headings()[name]}: paper", "ours"]
    caveats = [f"{row.name}: {row.caveat}." for row in table.rows if row.caveat]
    runs = [run for group in groups for run in group.runs]
    probes = fitting(runs, "linprobe") if "linprobe" in table.columns else []
    features = [result.get("feature") for _, result in probes]
    notes = tuple(note for note in (table.note, feature_note(features), *caveats) if note)
    return Table(tuple(head), tuple(rows), f"Tab. {table.number}: {table.title}", notes)


def feature_note(features: Sequence[str | None]) -> str:
    """Which feature our linear probes read, or "" without any."""
    names = [FEATURE_NAMES[f] for f in dict.fromkeys(features) if f in FEATURE_NAMES]
    return f"Our linear probes read the {' or the '.join(names)}." if names else ""


def random_runs(row: PaperRow, groups: Sequence[Group]) -> list[Run]:
    """Where a row without pretraining finds our results: in every run's random baselines."""
    random = row.initial == "random" and row.classes is None
    return [run for group in groups for run in group.runs] if random else []


def one_row(table: PaperTable, row: PaperRow, label: str, runs: Sequence[Run]) -> Row:
    """A published row and the results of the runs that reproduce it."""
    cells = [Cell(row.name, f"ours: {label}" if label else "")]
    times = row.finetune.get("epochs", 100) / 100
    for name in table.columns:
        if row.initial == "random":
            values = random_metrics(runs, name, times)
        else:
            values = metrics(runs, name)
        ours = accuracy_cell(values, [], Column(name))
        cells += [Cell(str(row.published.get(name, NONE))), ours]
    return Row(tuple(cells), baseline=row.initial == "random")


def metrics(runs: Sequence[Run], name: str) -> list[float]:
    """The pretrained runs' values of one of the paper's metrics."""
    found: dict[Path, dict[str, Any]] = {}
    for run, result in fitting(runs, name):
        if is_random(result):
            continue
        before = found.setdefault(run.folder, result)
        if len(result.get("file", "")) < len(before.get("file", "")):  # of the usual settings
            found[run.folder] = result
    return [metric_of(result) for result in found.values()]


def random_metrics(runs: Sequence[Run], name: str, times: float) -> list[float]:
    """The values of random encoders, each once, that trained `times` as long as the usual.

    Usual are the epochs of the pretrained encoders; without one, the fewest.
    """
    results = [result for _, result in fitting(runs, name)]
    usual = min(map(epochs, [r for r in results if not is_random(r)] or results), default=0.0)
    found = {}
    for result in results:
        if is_random(result) and epochs(result) == times * usual:
            found[random_key(result)] = metric_of(result)
    return list(found.values())


def fitting(runs: Sequence[Run], name: str) -> list[tuple[Run, dict[str, Any]]]:
    """The results that count as one of the paper's metrics, with their runs."""
    for protocol in (p for p in PROTOCOLS if p.key == name):
        found = [
            (run, result)
            for run in runs
            for result in run.results
            if result.get("protocol") == protocol.name
            and label_share(result) == protocol.fraction
            and not result.get("beside")
        ]
        if found:
            return found
    return []


def label_share(result: dict[str, Any]) -> float:
    """The share of the labels that a result was trained on; nan where a list of names chose them.

    SimCLR's list of a tenth is known by its name.
    """
    settings = result.get("settings", {})
    if settings.get("subset"):
        return 0.1 if "10percent" in Path(settings["subset"]).name else math.nan
    return float(settings.get("fraction") or 1)


def epochs(result: dict[str, Any]) -> float:
    """How long a result was trained, 0 where nothing was."""
    return float(result.get("settings", {}).get("epochs") or 0)

"""The numbers of a report: accuracies, throughput and settings of groups of runs, as tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from eval.protocols import by_name
from eval.reporting.run_records import Group, Run, differing, is_undecided


@dataclass(frozen=True)
class Cell:
    """A table cell: its value and a smaller note under it."""

    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Cells of a row, the first of which names it; a baseline is set apart."""

    cells: tuple[Cell, ...]
    baseline: bool = False


@dataclass(frozen=True)
class Table:
    """Head, rows and notes; `text` marks tables of words, which are set flush left."""

    head: tuple[str, ...]
    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    text: bool = False


@dataclass(frozen=True)
class Column:
    """A kind of result: its title, how long it trained ("" = not at all), its field and unit."""

    title: str
    length: str = ""
    field: str = "top1"
    unit: str = "%"

    @property
    def name(self) -> str:
        """What distinguishes it from every other column."""
        return f"{self.title}, {self.length}" if self.length else self.title


FEATURE_NAMES = {"cls": "cls token", "mean_patch": "mean of patches", "own": "own pooling"}
NONE = "-"  # what a table shows where there is no number
UNMEASURED = "not measured"  # and where one is still to come
VARIANT = "variant"  # of a result: what distinguishes it from others of its column


def column_of(result: dict[str, Any]) -> Column | None:
    """The column that a result belongs to, None for one that is not a single number."""
    protocol = by_name(result.get("protocol"))
    if protocol is None or not protocol.metric or is_undecided(result):
        return None
    title = protocol.title
    settings = result.get("settings", {})
    fraction = settings.get("fraction")
    if settings.get("subset"):
        title += f", the labels of {Path(settings['subset']).name}"
    elif fraction not in (None, 1, 1.0):
        title += f", {100 * fraction:g} % of the labels"
    feature = result.get("feature")
    several = protocol.script == "linprobe"  # it may read more than one: then each is named
    if feature in FEATURE_NAMES and (several or feature != "cls"):
        title += f", {FEATURE_NAMES[feature]}"
    title += "".join(f", {words}" for words in result.get(VARIANT, ()))
    epochs = settings.get("epochs")
    length = f"{epochs:g} epochs" if epochs else ""
    return Column(title, length, protocol.metric, protocol.unit)


def left_out_table(groups: Sequence[Group]) -> Table | None:
    """Results that no table or chart shows, and why; None where there are none."""
    rows = [
        Row((Cell(str(result.get("protocol"))), Cell(str(result["file"])), Cell(reason)))
        for group in groups
        for run in group.runs
        for result in run.results
        if (reason := why_left_out(result))
    ]
    head = ("protocol", "file", "why")
    return Table(head, tuple(rows), "Results that are not shown", text=True) if rows else None


def why_left_out(result: dict[str, Any]) -> str:
    """Why nothing shows a result, "" where something does."""
    if by_name(result.get("protocol")) is None:
        return "eval/protocols.py has no row for this protocol"
    return "no trial was decided for shape or texture" if is_undecided(result) else ""


def accuracy_table(groups: Sequence[Group]) -> Table | None:
    """One row per group and one for random encoders, one column per protocol; None if empty.

    What was trained for fewer or more epochs has a column of its own, which names them. A cell
    is the mean over the seeds ± the sample standard deviation, and the distance to the random
    encoders' mean.
    """
    columns: dict[str, Column] = {}
    for group in groups:
        for run in group.runs:
            for result in run.results:
                column = column_of(result)
                if column:
                    columns.setdefault(column.name, column)
    if not columns:
        return None
    random = {key: random_values(groups, column) for key, column in columns.items()}
    rows = []
    for group in groups:
        results = [result for run in group.runs for result in run.results]
        if results and all(is_random(result) for result in results):
            continue  # its results are in the row of the random encoders
        cells = [
            accuracy_cell(group_values(group, column), random[key], column)
            for key, column in columns.items()
        ]
        rows.append(Row((Cell(group.label, seeds_text(group)), *cells)))
    if any(random.values()):
        cells = [accuracy_cell(random[key], [], column) for key, column in columns.items()]
        rows.append(Row((Cell("random encoder"), *cells), baseline=True))
    titles = [column.title for column in columns.values()]
    heads = [
        (c.title if titles.count(c.title) == 1 else c.name) + (f" ({c.unit})" if c.unit else "")
        for c in columns.values()
    ]
    return Table(
        head=("recipe", *heads),
        rows=tuple(rows),
        notes=tuple(protocol_notes(groups)),
    )


def seeds_text(group: Group) -> str:
    """How many runs a row averages."""
    return f"{len(group.runs)} seeds" if len(group.runs) > 1 else ""


def group_values(group: Group, column: Column) -> list[float]:
    """The pretrained encoders' results of a group in one column, one per run that has it."""
    return [
        float(result[column.field])
        for run in group.runs
        for result in run.results
        if not is_random(result) and column_of(result) == column
    ]


def random_values(groups: Sequence[Group], column: Column) -> list[float]:
    """Results of random encoders, each architecture and seed once although several runs have it."""
    found: dict[str, float] = {}
    for group in groups:
        for run in group.runs:
            for result in run.results:
                if is_random(result) and column_of(result) == column:
                    found.setdefault(random_key(result), float(result[column.field]))
    return list(found.values())


def random_key(result: dict[str, Any]) -> str:
    """What distinguishes the random encoder of a result from another."""
    return str([result["encoder"].get(k) for k in ("arch", "options", "random_seed")])


def is_random(result: dict[str, Any]) -> bool:
    """Whether a result is that of a randomly initialised encoder."""
    return bool(result.get("encoder", {}).get("random"))


def accuracy_cell(values: list[float], baseline: list[float], column: Column) -> Cell:
    """`mean ± deviation`, with the distance to the baseline's mean as its note."""
    digits = 2 if column.unit else 3
    both = values and baseline
    note = against_random(mean(values) - mean(baseline), digits) if both else ""
    return Cell(spread_text(values, digits), note)


def spread_text(values: Sequence[float], digits: int = 2) -> str:
    """`mean ± sample standard deviation` of what is there."""
    if not values:
        return NONE
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def against_random(gain: float, digits: int) -> str:
    """A distance to the random encoder's value: `+2.50 over random`, `1.20 below random`."""
    return f"{-gain:.{digits}f} below random" if gain < 0 else f"{gain:+.{digits}f} over random"


def protocol_notes(groups: Sequence[Group]) -> list[str]:
    """What a reader must know about the protocols in the table, each thing once."""
    notes = ["± is the sample standard deviation over seeds; a number without it is of one seed."]
    for group in groups:
        for run in group.runs:
            for result in run.results:
                column = column_of(result)
                if column:
                    notes.append(f"{column.name}: {', '.join(facts(result))}.")
                    notes += outdated(run, column, result)
    return list(dict.fromkeys(notes))


def outdated(run: Run, column: Column, result: dict[str, Any]) -> list[str]:
    """What to say of a result whose encoder has been trained further since."""
    step = result.get("encoder", {}).get("step")
    last = run.metrics[-1]["step"] if run.metrics else 0
    if not isinstance(step, int) or is_random(result) or step >= last:
        return []
    return [f"{column.name}: {run.name}'s is of step {step}, and the run is at step {last}."]


def facts(result: dict[str, Any]) -> list[str]:
    """How a result came about, in a few words each."""
    settings = result.get("settings", {})
    words = [f"{result['images']} validation images"] if "images" in result else []
    words += [f"batch {settings['batch_size']}"] if settings.get("batch_size") else []
    words += [f"k = {settings['k']}"] if "k" in settings else []
    words += [str(result["precision"])] if "precision" in result else []
    if "base_lr_chosen_on" in result:
        words.append(f"learning rate chosen on {result['base_lr_chosen_on']}")
    if settings.get("trained_epochs", math.inf) < settings.get("epochs", 0):  # --stop-epoch
        words.append(f"trained for {settings['trained_epochs']:g} of {settings['epochs']:g} epochs")
    if settings.get("max_steps") is not None:
        words.append(f"cut short at {settings['max_steps']} steps")
    return words


def throughput_table(runs: Sequence[Run]) -> Table:
    """Speed, waiting and memory of each run, with the machine that it ran on."""
    head = (
        "run", "images/s", "data wait", "memory (GB)", "steps", "device", "ranks", "precision",
        "kernels",
    )  # fmt: skip
    rows = []
    for run in runs:
        wait, memory = run.typical("data_wait"), run.typical("memory_gb")
        speed = run.typical("images_per_second")
        steps = run.metrics[-1].get("step", NONE) if run.metrics else NONE
        values = [
            run.name,
            NONE if speed is None else f"{speed:.1f}",
            NONE if wait is None else f"{100 * wait:.1f} %",
            NONE if memory is None else f"{memory:.2f}",
            str(steps),
            *(str(run.versions.get(k, NONE)) for k in ("device", "ranks", "precision", "kernels")),
        ]
        rows.append(Row(tuple(Cell(value) for value in values)))
    note = (
        "Medians of the logged steps, the first entry left out. Data wait is the share of a "
        "step's time spent waiting for the loader."
    )
    return Table(head, tuple(rows), notes=(note,))


def difference_table(groups: Sequence[Group]) -> Table | None:
    """The recipe keys in which the groups differ, one column per group; None if there are none."""
    keys = [k for k in differing(group.runs[0] for group in groups) if k != "name"]
    if not keys:
        return None
    rows = [
        Row((Cell(key), *(Cell(str(g.runs[0].flat.get(key, NONE))) for g in groups)))
        for key in keys
    ]
    return Table(
        ("setting", *(g.label for g in groups)), tuple(rows), "Where the recipes differ", text=True
    )


def versions_table(runs: Sequence[Run]) -> Table:
    """Software and hardware of the runs, runs that agree in one column."""
    keys = list(dict.fromkeys(k for run in runs for k in run.versions))
    same: dict[str, list[Run]] = {}
    for run in runs:
        same.setdefault(str([run.versions.get(k) for k in keys]), []).append(run)
    columns = list(same.values())
    rows = [
        Row((Cell(key), *(Cell(str(c[0].versions.get(key, NONE))) for c in columns)))
        for key in keys
    ]
    names = (", ".join(run.name for run in c) if len(columns) > 1 else "all runs" for c in columns)
    return Table(("", *names), tuple(rows), "Versions", text=True)

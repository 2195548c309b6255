"""A sweep's results: mean and spread of every point, each parameter plotted, and the best point."""

from collections.abc import Container, Sequence
from statistics import mean

from eval.protocols import by_key, headings
from eval.reporting.charts import Line, line_chart
from eval.reporting.page import Chapter
from eval.reporting.run_records import metric_in
from eval.reporting.tables import NONE, Row, Table, spread_text
from eval.reporting.tables import Cell as TableCell
from eval.studies.significance import interval
from eval.studies.sweep_plan import Cell, Sweep, as_number, lost, result_path
from shard_tools.cli import counted

Point = tuple[tuple[str, str], ...]
Values = dict[Point, dict[int, float]]  # point → seed → result


def sweep_chapter(sweep: Sweep) -> Chapter:
    """The first chapter of a sweep's page."""
    shown = [name for name in sweep.evals if by_key(name).metric]
    found = {name: results(sweep, name) for name in shown}
    charts = [
        chart
        for name in shown
        for key in sweep.grid
        if (chart := parameter_chart(sweep, name, key, found[name]))
    ]
    gone = {name: lost_seeds(sweep, name, found[name]) for name in shown}
    texts = [best_text(name, found[name], gone[name]) for name in shown]
    texts.append(f"{counted(sweep.seeds, 'seed')}; curves are means, with the range of the seeds.")
    if any(seeds for points in gone.values() for seeds in points.values()):
        texts.append("A point that diverged in a seed is not among the best.")
    table = (sweep_table(sweep, found, gone),) if shown else ()
    return Chapter("sweep", "Sweep", tuple(filter(None, texts)), table, tuple(charts))


def results(sweep: Sweep, protocol: str) -> Values:
    """Point → seed → the metric of a protocol, of what is done."""
    found = Values()
    for cell in sweep.cells:
        values = found.setdefault(cell.point, {})
        value = metric_in(result_path(sweep, cell, protocol), protocol)
        if value is not None:
            values[cell.seed] = value
    return found


def lost_seeds(sweep: Sweep, protocol: str, found: Values) -> dict[Point, list[int]]:
    """Point → the seeds without a result whose pretraining, or the protocol itself, diverged."""
    gone, seeds = lost(sweep), dict[Point, list[int]]()
    for cell in sweep.cells:
        without = cell.seed not in found[cell.point]
        if without and gone & {f"{cell.name} pretrain", f"{cell.name} {protocol}"}:
            seeds.setdefault(cell.point, []).append(cell.seed)
    return seeds


def sweep_table(
    sweep: Sweep, found: dict[str, Values], gone: dict[str, dict[Point, list[int]]]
) -> Table:
    """A row per point: its values of the grid, then mean ± deviation of each protocol, and how many
    of its seeds diverged."""
    head = (*sweep.grid, "seeds done", *(headings()[name] for name in found))
    rows = []
    for point in dict.fromkeys(cell.point for cell in sweep.cells):
        done = max((len(values[point]) for values in found.values()), default=0)
        words = [value for _, value in point] + [f"{done} of {sweep.seeds}"]
        cells = list(map(TableCell, words))
        for name, values in found.items():
            diverged = len(gone[name].get(point, ()))
            note = f"{diverged} diverged" if diverged else ""
            cells.append(TableCell(spread_text(list(values[point].values())), note))
        rows.append(Row(tuple(cells)))
    notes = ("± is the sample standard deviation over seeds.",) if sweep.seeds > 1 else ()
    return Table(head, tuple(rows), notes=notes)


def parameter_chart(sweep: Sweep, protocol: str, key: str, found: Values) -> str:
    """A protocol's metric against one key of the grid, a line per point of the other keys."""
    choices = sweep.grid[key]
    numbers = [number for value in choices if (number := as_number(value)) is not None]
    numeric = len(numbers) == len(choices)
    positions = dict(zip(choices, numbers if numeric else range(len(choices)), strict=True))
    lines: dict[Point, list[tuple[float, list[float]]]] = {}
    for point, values in found.items():
        if values:
            others = tuple(pair for pair in point if pair[0] != key)
            x = float(positions[dict(point)[key]])
            lines.setdefault(others, []).append((x, list(values.values())))
    if not lines:
        return ""
    drawn = []
    for number, (others, points) in enumerate(lines.items()):
        points.sort(key=lambda pair: pair[0])
        band = ([min(v) for _, v in points], [max(v) for _, v in points])
        label = Cell(others, 0).label
        steps, means = [x for x, _ in points], [mean(v) for _, v in points]
        drawn.append(Line(steps, means, number, label, marker=True, band=band))
    heading = headings()[protocol]
    ticks = None if numeric else choices
    return line_chart(drawn, title=f"{heading} against {key}", x=key, y=heading, ticks=ticks)


def best_text(protocol: str, found: Values, gone: Container[Point] = ()) -> str:
    """The best point of a protocol, and whether it is surely ahead of the second. gone: points
    that diverged in a seed."""
    ranked = sorted(
        ((mean(values.values()), p) for p, values in found.items() if values and p not in gone),
        key=lambda pair: -pair[0],
    )
    if not ranked:
        return ""
    heading = headings()[protocol]
    first = ranked[0][1]
    text = f"Best by {heading}: {words(first)}, {spread_text(list(found[first].values()))}"
    if len(ranked) < 2:
        return f"{text}."
    second = ranked[1][1]
    seeds = sorted(found[first].keys() & found[second].keys())
    apart = [found[first][seed] - found[second][seed] for seed in seeds]
    return f"{text}; {ahead(apart)} {words(second)}."


def ahead(apart: Sequence[float]) -> str:
    """Paired differences over seeds in words, with Student's 95 % interval."""
    if len(apart) < 2:
        return "with one seed it is not known whether it is ahead of"
    if not any(apart):
        return "in every seed the same as"
    low, high = interval(apart)
    verdict = "ahead of" if low > 0 else "not surely ahead of"
    return f"by {mean(apart):.2f} (95 % interval {low:+.2f} … {high:+.2f}) {verdict}"


def words(point: Point) -> str:
    """A point in words."""
    return Cell(point, 0).label or NONE

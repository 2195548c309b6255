"""The table of the cheaper roads: what a step of each costs, and what its encoder loses or wins."""

from collections.abc import Mapping
from statistics import mean

from eval.paper.commands import pretrain_flops, row_recipe
from eval.paper.cost import of_one_device, read_rates, step_seconds
from eval.protocols import headings
from eval.reporting.page import Chapter
from eval.reporting.tables import NONE, UNMEASURED, Cell, Row, Table, spread_text
from eval.studies.cifar_claims import AS_LONG, QUICKER, plain
from eval.studies.claims import Difference, Judged, judge
from eval.studies.study import Study, wanted_metrics
from pipeline.config.recipe import Recipe

METRICS = ("finetune", "linprobe")


def cheaper_chapter(study: Study) -> Chapter:
    """Cost and quality of each road that the study's claims name; empty where they name none."""
    names = roads_of(study)
    texts = (
        "Each road beside its method with the same seeds. FLOPs are counted of the step, forward "
        "and backward; time is that of a step on one core or GPU of the machine that measured "
        f"it, without loading. With “{AS_LONG.removeprefix(', ')}”: more epochs, in the time of "
        "the method. Intervals are Student's, of 95 %, not corrected for their number.",
    )
    return Chapter("cheaper", "Cheaper roads", texts, (cheaper_table(study, names),) * bool(names))


def roads_of(study: Study) -> list[str]:
    """The roads of the study's claims, each method before its own; those with their method's time
    only where something of them is measured."""
    wanted = wanted_metrics(study.claims, study.names)
    named = {name.removesuffix(AS_LONG) for name in wanted}
    roads = [road for road in (*QUICKER, "MAE, early layers first") if road in named]
    found = []
    for method in dict.fromkeys(map(plain, roads)):
        found.append(method)
        for road in (road for road in roads if plain(road) == method):
            longer = f"{road}{AS_LONG}"
            found.append(road)
            if any(value is not None for m in METRICS for value in values(study, longer, m)):
                found.append(longer)
    return found


def values(study: Study, name: str, metric: str) -> list[float | None]:
    """Our results of a row by seed."""
    return [study.value(name, seed, metric) for seed in range(study.seeds)]


def cheaper_table(study: Study, names: list[str]) -> Table:
    """A row per road."""
    path = study.workspace.output / "rates.json"
    recipes = [row_recipe(study.workspace, study.row(name)) for name in names]
    known = of_one_device(read_rates(path), recipes) if path.is_file() else {}
    heads = [head for m in METRICS for head in (headings()[m], "against its method")]
    head = ("road", "MFLOP per image", "ms per image", "images seen", *heads)
    return Table(head, tuple(cheaper_row(study, name, known) for name in names))


def cheaper_row(study: Study, name: str, known: Mapping[str, float]) -> Row:
    """Costs of a road, each also as a share of its method's, and its results."""
    method = plain(name)
    recipe, usual = (row_recipe(study.workspace, study.row(one)) for one in (name, method))
    cells = [Cell(name)]
    for digits, cost in ((1, mflops), (2, lambda recipe: milliseconds(recipe, known))):
        ours, theirs = cost(recipe), cost(usual)
        share = f"{ours / theirs:.2f} of {method}'s" if ours and theirs and name != method else ""
        cells.append(Cell(f"{ours:.{digits}f}" if ours else NONE, share))
    times = recipe.optimizer.epochs / usual.optimizer.epochs
    cells.append(Cell(f"{times:.2f} ×"))
    for metric in METRICS:
        found = [value for value in values(study, name, metric) if value is not None]
        some = f"{len(found)} of {study.seeds} seeds" if 0 < len(found) < study.seeds else ""
        cells.append(Cell(spread_text(found) if found else UNMEASURED, some))
        difference = Difference(name, method, metric)
        judged = judge(difference, lambda row, what: values(study, row, what))
        cells.append(Cell(NONE) if name == method else apart_cell(judged))
    return Row(tuple(cells), baseline=name == method)


def apart_cell(judged: Judged) -> Cell:
    """The mean of the paired differences and its interval."""
    if not judged.apart:
        return Cell(NONE)
    between = f"{judged.low:+.2f} … {judged.high:+.2f}" if len(judged.apart) > 1 else "one seed"
    return Cell(f"{mean(judged.apart):+.2f}", between)


def mflops(recipe: Recipe) -> float:
    """Of training on an image."""
    return pretrain_flops(recipe) / 1e6


def milliseconds(recipe: Recipe, known: Mapping[str, float]) -> float | None:
    """Of training on an image, as measured."""
    seconds = step_seconds(known, recipe)
    return None if seconds is None else 1e3 * seconds

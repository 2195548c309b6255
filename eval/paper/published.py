"""The published tables (eval/paper/paper.yaml) and which of their rows a run belongs to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval.reporting.run_records import Run
from pipeline.config.recipe import RECIPES, dump_recipe, load_recipe
from pipeline.config.schema import ViewsRecipe
from pipeline.config.texts import flatten
from pipeline.errors import UserError, naming

PAPER = Path(__file__).with_name("paper.yaml")

# Recipe keys that say which method a run is; sizes, schedules and data are left out.
METHOD = ("encoder.masked_tokens", "views.", "measure.")
NOT_METHOD = ("measure.decoder.", "measure.heads.")


@dataclass(frozen=True)
class PaperRow:
    """One row: what to run (see the head of paper.yaml) and the published metrics."""

    name: str
    published: dict[str, float]
    recipe: str | None = None
    set: tuple[str, ...] = ()
    images: int | None = None
    sampling: str = "random"
    strong: bool = False
    classes: int | None = None
    initial: str | None = None
    finetune: dict[str, Any] = field(default_factory=dict)
    caveat: str = ""
    last: tuple[str, ...] = ()  # overrides after those of the scale, such as a tuned rate
    finetuned: bool = False  # the encoder as it is after the row's finetuning

    @property
    def plain(self) -> bool:
        """Whether recipe and overrides alone say how to pretrain it, on the full training set."""
        full = self.images is None and self.classes is None
        return self.recipe is not None and full and self.initial is None


@dataclass(frozen=True)
class PaperTable:
    """One table: its number, title, metrics and rows."""

    number: int
    title: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    note: str = ""


def read_paper(path: Path = PAPER) -> list[PaperTable]:
    """All tables in order. UserError names the table and row that cannot be read."""
    with naming(path, "cannot be read"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    tables = []
    for number, table in content.items():
        rows = []
        for row in table["rows"]:
            try:
                rows.append(PaperRow(**{**row, "set": tuple(row.get("set", ()))}))
            except TypeError as error:
                raise UserError(f"{path}, table {number}, {row.get('name')}: {error}") from error
            unknown = set(row["published"]) - set(table["columns"])
            if unknown:
                raise UserError(f"{path}, table {number}, {row['name']}: unknown metric {unknown}")
        columns = tuple(table["columns"])
        note = " ".join(table.get("note", "").split())
        tables.append(PaperTable(int(number), table["title"], columns, tuple(rows), note))
    return tables


def row_recipe(row: PaperRow) -> dict[str, Any] | None:
    """The flat recipe of a row that recipe and overrides describe; None for any other row."""
    path = RECIPES / f"{row.recipe}.yaml"
    if not row.plain or not path.is_file():
        return None
    return flatten(yaml.safe_load(dump_recipe(load_recipe(path, row.set))))


def same_method(flat: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two flat recipes agree in every key that says which method they are. A key of `views`
    that a recipe of an earlier version lacks had today's default."""
    views = flatten({"views": ViewsRecipe().model_dump(mode="json")})
    flat, other = views | flat, views | other
    keys = [k for k in {**flat, **other} if k.startswith(METHOD) and not k.startswith(NOT_METHOD)]
    return all(flat.get(k) == other.get(k) for k in keys)


def find_row(table: PaperTable, run: Run) -> PaperRow | None:
    """The row of a table with this run's method; of several, the one with its number of epochs."""
    found = []
    for row in table.rows:
        flat = row_recipe(row)
        if flat is not None and same_method(run.flat, flat):
            found.append((flat["optimizer.epochs"] != run.flat.get("optimizer.epochs"), row))
    return min(found, key=lambda pair: pair[0])[1] if found else None

"""The report's page: chapters of texts, tables, charts and pictures, as HTML and as Markdown."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.reporting.overview import MARKS, Card, headline
from eval.reporting.run_records import Group
from eval.reporting.tables import Table

WIDE = 576  # CSS pixels to which a small picture is enlarged, about


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, its size in pixels, and what it shows."""

    data: str
    width: int
    height: int
    caption: str

    @property
    def scale(self) -> int:
        """The integer factor that enlarges a small picture, so that its pixels stay sharp."""
        return max(1, round(WIDE / self.width))


@dataclass(frozen=True)
class Detail:
    """A folded block of files, [(name, text)]."""

    title: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Chapter:
    """A chapter of the report; cards: of runs, on the first screen."""

    id: str
    title: str
    texts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    details: tuple[Detail, ...] = ()
    cards: tuple[Card, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.cards or self.tables or self.charts or self.pictures or self.details)


def overview_chapter(cards: Sequence[Card]) -> Chapter:
    """The first screen: is my run healthy?"""
    text = headline(cards)
    return Chapter("overview", "Overview", (text,) if text else (), cards=tuple(cards))


def render(template: str, **values: Any) -> str:
    """A template of this folder with these values."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(**values)


def render_html(
    title: str, groups: Sequence[Group], chapters: Sequence[Chapter], refresh: float
) -> str:
    """The page as one string. refresh: seconds after which it loads itself again, 0: never."""
    runs = [run for group in groups for run in group.runs]
    return render(
        "report.html", title=title, groups=groups, runs=runs, chapters=chapters, refresh=refresh,
        marks=MARKS,
    )  # fmt: skip


def render_markdown(title: str, chapters: Sequence[Chapter]) -> str:
    """Texts and tables as Markdown; charts and pictures are left to the page."""
    lines = [f"# {plain(title)}", ""]
    for chapter in chapters:
        lines += [f"## {chapter.title}", ""]
        for text in chapter.texts:
            lines += [plain(text), ""]
        for card in chapter.cards:
            lines += markdown_card(card)
        for table in chapter.tables:
            lines += markdown_table(table)
        for detail in chapter.details:
            for name, text in detail.files:
                lines += [f"{plain(detail.title)}, `{name}`:", ""]
                lines += ["```", text.rstrip(), "```", ""]
        if chapter.charts or chapter.pictures:
            shown = len(chapter.charts) + len(chapter.pictures)
            lines += [f"({shown} charts or pictures in the HTML page)", ""]
    return "\n".join(lines)


def plain(text: str) -> str:
    """A text as one line of Markdown, in which names and values of users are no tag and no end of
    a cell."""
    return re.sub(r"<(?=[\w/!?])", r"\\<", " ".join(text.split("\n"))).replace("|", "\\|")


def table_line(values: Iterable[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(plain, values)) + " |"


def markdown_card(card: Card) -> list[str]:
    """A run's status, results and checks as Markdown."""
    status = f"{card.state}{f', {card.reason}' if card.reason else ''}"
    lines = [f"### {plain(f'{card.name}: {status}')}", "", card.sentence, ""]
    lines += [f"- {term}: {plain(text)}" for term, text in card.facts]
    lines += [plain(f"- {m.title}: {m.value}, {m.note}") for m in card.metrics]
    lines += ["", "| check | verdict | found | rule |", "| --- | --- | --- | --- |"]
    lines += [table_line((c.name, c.verdict, c.found, c.rule)) for c in card.checks]
    return [*lines, ""]


def markdown_table(table: Table) -> list[str]:
    """A table in GitHub's Markdown, notes of cells in brackets."""
    lines = [f"### {plain(table.title)}", ""] if table.title else []
    lines += [table_line(table.head), "|" + " --- |" * len(table.head)]
    for row in table.rows:
        lines.append(table_line(f"{c.value} ({c.note})" if c.note else c.value for c in row.cells))
    return [*lines, "", *(f"- {plain(note)}" for note in table.notes), ""]

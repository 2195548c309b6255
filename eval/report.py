"""A report on one or more runs: one self-contained HTML page and the same numbers as Markdown.

    python eval/report.py runs/mae runs/rmae runs/cmae --output runs/report.html

The page has its charts (SVG) and pictures (data URIs) in itself and opens without a network.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.paper.beside import paper_chapter
from eval.reporting.chapters import (
    accuracy_chapter,
    cka_chapter,
    course_chapter,
    health_chapter,
    loss_chapter,
    picture_chapter,
    settings_chapter,
)
from eval.reporting.overview import cards
from eval.reporting.page import Chapter, overview_chapter, render_html, render_markdown
from eval.reporting.run_records import Group, group_runs, read_run
from eval.shared.cli import run_command
from pipeline.errors import naming
from shard_tools.atomic import write_atomic

IMAGENET = 1281167  # training images of ImageNet-1k
AFTER_CURVES = 6  # chapters: the paper's tables follow our own


@dataclass(frozen=True)
class Settings:
    """Run folders, the page to write, its title."""

    runs: tuple[Path, ...]
    output: Path
    title: str = "Masked image modelling: report"


def parse_args(argv: list[str] | None = None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders")
    parser.add_argument(
        "--output", type=Path, help="page to write (default: report.html in the first run)"
    )
    parser.add_argument("--title", default=Settings.title)
    args = parser.parse_args(argv)
    return Settings(tuple(args.runs), args.output or args.runs[0] / "report.html", args.title)


def build_chapters(groups: Sequence[Group]) -> list[Chapter]:
    """All chapters that have something to show; the paper's tables last, unless the data are
    ImageNet's."""
    chapters = [
        overview_chapter(cards(groups)),
        picture_chapter(groups),
        loss_chapter(groups),
        health_chapter(groups),
        course_chapter(groups),
        accuracy_chapter(groups),
        cka_chapter(groups),
        settings_chapter(groups),
    ]
    runs = [run for group in groups for run in group.runs]
    imagenet = any(run.versions.get("images") == IMAGENET for run in runs)
    chapters.insert(AFTER_CURVES if imagenet else len(chapters), paper_chapter(groups))
    return [chapter for chapter in chapters if not chapter.empty]


def write_report(
    folders: Sequence[str | Path], output: str | Path, title: str, first: Sequence[Chapter] = ()
) -> tuple[Path, Path]:
    """Read the runs and write OUTPUT.html and OUTPUT.md; their paths. first: chapters before
    those of the runs; one that has the title of theirs replaces it."""
    with naming(folders[0], "cannot be read"):
        groups = group_runs([read_run(folder) for folder in folders])
    own = {chapter.title for chapter in first}
    chapters = [*first, *(s for s in build_chapters(groups) if s.title not in own)]
    page = Path(output).with_suffix(".html")
    markdown = page.with_suffix(".md")
    with naming(page, "cannot be written"):
        write_atomic(page, render_html(title, groups, chapters))
        write_atomic(markdown, render_markdown(title, chapters))
    return page, markdown


def main() -> None:
    settings = parse_args()
    page, markdown = write_report(settings.runs, settings.output, settings.title)
    print(f"report: {page} (Markdown: {markdown})")


if __name__ == "__main__":
    run_command(main)

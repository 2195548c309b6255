"""A report on one or more runs: one self-contained HTML page and the same numbers as Markdown.

    python eval/report.py runs/mae runs/rmae runs/cmae --output runs/report.html
    python eval/report.py runs/mae --watch        while it runs; the page reloads itself

The page has its charts (SVG) and pictures (data URIs) in itself and opens without a network.
"""

import argparse
import sys
import time
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
from eval.reporting.run_records import Group, group_runs, read_runs
from eval.reporting.run_status import read_status
from eval.reporting.variants import with_variants
from eval.shared.command import run_command
from eval.shared.processes import stop_on_sigterm
from pipeline.config.schema import IMAGENET_IMAGES
from pipeline.errors import UserError, naming
from pipeline.help_text import HelpFormatter
from shard_tools.atomic import check_writable, write_atomic

AFTER_CURVES = 6  # chapters: the paper's tables follow our own


@dataclass(frozen=True)
class Settings:
    """Run folders, the page to write, its title; watch: seconds between looks, 0: write once."""

    runs: tuple[Path, ...]
    output: Path
    title: str = "Masked image modelling: report"
    watch: float = 0.0


def parse_args(argv: list[str] | None = None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0], formatter_class=HelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders")
    parser.add_argument(
        "--output", type=Path, help="page to write (default: report.html in the first run)"
    )
    parser.add_argument("--title", default=Settings.title, help="heading of the page")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=30.0, metavar="SECONDS",
        help="write the page again whenever a run has changed, until Ctrl-C; the page reloads "
        "itself (default: every 30 seconds)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.watch is not None and not 1 <= args.watch < float("inf"):
        parser.error(f"--watch {args.watch:g}: at least 1 second")
    output = args.output or args.runs[0] / "report.html"
    return Settings(once(args.runs), output, args.title, args.watch or 0.0)


def once(folders: Sequence[Path]) -> tuple[Path, ...]:
    """Run folders without those that are another's by a link or another way of writing: a run is
    one seed. What is left out is said."""
    found: dict[Path, Path] = {}
    for folder in folders:
        first = found.setdefault(folder.resolve(), folder)
        if first is not folder:
            print(f"{folder}: is {first}, and counts once", file=sys.stderr)
    return tuple(found.values())


def page_of(output: str | Path) -> Path:
    """The page that --output names, whose .html or .md may be left out."""
    path = Path(output)
    named = path.suffix in (".html", ".md")
    return path.with_suffix(".html") if named else path.with_name(f"{path.name}.html")


def check_page(output: str | Path) -> None:
    """UserError where the page or its Markdown cannot be written, or the Markdown would replace a
    file that no report wrote."""
    page = page_of(output)
    markdown = page.with_suffix(".md")
    for path in (page, markdown):
        check_writable(path, advice="; choose another --output")
    if markdown.exists() and not page.exists():
        raise UserError(
            f"{markdown}: is there without {page.name}, so no report wrote it; move it away or "
            "choose another --output"
        )


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
    imagenet = any(run.versions.get("images") == IMAGENET_IMAGES for run in runs)
    chapters.insert(AFTER_CURVES if imagenet else len(chapters), paper_chapter(groups))
    return [chapter for chapter in chapters if not chapter.empty]


def write_report(
    folders: Sequence[str | Path],
    output: str | Path,
    title: str,
    first: Sequence[Chapter] = (),
    refresh: float = 0,
) -> tuple[Path, Path]:
    """Read the runs and write OUTPUT.html and OUTPUT.md; their paths. first: chapters before
    those of the runs; one that has the title of theirs replaces it. refresh: seconds after which
    the page loads itself again, 0: never."""
    with naming(folders[0], "cannot be read"):
        groups = with_variants(group_runs(read_runs(folders)))
    own = {chapter.title for chapter in first}
    chapters = [*first, *(s for s in build_chapters(groups) if s.title not in own)]
    page = page_of(output)
    markdown = page.with_suffix(".md")
    with naming(page, "cannot be written"):
        write_atomic(page, render_html(title, groups, chapters, refresh))
        write_atomic(markdown, render_markdown(title, chapters))
    return page, markdown


def state_of(folders: Sequence[Path]) -> list[object]:
    """What changes whenever a page on these runs would."""
    found: list[object] = []
    for folder in folders:
        files = [folder / name for name in ("metrics.jsonl", "log.txt", "failure.txt")]
        files += [*folder.glob("eval/*.json"), *folder.glob("pictures/*.png")]
        with naming(folder, "cannot be read"):
            stats = [(str(f), f.stat()) for f in sorted(files) if f.is_file()]
        found += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        status = read_status(folder)
        found.append((status.state, status.silent))
    return found


def watch(settings: Settings) -> None:
    """Write the page whenever a run has changed, until an interrupt; then once more, still.

    A fault in the first page ends it; a later one is said, and the next change tries again.
    """
    seen: list[object] = []
    page = page_of(settings.output)
    try:
        while True:
            now = state_of(settings.runs)
            if now != seen:
                try:
                    write_report(
                        settings.runs, settings.output, settings.title, refresh=settings.watch
                    )
                except UserError as error:
                    if not seen:
                        raise
                    print(f"warning: {error}", file=sys.stderr, flush=True)
                if not seen:
                    print(f"report: {page}, every {settings.watch:g} s; Ctrl-C ends", flush=True)
                seen = now
            time.sleep(settings.watch)
    except KeyboardInterrupt:
        write_report(settings.runs, settings.output, settings.title)
        print(f"report: {page}")


def main() -> None:
    settings = parse_args()
    check_page(settings.output)
    if settings.watch:
        stop_on_sigterm()
        watch(settings)
        return
    page, markdown = write_report(settings.runs, settings.output, settings.title)
    print(f"report: {page} (Markdown: {markdown})")


if __name__ == "__main__":
    run_command(main)

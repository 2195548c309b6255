"""A report on one or more runs: one self-contained HTML page and the same numbers as Markdown.

    python eval/report.py runs/mae runs/rmae runs/cmae --output runs/report.html

The page holds its charts (SVG) and pictures (data URIs) itself and opens without a network.
"""

import argparse
import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.paper.beside import paper_tables
from eval.reporting.charts import Line, line_chart
from eval.reporting.cka_charts import cka_charts
from eval.reporting.run_records import Group, Run, group_runs, read_run
from eval.reporting.tables import (
    Table,
    accuracy_table,
    difference_table,
    throughput_table,
    unknown_table,
    versions_table,
)
from eval.shared.cli import run_command
from pipeline.errors import UserError, naming
from shard_tools.atomic import write_atomic

TRUE_STATISTICS = (
    "predictions are patch-normalised pixels (norm_pix); the pictures give each patch its true "
    "mean and deviation back, so its brightness and contrast are not predicted."
)


# Logged beside a contrastive loss; they are not parts of it.
COSINES = ("positive", "negative")


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, its size in pixels, and what it shows."""

    data: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True)
class Detail:
    """A folded block of files, [(name, text)]."""

    title: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """A chapter of the report."""

    id: str
    title: str
    texts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    details: tuple[Detail, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.tables or self.charts or self.pictures or self.details)


def accuracy_section(groups: Sequence[Group]) -> Section:
    """What the encoders are worth, beside random ones."""
    tables = tuple(t for t in (accuracy_table(groups), unknown_table(groups)) if t)
    return Section("accuracy", "Accuracy", tables=tables)


def paper_section(groups: Sequence[Group]) -> Section:
    """Ours beside the published tables."""
    texts = (
        "The paper's figures are those of ViT-B/16 (Tab. 5: ViT-S) on ImageNet. Ours stand beside "
        "them by method; they compare only where model, data and schedule are the paper's, too.",
    )
    return Section("paper", "Beside the paper", texts, tuple(paper_tables(groups)))


def cka_section(groups: Sequence[Group]) -> Section:
    """How little the features mind dropped patches (the paper's Fig. 1)."""
    texts = (
        "Linear CKA between the features of whole images and of the same images with patches "
        "dropped. The paper's Fig. 1 finds it high for MAE, R-MAE and C-MAE even where most is "
        "dropped, and falling for supervised and MoCo v3 encoders.",
    )
    return Section("cka", "Invariance to occlusion", texts, charts=tuple(cka_charts(groups)))


def loss_section(groups: Sequence[Group]) -> Section:
    """Loss and its terms, a chart per recipe (losses of different measures do not compare)."""
    charts = []
    for number, group in enumerate(groups):
        losses: list[Line] = []
        cosines: list[Line] = []
        for seed, run in enumerate(group.runs):
            losses.append(Line(*run.series("loss"), number, "loss" if seed == 0 else ""))
            for place, term in enumerate(run.terms):
                label = term if seed == 0 else ""
                line = Line(*run.series(term), number + 1 + place, label, dashed=True)
                (cosines if term in COSINES else losses).append(line)
        if any(line.x for line in losses):
            charts.append(line_chart(losses, title=f"Loss: {group.label}", x="step", y="loss"))
        if cosines:
            title = f"Similarity of pairs: {group.label}"
            charts.append(line_chart(cosines, title=title, x="step", y="mean cosine"))
    texts = ("Solid: the loss; dashed: its parts. Runs of one recipe share a chart.",)
    return Section("loss", "Loss", texts, charts=tuple(charts))


def course_section(groups: Sequence[Group]) -> Section:
    """Learning rate, gradient norm, speed and waiting over the steps, all runs in each chart."""
    wanted = [
        ("lr", "Learning rate", ""),
        ("grad_norm", "Gradient norm", ""),
        ("images_per_second", "Throughput", "images/s"),
        ("data_wait", "Data wait", "share of the step"),
    ]
    charts = []
    for key, title, unit in wanted:
        lines = [
            Line(*run.series(key), number, group.label if seed == 0 else "")
            for number, group in enumerate(groups)
            for seed, run in enumerate(group.runs)
            if run.series(key)[0]
        ]
        if lines:
            charts.append(line_chart(lines, title=title, x="step", y=unit))
    runs = [run for group in groups for run in group.runs if run.metrics]
    tables = (throughput_table(runs),) if runs else ()
    return Section("course", "Throughput and schedule", tables=tables, charts=tuple(charts))


def picture_section(groups: Sequence[Group]) -> Section:
    """The latest reconstructions of each recipe's first run that has some."""
    pictures, names = [], []
    for group in groups:
        for run in group.runs:
            if run.pictures:
                pictures.append(read_picture(run, run.pictures[-1], group.label))
                if run.true_statistics:
                    names.append(group.label)
                break
    texts = (f"{', '.join(names)}: {TRUE_STATISTICS}",) if names else ()
    return Section("pictures", "Reconstructions and views", texts, pictures=tuple(pictures))


def read_picture(run: Run, path: Path, label: str) -> Picture:
    """A run's picture as a data URI; raises UserError for a file that is not a PNG."""
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise UserError(f"{path} is not a PNG")
    width, height = struct.unpack(">II", data[16:24])
    step = "".join(c for c in path.stem if c.isdigit()).lstrip("0") or "0"
    if run.reconstructs:
        columns = "original | masked | prediction in the hidden patches | whole prediction"
        columns += " (true patch statistics)" if run.true_statistics else ""
    else:
        columns = "original | first view | second view"
    caption = f"{label}, step {step}: {columns}"
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Picture(uri, width, height, caption)


def settings_section(groups: Sequence[Group]) -> Section:
    """Recipes, DeepSpeed configurations and versions: the differences first, then everything."""
    groups = [group for group in groups if group.pretrained]
    runs = [run for group in groups for run in group.runs]
    difference = difference_table(groups) if len(groups) > 1 else None
    tables = [t for t in (difference, versions_table(runs)) if t and t.rows]
    details = []
    for run in runs:
        recipe = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
        files = [("recipe.yaml", recipe), ("ds_config.json", json.dumps(run.ds_config, indent=1))]
        details.append(Detail(f"{run.name}: recipe and DeepSpeed configuration", tuple(files)))
    return Section("settings", "Settings", tables=tuple(tables), details=tuple(details))


def build_sections(groups: Sequence[Group]) -> list[Section]:
    """All chapters that have something to show."""
    sections = [
        accuracy_section(groups),
        paper_section(groups),
        cka_section(groups),
        picture_section(groups),
        loss_section(groups),
        course_section(groups),
        settings_section(groups),
    ]
    return [section for section in sections if not section.empty]


def render_html(title: str, groups: Sequence[Group], sections: Sequence[Section]) -> str:
    """The page as one string."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    runs = [run for group in groups for run in group.runs]
    template = environment.get_template("report.html")
    return template.render(title=title, groups=groups, runs=runs, sections=sections)


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """Texts and tables as Markdown; charts and pictures are left to the page."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for text in section.texts:
            lines += [text, ""]
        for table in section.tables:
            lines += markdown_table(table)
        for detail in section.details:
            for name, text in detail.files:
                lines += [f"{detail.title}, `{name}`:", "", "```", text.rstrip(), "```", ""]
        if section.charts or section.pictures:
            shown = len(section.charts) + len(section.pictures)
            lines += [f"({shown} charts or pictures in the HTML page)", ""]
    return "\n".join(lines)


def markdown_table(table: Table) -> list[str]:
    """A table in GitHub's Markdown, notes of cells in brackets."""

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(v.replace("|", "\\|") for v in values) + " |"

    lines = [f"### {table.title}", ""] if table.title else []
    lines += [line(table.head), "|" + " --- |" * len(table.head)]
    for row in table.rows:
        lines.append(line([f"{c.value} ({c.note})" if c.note else c.value for c in row.cells]))
    return [*lines, "", *(f"- {note}" for note in table.notes), ""]


def write_report(
    folders: Sequence[str | Path], output: str | Path, title: str, first: Sequence[Section] = ()
) -> tuple[Path, Path]:
    """Read the runs and write OUTPUT.html and OUTPUT.md; their paths. first: chapters before
    those of the runs; one that has the title of theirs stands in its place."""
    with naming(folders[0], "cannot be read"):
        groups = group_runs([read_run(folder) for folder in folders])
    own = {section.title for section in first}
    sections = [*first, *(s for s in build_sections(groups) if s.title not in own)]
    page = Path(output).with_suffix(".html")
    markdown = page.with_suffix(".md")
    with naming(page, "cannot be written"):
        write_atomic(page, render_html(title, groups, sections))
        write_atomic(markdown, render_markdown(title, sections))
    return page, markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", help="page to write (default: report.html in the first run)")
    parser.add_argument("--title", default="Masked image modelling: report")
    args = parser.parse_args()
    output = args.output or Path(args.runs[0]) / "report.html"
    page, markdown = write_report(args.runs, output, args.title)
    print(f"report: {page} (Markdown: {markdown})")


if __name__ == "__main__":
    run_command(main)

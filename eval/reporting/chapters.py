"""The chapters of a report on runs: accuracies, pictures, curves, settings."""

import base64
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import yaml

from eval.reporting.charts import Line, line_chart
from eval.reporting.cka_charts import cka_charts
from eval.reporting.page import Chapter, Detail, Picture
from eval.reporting.run_records import Group, Run
from eval.reporting.run_status import probed, read_log
from eval.reporting.tables import (
    accuracy_table,
    difference_table,
    left_out_table,
    throughput_table,
    versions_table,
)
from pipeline.errors import UserError, naming

TRUE_STATISTICS = (
    "predictions are patch-normalised pixels (norm_pix); the pictures give each patch its true "
    "mean and deviation back, so its brightness and contrast are not predicted."
)


# Logged beside a contrastive loss; they are not parts of it.
COSINES = ("positive", "negative")


def accuracy_chapter(groups: Sequence[Group]) -> Chapter:
    """What the encoders are worth, beside random ones."""
    tables = tuple(t for t in (accuracy_table(groups), left_out_table(groups)) if t)
    return Chapter("accuracy", "Accuracy", tables=tables)


def cka_chapter(groups: Sequence[Group]) -> Chapter:
    """How little the features mind dropped patches (the paper's Fig. 1)."""
    texts = (
        "Linear CKA between the features of full images and of the same images with patches "
        "dropped. The paper's Fig. 1 finds it high for MAE, R-MAE and C-MAE even where most is "
        "dropped, and falling for supervised and MoCo v3 encoders.",
    )
    return Chapter("cka", "Invariance to occlusion", texts, charts=tuple(cka_charts(groups)))


def loss_chapter(groups: Sequence[Group]) -> Chapter:
    """Loss and its terms, a chart per recipe (losses of different measures do not compare)."""
    charts = []
    for number, group in enumerate(groups):
        terms = dict.fromkeys(term for run in group.runs for term in run.terms)
        losses = course(group, "loss", number, "loss")
        cosines: list[Line] = []
        for index, term in enumerate(terms, 1):
            lines = course(group, term, number + index, term, dashed=True)
            (cosines if term in COSINES else losses).extend(lines)
        if any(line.x for line in losses):
            charts.append(line_chart(losses, title=f"Loss: {group.label}", x="step", y="loss"))
        if cosines:
            title = f"Similarity of pairs: {group.label}"
            charts.append(line_chart(cosines, title=title, x="step", y="mean cosine"))
    texts = (
        "Solid: the loss; dashed: its parts. Of several seeds the mean; the band is their range.",
    )
    return Chapter("loss", "Loss", texts, charts=tuple(charts))


def course(group: Group, key: str, colour: int, label: str, *, dashed: bool = False) -> list[Line]:
    """The curve of a logged quantity over a group's seeds; none where it is not logged."""
    return banded([run.series(key) for run in group.runs], colour, label, dashed=dashed)


def banded(
    series: Sequence[tuple[list[float], list[float]]], colour: int, label: str, *,
    dashed: bool = False,
) -> list[Line]:  # fmt: skip
    """One line through the means of several (steps, values) at the steps that they share, with
    their range as a band; a line each where they share fewer than two."""
    shown = [dict(zip(x, y, strict=True)) for x, y in series if x]
    if not shown:
        return []
    steps = sorted(set.intersection(*(set(s) for s in shown)))
    if len(shown) == 1 or len(steps) < 2:
        return [
            Line(list(s), list(s.values()), colour, "" if n else label, dashed=dashed)
            for n, s in enumerate(shown)
        ]
    values = [[s[step] for s in shown] for step in steps]
    band = ([min(v) for v in values], [max(v) for v in values])
    return [Line(steps, [mean(v) for v in values], colour, label, dashed=dashed, band=band)]


def overlaid(groups: Sequence[Group], wanted: Sequence[tuple[str, str, str]]) -> list[str]:
    """A chart per logged quantity (key, title, unit) with a curve per group."""
    charts = []
    for key, title, unit in wanted:
        lines = [
            line
            for number, group in enumerate(groups)
            for line in course(group, key, number, group.label)
        ]
        if lines:
            charts.append(line_chart(lines, title=title, x="step", y=unit))
    return charts


def health_chapter(groups: Sequence[Group]) -> Chapter:
    """What distinguishes a sick run from a healthy one, and the probes made while it trained."""
    charts = overlaid(
        groups,
        [
            ("feature_std", "Spread of the features", "1: even, 0: collapsed"),
            ("grad_norm", "Gradient norm", ""),
            ("teacher_distance", "Distance of the teacher", "relative"),
        ],
    )
    probes = [[probed(read_log(run.folder)) for run in group.runs] for group in groups]
    names = dict.fromkeys(name for group in probes for run in group for name in run)
    for name in names:
        lines = [
            line
            for number, (group, runs) in enumerate(zip(groups, probes, strict=True))
            for line in banded([run[name] for run in runs if name in run], number, group.label)
        ]
        charts.append(line_chart(lines, title=f"Online probe: {name}", x="step", y=name))
    return Chapter("health", "Health", charts=tuple(charts))


def course_chapter(groups: Sequence[Group]) -> Chapter:
    """Learning rate, speed and waiting over the steps, all runs in each chart."""
    wanted = [
        ("lr", "Learning rate", ""),
        ("lr_first_layer", "Learning rate of the embeddings", ""),
        ("image_size", "Size of the images", "pixels"),
        ("images_per_second", "Throughput", "images/s"),
        ("mfu", "Model FLOPs utilisation", "share of the peak"),
        ("data_wait", "Data wait", "share of the step"),
    ]
    runs = [run for group in groups for run in group.runs if run.metrics]
    tables = (throughput_table(runs),) if runs else ()
    charts = tuple(overlaid(groups, wanted))
    return Chapter("course", "Throughput and schedule", tables=tables, charts=charts)


def picture_chapter(groups: Sequence[Group]) -> Chapter:
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
    return Chapter("pictures", "Reconstructions and views", texts, pictures=tuple(pictures))


def read_picture(run: Run, path: Path, label: str) -> Picture:
    """A run's picture with a caption; raises UserError for a file that is not a PNG."""
    step = "".join(c for c in path.stem if c.isdigit()).lstrip("0") or "0"
    if run.reconstructs:
        columns = "original | masked | prediction of the masked patches | full prediction"
        columns += " (true patch statistics)" if run.true_statistics else ""
    else:
        columns = "original | first view | second view"
    caption = f"{label}, step {step}: {columns}"
    return picture_of(path, caption)


def picture_of(path: Path, caption: str) -> Picture:
    """A file as a data URI; raises UserError for one that is not a PNG."""
    with naming(path, "cannot be read"):
        data = path.read_bytes()
    width = height = 0
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
    if not width or not height:
        raise UserError(f"{path} is not a PNG")
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Picture(uri, width, height, caption)


def settings_chapter(groups: Sequence[Group]) -> Chapter:
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
    return Chapter("settings", "Settings", tables=tuple(tables), details=tuple(details))

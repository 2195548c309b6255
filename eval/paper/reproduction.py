"""What the commands that make the paper's rows share: options, rows, and results beside the
paper's."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from eval.paper.beside import feature_note
from eval.paper.commands import Workspace, read_scale, row_recipe, run_name
from eval.paper.job_runner import Command, needed, run_commands, show_plan
from eval.paper.made_with import check_recipes, claim_output, made_with
from eval.paper.published import PaperRow, PaperTable, read_paper
from eval.protocols import by_key, headings, keys
from eval.reporting.run_records import metric_in, read_result, with_beside
from eval.reporting.tables import FEATURE_NAMES, NONE, UNMEASURED, Cell, Row, Table, spread_text
from eval.shared.demo_shards import make_demo_shards
from pipeline.errors import UserError, check_range
from pipeline.method.checks import check_objective
from pipeline.runtime.settings import total_steps
from shard_tools.atomic import check_writable
from shard_tools.cli import counted, read_list
from shard_tools.cores import cores
from shard_tools.manifest import read_manifest
from shard_tools.subset import Choice, choose_samples


@dataclass(frozen=True)
class Options:
    """What every reproduction is told: workspace, seeds 0 … seeds - 1, commands side by side,
    protocols beside a row's own, whether only the plan is wanted."""

    workspace: Workspace
    seeds: int
    jobs: int
    also: tuple[str, ...] = ()
    dry_run: bool = False


TRAIN, VAL = 4096, 1024  # crops of the demo's photographs
CROPS = 80  # pixels of the demo's photographs, as the small scales have them


def add_options(parser: argparse.ArgumentParser, output: str = "runs/reproduce-<scale>") -> None:
    """The command-line options of `Options`; output: where the runs go, as the help has it."""
    add = parser.add_argument
    add("--seeds", type=int, default=1, help="run seeds 0 … N - 1")
    add("--output", type=Path, help=f"folder of the runs (default: {output})")
    add("--train", default="", help="training shards (default: the scale's)")
    add("--val", default="", help="validation shards (default: the scale's)")
    add("--classes", default=Workspace.classes, help="list of Tab. 5's classes, full scale")
    add("--few-labels", type=Path, metavar="FILE",
        help="names of the images with labels in few-shot finetuning, such as SimCLR's "
        "10percent.txt (default: a tenth is drawn)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe, last")
    add("--jobs", type=int, default=0, help="commands side by side (default: cores, or 1 on GPUs)")
    add("--also", nargs="+", default=[], choices=keys(), metavar="PROTOCOL",
        help="evaluate every row by these too: %(choices)s")  # fmt: skip
    add("--dry-run", action="store_true",
        help="print the plan and its cost, train nothing; the miniature's demo shards, which the "
        "plan reads, are made if they are missing")  # fmt: skip


def read_options(args: argparse.Namespace, scale_name: str) -> Options:
    """The options as values; UserError for one that cannot be."""
    check_range("--seeds", args.seeds, at_least=1)
    check_range("--jobs", args.jobs, at_least=0)
    for text in args.set:
        if text.partition("=")[0] == "seed":
            raise UserError(f"--set {text}: seeds are what --seeds N says")
    scale = replace(read_scale(scale_name, args.train, args.val), last=tuple(args.set))
    jobs = args.jobs or (1 if scale.launch != "python" else cores())
    output = args.output or Path(f"runs/reproduce-{scale.name}")
    if args.few_labels is not None:
        if not args.few_labels.is_file():
            raise UserError(f"--few-labels {args.few_labels}: no such file")
        if not read_list(args.few_labels):
            raise UserError(f"--few-labels {args.few_labels}: lists no image")
    workspace = Workspace(
        output,
        scale,
        args.classes,
        demo=not (args.train or args.val),
        few_labels=str(args.few_labels or ""),
    )
    return Options(workspace, args.seeds, jobs, tuple(args.also), args.dry_run)


def check_rows(options: Options, rows: Sequence[tuple[PaperRow, Sequence[str]]]) -> None:
    """UserError for what would end a reproduction of rows, each with its protocols, after its data
    were built, or its first runs; and for an option that none of them takes."""
    workspace = options.workspace
    listed = workspace.scale.name == "full" and any(row.classes is not None for row, _ in rows)
    if workspace.classes != Workspace.classes and not listed:
        raise UserError(
            f"--classes {workspace.classes}: no row here takes a list of classes, only those of "
            "Tab. 5 at --scale full do; leave it out"
        )
    few = any(by_key(protocol).fraction < 1 for _, protocols in rows for protocol in protocols)
    if workspace.few_labels and not few:
        raise UserError(
            f"--few-labels {workspace.few_labels}: no row here is finetuned on few labels "
            "(--also fewshot); leave it out"
        )
    if not options.dry_run:
        check_writable(workspace.output, folder=True, advice="; choose another --output")
    chosen, pretrained = set(), []
    for row, _ in rows:
        check_objective(row_recipe(workspace, row))
        if row.recipe not in (None, "supervised") and row.initial != "random":
            pretrained.append(row)
        if row.classes is not None and workspace.scale.name == "full":
            chosen.add(Choice(classes=Path(workspace.classes)))
    if workspace.few_labels:
        chosen.add(Choice(names=Path(workspace.few_labels)))
    for choice in chosen if not builds_data(workspace) else ():
        choose_samples(read_manifest(workspace.scale.train), choice)
    train = workspace.scale.train
    samples = TRAIN if builds_data(workspace) else read_manifest(train).samples
    for row in pretrained:
        total_steps(train, samples, row_recipe(workspace, row))


def builds_data(workspace: Workspace) -> bool:
    """Whether the data are the demo's: the miniature's, where it was given no others."""
    return workspace.demo and workspace.scale.name == "mini"


def prepare_data(workspace: Workspace) -> None:
    """Build the demo's shards for the miniature where it was given no others."""
    if builds_data(workspace):
        data = Path(workspace.scale.train).parent.parent
        make_demo_shards(data, train=TRAIN, val=VAL, size=CROPS)


def run_jobs(
    options: Options, rows: Sequence[tuple[PaperRow, Sequence[str]]], jobs: Sequence[Command]
) -> None:
    """Run the jobs of rows, each with its protocols, or print them (--dry-run). UserError where
    OUTPUT was made with other settings."""
    output = options.workspace.output
    claim_output(output, made_with(options.workspace, rows), write=not options.dry_run)
    check_recipes(jobs)
    if options.dry_run:
        for line in show_plan(needed(jobs)):
            print(line, flush=True)
    else:
        run_commands(needed(jobs), options.jobs, output)


@cache
def known_tables() -> dict[int, PaperTable]:
    """The paper's tables by number."""
    return {table.number: table for table in read_paper()}


def find_table(number: int) -> PaperTable:
    """A table of paper.yaml by its number."""
    tables = known_tables()
    if number not in tables:
        raise UserError(f"--table {number}: the paper's tables are {', '.join(map(str, tables))}")
    return tables[number]


def choose_rows(table: PaperTable, names: Sequence[str] | None) -> list[PaperRow]:
    """The rows to run, those cited from other papers left out."""
    known = {row.name: row for row in table.rows if row.recipe or row.initial}
    for name in names or ():
        if name not in known:
            listed = "; ".join(known)
            raise UserError(f"--rows {name!r}: rows of table {table.number} are: {listed}")
    return [known[name] for name in names or known]


def published_anywhere(row: PaperRow) -> dict[str, float]:
    """The metrics that the paper gives a row, those of its other tables too."""
    others = [other for known in known_tables().values() for other in known.rows]
    same = [o for o in others if (o.recipe or o.initial) and run_name(o, 0) == run_name(row, 0)]
    return {metric: value for o in same for metric, value in o.published.items()}


def published_row(number: int, name: str) -> PaperRow:
    """A row of a table, with the metrics that the paper gives it anywhere."""
    row = choose_rows(find_table(number), [name])[0]
    return replace(row, published=published_anywhere(row))


def columns_of(table: PaperTable, row: PaperRow) -> list[str]:
    """The metrics that a row is given: the published ones."""
    return [name for name in table.columns if name in row.published]


def result_path(workspace: Workspace, row: PaperRow, seed: int, protocol: str) -> Path:
    """The result file of a row and seed under a protocol."""
    return workspace.output / run_name(row, seed) / "eval" / f"{protocol}.json"


def our_result(workspace: Workspace, row: PaperRow, seed: int, protocol: str) -> float | None:
    """Our result of a row and seed, None where its file is not there."""
    return metric_in(result_path(workspace, row, seed, protocol), protocol)


def by_feature(
    workspace: Workspace, row: PaperRow, seeds: int, protocol: str
) -> dict[str, list[float]]:
    """Our results of a row over the seeds by the feature that they read, the chosen one first."""
    found: dict[str, list[float]] = {}
    metric = by_key(protocol).metric
    for path in (result_path(workspace, row, seed, protocol) for seed in range(seeds)):
        for result in with_beside(read_result(path)) if path.is_file() else ():
            found.setdefault(str(result.get("feature")), []).append(float(result[metric]))
    return found


def beside(
    title: str, rows: Sequence[tuple[PaperRow, Sequence[str]]], workspace: Workspace, seeds: int
) -> Table:
    """Rows with some of their metrics: the paper's, and ours as mean ± deviation over seeds; how
    many of them, where it is not all."""
    titles = headings()
    columns = [c for c in titles if any(c in wanted for _, wanted in rows)]
    head = ["row"] + [text for c in columns for text in (f"{titles[c]}: paper", "ours")]
    lines = []
    for row, wanted in rows:
        cells = [Cell(row.name)]
        for column in columns:
            published = Cell(str(row.published.get(column, NONE)))
            if column not in wanted:
                cells += [published, Cell(NONE)]
                continue
            results = [our_result(workspace, row, seed, column) for seed in range(seeds)]
            found = [value for value in results if value is not None]
            _, *others = by_feature(workspace, row, seeds, column).items() or [("", [])]
            small = [f"{FEATURE_NAMES[f]} {spread_text(v)}" for f, v in others]
            small += [f"{len(found)} of {seeds} seeds"] if 0 < len(found) < seeds else []
            ours = spread_text(found) if found else UNMEASURED
            cells += [published, Cell(ours, "; ".join(small))]
        lines.append(Row(tuple(cells), baseline=row.initial == "random"))
    facts = f"scale {workspace.scale.name}, {counted(seeds, 'seed')}"
    notes = [
        f"Ours: {facts}; ± is the sample standard deviation over seeds, and a number without it is "
        f"of one seed. {NONE}: not of this row."
    ]
    if any(c == "psnr" for c in columns):
        notes.append(
            "PSNR: with the true mean and deviation of each patch where the recipe predicts "
            "patch-normalised pixels."
        )
    probed = {row.name: list(by_feature(workspace, row, seeds, "linprobe")) for row, _ in rows}
    chosen = [features[0] for features in probed.values() if features]
    notes += [feature_note(chosen)] if "linprobe" in columns and chosen else []
    notes += [f"{row.name}: {row.caveat}." for row, _ in rows if row.caveat]
    return Table(tuple(head), tuple(lines), title, tuple(notes))


def run_folders(workspace: Workspace, jobs: Sequence[Command]) -> list[Path]:
    """The run folders that the commands have made, in their order."""
    folders = [
        job.makes.parent.parent for job in jobs if job.makes.parent.name in ("eval", "encoder")
    ]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]

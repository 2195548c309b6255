"""The paper's claims on CIFAR-10: rates tuned, rows made, claims judged, over several sittings.

    make paper-cifar CIFAR10=PATH CIFAR=--dry-run     what it would run, and its measured cost
    make paper-cifar CIFAR10=PATH
    make paper-cifar-page                             the page from the archive, without the runs

Every command is skipped where its result is there, and resumes where it was cut off: Ctrl-C ends a
sitting, the same command begins the next; on another machine CIFAR=--restore begins it, from the
archive. What does not fit into --hours on this machine's cores is left out, and said. Writes
OUTPUT/report.html and report.md and, with --archive, the file of which the page can be rebuilt; the
last line printed is {"claims": {"1": true, …}}.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from eval.paper.commands import Workspace, read_scale, row_recipe
from eval.paper.cost import Rates
from eval.paper.job_runner import run_commands
from eval.paper.made_with import check_recipes
from eval.report import write_report
from eval.reporting.page import markdown_table
from eval.shared.cifar_shards import DONE, make_cifar_shards
from eval.shared.command import run_command
from eval.shared.processes import stop_on_sigterm
from eval.studies.archive import laid_out, made_runs, pack, unpacked
from eval.studies.cifar_claims import ALL, NAMES, cifar_row, claims_of
from eval.studies.cifar_page import FACTS, Facts, chapters, read_facts
from eval.studies.cifar_plan import (
    RECORD,
    Plan,
    Settings,
    archived_record,
    check_restored,
    claim_output,
    is_restored,
    make_plan,
    note_times,
    read_record,
    restore_output,
    show,
    spent,
    study_of,
    times_kept,
    tuning_of,
    unit,
)
from eval.studies.study import Study, wanted_metrics
from pipeline.command import check_unused
from pipeline.config.recipe import read_override
from pipeline.config.texts import flatten
from pipeline.errors import UserError, check_range, naming
from pipeline.help_text import HelpFormatter
from pipeline.method.checks import check_objective
from pipeline.runtime.run_lock import RunLock
from shard_tools.atomic import check_writable, write_json
from shard_tools.cores import cores

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = ROOT / "docs" / "page" / "cifar10.tar.xz"
CHOSEN = ("optimizer.epochs", "seed")  # keys of a recipe that every row has its own values of


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0],
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    numbers = sorted(claim.number for claim in ALL)
    add("--cifar10", type=Path, metavar="PATH",
        help="an ImageFolder (or zip or tar of one) with train and test, or the official python or "
        "binary archive; needed once")  # fmt: skip
    add("--scale", default="cifar", help="cifar, cifar-gpu: see eval/paper/scales.yaml")
    add("--claims", type=int, nargs="+", choices=numbers, default=numbers, metavar="N",
        help="which of the claims")  # fmt: skip
    add("--seeds", type=int, default=3, help="run seeds 0 … N - 1")
    add("--data", type=Path, help="folder of the shards (default: that of the scale)")
    add("--output", type=Path, help="folder of the runs (default: runs/paper-<scale>)")
    add("--hours", type=float, help="of this machine in total; 0: no limit (default: the scale's)")
    add("--jobs", type=int, default=0, help="commands side by side (default: cores, or 1 on GPUs)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe, last")
    add("--untuned", action="store_true", help="tune no learning rates: every row has the scale's")
    add("--extend-tuning", action="store_true",
        help="if a method's best rate is the lowest or highest of those tried, try one beyond it; "
        "a study begun without this option only reports the result")  # fmt: skip
    add("--archive", type=Path, nargs="?", const=ARCHIVE, help="write the archive of the page")
    add("--restore", type=Path, nargs="?", const=ARCHIVE, metavar="ARCHIVE",
        help="first unpack an archive into OUTPUT; its results count as done, and what a missing "
        "result needs is pretrained from scratch")  # fmt: skip
    add("--dry-run", action="store_true", help="print the plan and its measured cost, run nothing")
    add("--page", type=Path, nargs="?", const=ARCHIVE, metavar="ARCHIVE",
        help="rebuild the page from an archive, beside it, and run nothing")  # fmt: skip
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that a command line names. UserError for values that cannot be."""
    check_range("--seeds", args.seeds, at_least=1)
    check_range("--jobs", args.jobs, at_least=0)
    check_range("--hours", args.hours, at_least=0)
    if args.untuned and args.extend_tuning:
        raise UserError("--extend-tuning: nothing to extend with --untuned; leave one out")
    for text in args.set:
        for key in map(str.strip, flatten(read_override(text))):
            if key in CHOSEN or (key == "optimizer.base_lr" and not args.untuned):
                raise UserError(
                    f"--set {text}: the study chooses {key} itself, for each method or row"
                    + (" (with --untuned it does not)" if key not in CHOSEN else "")
                )
    scale = replace(read_scale(args.scale), last=tuple(args.set))
    if not scale.tune:
        raise UserError(f"--scale {args.scale}: has no rates to tune; take cifar or cifar-gpu")
    return Settings(
        claims=tuple(args.claims),
        scale=scale,
        source=args.cifar10,
        data=args.data or Path(scale.train).parent.parent,
        output=args.output or Path(f"runs/paper-{scale.name}"),
        seeds=args.seeds,
        jobs=args.jobs or (1 if scale.launch != "python" else cores()),
        hours=(scale.hours or 0) if args.hours is None else args.hours,
        archive=args.archive,
        dry_run=args.dry_run,
        tuned=not args.untuned,
        extended=args.extend_tuning,
        restored=args.restore,
    )


def cifar_paper(settings: Settings) -> None:
    """Plan, tune, run, judge, write; prints the claims last."""
    check(settings)
    make_cifar_shards(settings.source, settings.data)
    if settings.dry_run:
        dry_run(settings)
        return
    if settings.restored:
        restore_output(settings, settings.restored)
    record = claim_output(settings)
    lock = RunLock(settings.output, needed=False)
    try:
        study, plan = make_rows(settings, record["compute"])
        report(settings, study, plan)
    finally:
        lock.release()


def dry_run(settings: Settings) -> None:
    """Print the plan. Of a study that an archive would begin, without making OUTPUT of it."""
    if settings.restored and not is_restored(settings, settings.restored):
        check_restored(settings, settings.restored)
        with unpacked(settings.restored) as folder:
            lines = planned(replace(settings, output=folder))
        print(lines.replace(str(folder), str(settings.output)), flush=True)
    else:
        print(planned(settings), flush=True)


def planned(settings: Settings) -> str:
    """The plan in lines."""
    plan = make_plan(settings, rates_of(settings))
    check_recipes(plan.jobs)
    return "\n".join(show(settings, plan))


def rates_of(settings: Settings) -> Rates:
    """What commands cost here, kept in OUTPUT."""
    return Rates(settings.output / "rates.json", str(settings.data / "shards" / "train"))


def make_rows(settings: Settings, compute: float) -> tuple[Study, Plan]:
    """Tune and run what fits into the hours; the study and what was planned last.

    UserError where there is no result at all; where the rates of some methods are not tuned, no row
    is made, and it is said.
    """
    rates, tuning = rates_of(settings), tuning_of(settings)
    plan, tuned = make_plan(settings, rates), True
    check_recipes(plan.jobs)
    for stage in (0, 0, 1, 1) if tuning.extend else (0, 1):  # the second time beyond the grid
        tuned = len(plan.stage(stage)) == len(plan.stages[stage])
        if not tuned:
            break
        run_commands(plan.stage(stage), settings.jobs, settings.output, trials=True)
        tuning.write()
        plan = make_plan(settings, rates)  # with what was found
    times = times_kept(settings, rates)
    if tuned:
        note_times(settings, times)
        run_commands(plan.stage(2), settings.jobs, settings.output)
    too_few = f"--hours {settings.hours:g}: too few"
    if not made_runs(settings.output):
        what = "for any row" if tuned else "to tune the learning rates"
        raise UserError(f"{too_few} {what}; see --dry-run")
    if not tuned:
        print(f"{too_few} to tune the learning rates, so the report has what is there", flush=True)
    return study_of(settings.workspace, settings.claims, settings.seeds, compute, times), plan


def report(settings: Settings, study: Study, plan: Plan) -> None:
    """Write the page and, where it is asked for, the archive; prints the claims last."""
    tables, facts = study.tables(), note_facts(settings, plan)
    with laid_out(settings.output) as kept:
        shown = replace(study, workspace=replace(study.workspace, output=kept))
        page = write_page(shown, facts, settings.output / "report.html")
    for table in tables:
        print("\n".join(markdown_table(table)))
    if settings.archive:
        size = pack(settings.output, settings.archive)
        print(f"archive: {settings.archive}, {size:,} bytes")
    print(f"{facts.seconds:.0f} CPU seconds; report: {page}")
    print(json.dumps({"claims": study.verdicts()}), flush=True)


def check(settings: Settings) -> None:
    """UserError for what would end a sitting after the shards were built, or at its end."""
    for name in wanted_metrics(claims_of(settings.claims), NAMES):
        check_objective(row_recipe(settings.workspace, cifar_row(name, {}, {}, 1)))
    if not (settings.data / DONE).is_file():
        check_writable(settings.data, folder=True, advice="; choose another --data")
    if settings.restored:
        is_restored(settings, settings.restored)
        archived_record(settings.restored)
    if settings.dry_run:
        if settings.archive:
            raise UserError("--archive: --dry-run writes nothing; leave one of them out")
        return
    check_writable(settings.output, folder=True, advice="; choose another --output")
    if settings.archive:
        check_writable(settings.archive, advice="; choose another --archive")


def write_page(study: Study, facts: Facts, page: Path) -> Path:
    """Write PAGE.html and PAGE.md; the former."""
    folders = made_runs(study.workspace.output)
    first = chapters(study, facts)
    return write_report(folders, page, "The paper's claims on CIFAR-10", first)[0]


def note_facts(settings: Settings, plan: Plan) -> Facts:
    """What was judged, spent and left out; kept in OUTPUT/facts.json for the archive."""
    left = tuple(job.name for job in plan.jobs if not job.done)
    facts = Facts(settings.claims, settings.seeds, spent(settings), unit(settings.scale), left)
    path = settings.output / FACTS
    with naming(path, "cannot be written"):
        write_json(path, asdict(facts))
    return facts


def archived_study(output: Path) -> tuple[Study, Facts]:
    """The study of an unpacked archive, and what was done of it. UserError where it is none."""
    record, facts = read_record(output / RECORD), read_facts(output / FACTS)
    known = {claim.number for claim in ALL}
    if not set(facts.claims) <= known or facts.seeds < 1:
        raise UserError(f"{FACTS}: names claims that there are not, or no seeds")
    scale = replace(read_scale(record["scale"]["name"]), last=tuple(record["scale"]["last"]))
    workspace = Workspace(output, scale)
    compute, times = record["compute"], record["times"]
    return study_of(workspace, facts.claims, facts.seeds, compute, times), facts


def rebuild(archive: Path) -> None:
    """Rebuild the page of an archive, beside it; prints the claims last."""
    if not archive.is_file():
        raise UserError(f"{archive}: no such file; `--archive` of a finished run writes it")
    page = archive.with_name(f"{archive.name.split('.tar', 1)[0]}.html")
    check_writable(page)
    archived_record(archive)
    with unpacked(archive) as output:
        study, facts = archived_study(output)
        write_page(study, facts, page)
        print(f"report: {page}")
        print(json.dumps({"claims": study.verdicts()}), flush=True)


def main() -> None:
    stop_on_sigterm()
    parser = build_parser()
    args = parser.parse_args()
    if args.page:
        check_unused(parser, args, vars(args).keys() - {"page"}, "with --page")
        rebuild(args.page)
    else:
        cifar_paper(settings_of(args))


if __name__ == "__main__":
    run_command(main)

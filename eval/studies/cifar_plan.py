"""The plan of eval/cifar_paper.py: tuning, rows, what they cost, and what fits into the hours."""

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from eval.paper.commands import ROOT, Scale, Workspace, row_jobs, row_recipe, run_name
from eval.paper.cost import Rates, within
from eval.paper.job_runner import Command, costs, needed, python, unique
from eval.paper.made_with import portable
from eval.shared.labels import IMAGES, images_of, set_of
from eval.studies.archive import LOOK, PCA, check_empty, restore, unpacked
from eval.studies.cifar_claims import (
    AS_LONG,
    METHODS,
    NAMES,
    QUICKER,
    cifar_row,
    claims_of,
    method_of,
    plain,
)
from eval.studies.study import Study, wanted_metrics
from eval.studies.tuning import Tuning, best, read_trials
from pipeline.config.schema import EncoderRecipe
from pipeline.errors import UserError, check_range, naming
from shard_tools.atomic import write_json
from shard_tools.cores import cores
from shard_tools.manifest import read_manifest

RECORD = "study.json"
TESTED = "test_images"
LATER = (TESTED, *IMAGES.values())  # keys of RECORD that earlier ones have not
SHOWN = ("MAE", "R-MAE", "C-MAE")  # whose patches are drawn


@dataclass(frozen=True)
class Settings:
    """What to do: claims to judge, on seeds 0 … seeds - 1, at a scale, on the shards in `data`, of
    a source of CIFAR-10 (None: they are there); jobs: commands side by side; hours: of this machine
    in all (0: no limit); archive: where to write it (None: nowhere); tuned: learning rates are
    chosen first; extended: also among rates beyond the grid, see tuning; restored: the archive that
    OUTPUT is made of first."""

    claims: tuple[int, ...]
    scale: Scale
    source: Path | None
    data: Path
    output: Path
    seeds: int
    jobs: int
    hours: float
    archive: Path | None = None
    dry_run: bool = False
    tuned: bool = True
    extended: bool = False
    restored: Path | None = None

    @property
    def workspace(self) -> Workspace:
        shards = self.data / "shards"
        scale = replace(self.scale, train=str(shards / "train"), val=str(shards / "val"))
        return Workspace(self.output, scale)


@dataclass(frozen=True)
class Plan:
    """Jobs in their order: trials of the pretraining rates, of the finetuning rates, rows of the
    claims; seconds of each on one core or GPU, 0 where it is done. kept: those that fit into the
    hours; left: those that do not."""

    stages: tuple[tuple[Command, ...], ...]
    seconds: dict[str, float]
    kept: tuple[Command, ...]
    left: tuple[Command, ...]

    @property
    def jobs(self) -> list[Command]:
        """All of them, each once."""
        return unique([job for stage in self.stages for job in stage])

    def stage(self, number: int) -> list[Command]:
        """The jobs of a stage that fit."""
        names = {job.name for job in self.kept}
        return [job for job in self.stages[number] if job.name in names]


def tuning_of(settings: Settings) -> Tuning:
    """How the methods of the claims are tuned; none of them where rates are not to be chosen."""
    shards = settings.data / "shards"
    claims = claims_of(settings.claims)
    methods = {method_of(name) for name in wanted_metrics(claims, NAMES)}
    tuned = METHODS if settings.tuned else ()
    rows = {method: cifar_row(method, {}, {}, 1) for method in tuned if method in methods}
    path = settings.output / RECORD
    begun = read_record(path).get("extended", False) if path.is_file() else None
    return Tuning(
        settings.workspace, str(shards / "tune-train"), str(shards / "tune-val"), rows,
        extend=settings.extended or bool(begun), late=begun is False,
    )  # fmt: skip


def study_of(
    workspace: Workspace,
    numbers: Sequence[int],
    seeds: int,
    compute: float,
    times: Mapping[str, float] | None = None,
) -> Study:
    """The claims of these numbers, with the rates that OUTPUT/tuning.json has chosen. compute,
    times: see cifar_row."""
    trials = read_trials(workspace.output / "tuning.json")
    base_lr, finetune_lr = best(trials, "pretrain"), best(trials, "finetune")

    def row(name: str) -> Any:
        return cifar_row(name, base_lr, finetune_lr, compute, times)

    return Study(workspace, claims_of(numbers), seeds, NAMES, row, corrected=True)


def compute_of(workspace: Workspace) -> float:
    """What MAE's pretraining and finetuning cost together, in finetunings (FLOPs)."""
    jobs = row_jobs(workspace, cifar_row("MAE", {}, {}, 1), 0, ["finetune"])
    flops = {job.name.rsplit(" ", 1)[-1]: job.flops for job in jobs}
    return round(1 + flops["pretrain"] / flops["finetune"], 4)


def claim_output(settings: Settings) -> dict[str, Any]:
    """Note in OUTPUT/study.json what its runs were made with; the note.

    UserError where it was made with other settings, whose runs would pass for these.
    """
    path = settings.output / RECORD
    if path.is_file():
        before = read_record(path)
        if others := differences(before, settings):
            raise UserError(
                f"{settings.output}: was made with another {', '.join(others)}; choose another "
                "--output"
            )
        return before
    record = made_with(settings) | {"compute": compute_of(settings.workspace), "times": {}}
    if settings.extended:  # from the beginning, so that rates beyond the grid may be chosen
        record["extended"] = True
    with naming(path, "cannot be written"):
        write_json(path, record)
    return record


def made_with(settings: Settings) -> dict[str, Any]:
    """What a study's runs are made with, but for their recipes, see check_recipes."""
    scale = settings.workspace.scale
    made = asdict(replace(scale, train="", val="", hours=None, tried=""))
    train, val = read_manifest(scale.train), read_manifest(scale.val)
    return {
        "scale": portable(made),
        "images": train.index_sha256,
        TESTED: val.index_sha256,
        **images_of(train, val),
        "tuned": settings.tuned,
    }


def differences(record: dict[str, Any], settings: Settings) -> list[str]:
    """What a study of this record was made with otherwise."""
    ours = made_with(settings)
    others = [
        {"train": "images", "val": TESTED}.get(set_of(key), key)
        for key in ours
        if recorded(record, key) != recorded(ours, key) and (key not in LATER or key in record)
    ]
    return list(dict.fromkeys(others))


def recorded(record: dict[str, Any], key: str) -> Any:
    """A value of a record; of a scale what is not empty, since older records lack newer keys."""
    value = portable(record.get(key))
    return {k: v for k, v in value.items() if v} if key == "scale" and value else value


def archived_record(archive: Path) -> dict[str, Any]:
    """The study.json in an archive. UserError where it is of no study."""
    with unpacked(archive) as folder:
        if (folder / RECORD).is_file():
            return read_record(folder / RECORD)
    raise UserError(f"{archive}: has no {RECORD}, so it is not of eval/cifar_paper.py")


def check_restored(settings: Settings, archive: Path) -> None:
    """UserError where an archive's study was made with other settings."""
    if others := differences(archived_record(archive), settings):
        raise UserError(f"--restore {archive}: was made with another {', '.join(others)}")


def is_restored(settings: Settings, archive: Path) -> bool:
    """Whether OUTPUT has the study of an archive already. UserError where it has another, or
    something else."""
    path = settings.output / RECORD
    if path.is_file():
        ours, theirs = read_record(path), archived_record(archive)
        same = ("scale", "images", "tuned", "compute")
        if all(recorded(ours, key) == recorded(theirs, key) for key in same):
            return True
    check_empty(settings.output)
    return False


def restore_output(settings: Settings, archive: Path) -> None:
    """Make OUTPUT of an archive, where it has not its study already. UserError where the study was
    made with other settings."""
    check_restored(settings, archive)
    if is_restored(settings, archive):
        print(f"{settings.output}: has the study of {archive} already, and continues it")
    else:
        restore(archive, settings.output)


def compute_kept(settings: Settings) -> float:
    """OUTPUT/study.json's compute where it is there, so that later code, of other operations, makes
    the same rows; else compute_of."""
    path = settings.output / RECORD
    return read_record(path)["compute"] if path.is_file() else compute_of(settings.workspace)


def times_kept(settings: Settings, rates: Rates) -> dict[str, float]:
    """ROAD → how many of its steps take as long as one of its method: OUTPUT/study.json's where
    they are there, else as measured on this machine; none where no claim needs them."""
    path = settings.output / RECORD
    if path.is_file() and (times := read_record(path)["times"]):
        return dict(times)
    wanted = wanted_metrics(claims_of(settings.claims), NAMES)

    def seconds(name: str) -> float:
        row = cifar_row(name, {}, {}, 1)
        return rates.of_pretraining(row_recipe(settings.workspace, row))

    return {
        road: max(1.0, round(seconds(plain(road)) / seconds(road), 2))
        for road in QUICKER
        if f"{road}{AS_LONG}" in wanted
    }


def note_times(settings: Settings, times: Mapping[str, float]) -> None:
    """Keep times in OUTPUT/study.json, where they stay."""
    path = settings.output / RECORD
    record = read_record(path)
    if times and times != record["times"]:
        with naming(path, "cannot be written"):
            write_json(path, record | {"times": dict(times)})


def read_record(path: Path) -> dict[str, Any]:
    """An OUTPUT/study.json. UserError where it is none."""
    with naming(path, "cannot be read"):
        text = path.read_bytes()
    try:
        record = json.loads(text)
        times = {str(road): float(n) for road, n in record.get("times", {}).items()}
        scale = {"name": str(record["scale"]["name"]), "last": list(record["scale"]["last"])}
        compute = float(record["compute"])
        record |= {"scale": record["scale"] | scale, "compute": compute, "times": times}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the record of a study; choose another --output") from error
    for name, value in {"compute": compute, **times}.items():
        check_range(f"{path}: {name}", value, above=0)
    return dict(record)


def make_plan(settings: Settings, rates: Rates) -> Plan:
    """What there is to do, with what is known of the best rates so far."""
    workspace, tuning = settings.workspace, tuning_of(settings)
    trials = [*tuning.found("pretrain"), *tuning.found("finetune")]
    compute, times = compute_kept(settings), times_kept(settings, rates)
    study = study_of(workspace, settings.claims, settings.seeds, compute, times)
    finetunings = tuning.finetunings(best(trials, "pretrain"))
    tried = needed([*tuning.pretrainings(), *finetunings])
    second = {job.name for job in finetunings}
    stages = (
        [job for job in tried if job.name not in second],
        [job for job in tried if job.name in second],
        jobs_of_rows(study),
    )
    jobs = unique([job for stage in stages for job in stage])
    encoder = architecture(settings)
    seconds = {job.name: 0.0 if job.done else rates.seconds(job, encoder) for job in jobs}
    budget = settings.hours * 3600 * side_by_side(settings)
    room = budget - spent(settings) if settings.hours else float("inf")
    kept, left = within(jobs, [seconds[job.name] for job in jobs], room)
    return Plan(tuple(map(tuple, stages)), seconds, tuple(kept), tuple(left))


def jobs_of_rows(study: Study) -> list[Command]:
    """Every job of the claims that is done or to do, claim by claim, and then the pictures."""
    jobs = [job for claim in study.claims for job in replace(study, claims=(claim,)).jobs()]
    rows = needed(jobs)
    return rows + looks(study, {job.name for job in rows})


def looks(study: Study, planned: AbstractSet[str]) -> list[Command]:
    """What draws the principal components of the patches of seed 0's encoders, of those that are
    there or whose pretraining is planned, into a folder for their number; none without any, and
    where an archive's picture is there."""
    output, val = study.workspace.output, study.workspace.scale.val
    if (output / LOOK / PCA).is_file():
        return []
    shown = [output / run_name(study.row(name), 0) for name in SHOWN]
    runs = [run for run in shown if f"{run.name} pretrain" in planned]
    if not runs:
        return []
    words = ["--encoder", *runs, "random", "--images", val, "--count", 4, "--output"]
    folder = output / LOOK / str(len(runs))
    command = python(ROOT / "eval/visualise.py", *words, folder)
    needs = tuple(f"{run.name} pretrain" for run in runs)
    return [Command("look", command, folder / "index.html", needs)]


def architecture(settings: Settings) -> EncoderRecipe:
    """That of every row's encoder."""
    return row_recipe(settings.workspace, cifar_row("MAE", {}, {}, 1)).encoder


def unit(scale: Scale) -> str:
    """What a scale's commands take one of each."""
    return "core" if scale.launch == "python" else "GPU"


def side_by_side(settings: Settings) -> int:
    """Cores or GPUs that work at the same time: fewer commands than cores have several each, and
    more take turns."""
    return cores() if unit(settings.scale) == "core" else settings.jobs


def spent(settings: Settings) -> float:
    """Seconds of a core (CPU time) or of the GPU that all sittings have used."""
    what = "cpu_seconds" if unit(settings.scale) == "core" else "seconds"
    return sum(costs(settings.output, what).values())


def show(settings: Settings, plan: Plan) -> list[str]:
    """The plan in lines: per command its measured cost; then the sums and what does not fit."""
    names = ("tuning: pretraining rates", "tuning: finetuning rates", "rows of the claims")
    left, what = {job.name for job in plan.left}, unit(settings.scale)
    lines = []
    for title, stage in zip(names, plan.stages, strict=True):
        hours = sum(plan.seconds[job.name] for job in stage) / 3600
        lines.append(f"== {title}: {len(stage)} commands, {hours:.2f} {what}-hours left to do")
        for job in stage:
            cost = f"{plan.seconds[job.name]:,.0f} s"
            state = "done" if job.done else "no room" if job.name in left else cost
            lines.append(f"{state:>12}  {job.images:>9,} images  {job.name}")
            lines.append(f"{'':>14}{' '.join(map(quote, job.command))}")
    if settings.extended:
        lines.append("(--extend-tuning: rates beyond the grid follow once its own are tried)")
    todo = sum(plan.seconds[job.name] for job in plan.kept) / 3600
    lines.append(
        f"{spent(settings) / 3600:.2f} {what}-hours used, {todo:.2f} to do: "
        f"{todo / side_by_side(settings):.2f} hours with {settings.jobs} side by side, by what was "
        f"measured on this machine ({settings.output / 'rates.json'})"
    )
    if plan.left:
        out = sum(plan.seconds[job.name] for job in plan.left) / 3600
        lines.append(
            f"{len(plan.left)} commands of {out:.2f} {what}-hours do not fit into "
            f"{settings.hours:g} hours (--hours) and are left out"
        )
    return lines

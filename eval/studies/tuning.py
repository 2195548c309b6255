"""Learning rates of every method, chosen on a held-out part of the training images.

First each method is pretrained with every base_lr of the scale's `tune` for its `epochs`, and
evaluated by its `metric`; then the best encoder of each, and a random one, is finetuned with every
finetune_lr for `finetune_epochs` percent of the usual. Every method has the same number of trials
and of images seen. What was tried is in OUTPUT/tuning.json, and the report shows it.

A trial that diverges counts as the worst, and is not run again.

Where it is wanted (--extend-tuning), a method whose best rate of a stage is at an end of the grid
has one more trial, as far beyond the end as the grid's next rate is inside it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.paper.commands import Workspace, eval_job, random_words, row_jobs, run_name
from eval.paper.job_runner import Command, diverged
from eval.paper.published import PaperRow
from eval.paper.reproduction import our_result
from eval.reporting.run_records import metric_in
from pipeline.errors import UserError, check_range, naming
from shard_tools.atomic import write_json

SEED = 1000  # of every trial: none of a study's


@dataclass(frozen=True)
class Trial:
    """What one learning rate of a method came to on the held-out images. stage: pretrain, and
    the base_lr of a recipe, or finetune, and that of finetuning. beyond: whether it is one beyond
    the grid; late: tried when rates had been chosen already, so it is never chosen. diverged: the
    value, 0, is of a training or probe that was not finite; it is never chosen either."""

    method: str
    stage: str
    base_lr: float
    metric: str
    value: float
    beyond: bool = False
    late: bool = False
    diverged: bool = False


@dataclass(frozen=True)
class Tuning:
    """How a workspace's methods are tuned; train, held_out: shards; rows: method → its row;
    extend: rates beyond the ends of the grid are tried; late: the study has begun without them."""

    workspace: Workspace
    train: str
    held_out: str
    rows: dict[str, PaperRow]
    extend: bool = False
    late: bool = False

    @property
    def grid(self) -> dict[str, Any]:
        return self.workspace.scale.tune

    @property
    def folder(self) -> Path:
        return self.workspace.output / "tune"

    @property
    def record(self) -> Path:
        return self.workspace.output / "tuning.json"

    def trial(self, base_lr: float) -> Workspace:
        """Where the trials of a pretraining rate are made."""
        scale, epochs = self.workspace.scale, float(self.grid["epochs"])
        rates = (f"optimizer.base_lr={base_lr:g}", f"optimizer.warmup_epochs={epochs / 8:g}")
        scale = replace(
            scale, train=self.train, val=self.held_out, epochs=epochs,
            last=(*scale.last, *rates),
        )  # fmt: skip
        return replace(self.workspace, output=self.folder / f"lr-{base_lr:g}", scale=scale)

    def pretrainings(self) -> list[Command]:
        """The trials of the first stage, pretrained and evaluated; none where nothing is to be
        chosen, since both grids have one rate: then the rows have the scale's."""
        if max(len(self.grid["base_lr"]), len(self.grid["finetune_lr"])) < 2:
            return []
        pairs = [(rate, m) for rate in self.grid["base_lr"] for m in self.pretrained()]
        if self.extend:
            pairs += [(rate, m) for m, rate in beyond(self.found("pretrain"), "pretrain").items()]
        jobs = [
            renamed(job, f"tune {base_lr:g}")
            for base_lr, method in pairs
            for job in row_jobs(self.trial(base_lr), self.rows[method], SEED, [self.grid["metric"]])
        ]
        return self.possible(jobs)

    def possible(self, jobs: Sequence[Command]) -> list[Command]:
        """Those that have not diverged, nor what they need."""
        lost = diverged(self.workspace.output)
        return [job for job in jobs if not lost & {job.name, *job.needs}]

    def pretrained(self) -> dict[str, PaperRow]:
        return {method: row for method, row in self.rows.items() if not row.initial}

    def finetunings(self, best: dict[str, float]) -> list[Command]:
        """The trials of the second stage, none where the grid has one rate; best: method → its
        pretraining rate."""
        if len(self.grid["finetune_lr"]) < 2:
            return []
        pairs = [(float(rate), m) for rate in self.grid["finetune_lr"] for m in self.rows]
        if self.extend:
            pairs += [(rate, m) for m, rate in beyond(self.found("finetune"), "finetune").items()]
        jobs = [self.finetuning(m, self.rows[m], best, base_lr) for base_lr, m in pairs]
        return self.possible(jobs)

    def finetuning(
        self, method: str, row: PaperRow, best: dict[str, float], base_lr: float
    ) -> Command:
        """A method's finetuning with a rate."""
        pretrained = best.get(method, 0.0) or float(self.grid["base_lr"][0])
        workspace, run = self.trial(pretrained), run_name(row, SEED)
        encoder: list[object] = ["--encoder", workspace.output / run]
        needs: tuple[str, ...] = (f"tune {pretrained:g} {run} pretrain",)
        if row.initial:
            encoder, needs = list(random_words(workspace, row, SEED)), ()
        row = replace(row, finetune={"epochs": self.grid["finetune_epochs"], "base_lr": base_lr})
        scale = workspace.scale
        made = self.finetuned(method, base_lr)
        job = eval_job(workspace, row, SEED, "finetune", encoder, made, scale.train, scale.val, ())
        return replace(job, name=finetune_name(method, base_lr), needs=needs)

    def finetuned(self, method: str, base_lr: float) -> Path:
        """The result of a finetuning of the second stage."""
        name = "".join(c if c.isalnum() else "-" for c in method)
        return self.folder / f"finetune-{base_lr:g}" / f"{name}.json"

    def found(self, stage: str) -> list[Trial]:
        """The trials of a stage that have a value or diverged so far, also those beyond the grid of
        an earlier call that was told to extend it."""
        trials: list[Trial] = []
        rates = self.grid["base_lr" if stage == "pretrain" else "finetune_lr"]
        for method in self.pretrained() if stage == "pretrain" else self.rows:
            grid = self.tried(stage, method, rates)
            trials += grid
            if len(grid) == len(rates):
                trials += self.tried(stage, method, beyond(grid, stage).values(), more=True)
        return trials

    def tried(
        self, stage: str, method: str, rates: Iterable[float], more: bool = False
    ) -> list[Trial]:
        """Those of a method's rates, which are beyond the grid (more) or in it."""
        row, lost, found = self.rows[method], diverged(self.workspace.output), []
        metric = str(self.grid["metric"]) if stage == "pretrain" else "finetune"
        for rate in map(float, rates):
            commands, value = {finetune_name(method, rate)}, None
            if stage == "pretrain":
                run = run_name(row, SEED)
                commands = {f"tune {rate:g} {run} {what}" for what in ("pretrain", metric)}
            gone = bool(lost & commands)
            if gone:
                value = 0.0
            elif stage == "pretrain":
                value = our_result(self.trial(rate), row, SEED, metric)
            else:
                value = metric_in(self.finetuned(method, rate), metric)
            if value is not None:
                late = more and self.late
                found.append(Trial(method, stage, rate, metric, value, more, late, gone))
        return found

    def write(self) -> None:
        """Note every trial in OUTPUT/tuning.json, beside those of methods of other claims."""
        known = read_trials(self.record)
        trials = (
            [t for t in known if t.method not in self.rows]
            + self.found("pretrain")
            + self.found("finetune")
        )
        order = list(dict.fromkeys(trial.method for trial in (*known, *trials)))
        trials.sort(key=lambda trial: order.index(trial.method))
        with naming(self.record, "cannot be written"):
            write_json(self.record, {"grid": self.grid, "trials": [noted(t) for t in trials]})


def noted(trial: Trial) -> dict[str, Any]:
    """A trial as tuning.json has it: of one in the grid not that it is."""
    return {key: value for key, value in asdict(trial).items() if value is not False}


def finetune_name(method: str, base_lr: float) -> str:
    """What the finetuning of a method with a rate is called."""
    return f"tune finetune {base_lr:g} {method}"


def renamed(job: Command, prefix: str) -> Command:
    """A job under another name, as are those that it needs."""
    keep = ("data ",)  # shared by all trials

    def name(text: str) -> str:
        return text if text.startswith(keep) else f"{prefix} {text}"

    return replace(job, name=name(job.name), needs=tuple(map(name, job.needs)))


def best(trials: Sequence[Trial], stage: str) -> dict[str, float]:
    """Method → the learning rate of its best trial of a stage; of equals the lowest."""
    found: dict[str, Trial] = {}
    chosen_from = (t for t in trials if t.stage == stage and not (t.late or t.diverged))
    for trial in sorted(chosen_from, key=lambda t: t.base_lr):
        if trial.method not in found or trial.value > found[trial.method].value:
            found[trial.method] = trial
    return {method: trial.base_lr for method, trial in found.items()}


def rates_of(trials: Sequence[Trial], method: str, stage: str) -> list[float]:
    """The rates that were tried, from the lowest up."""
    return sorted(t.base_lr for t in trials if (t.method, t.stage) == (method, stage))


def at_edge(trials: Sequence[Trial], stage: str) -> list[str]:
    """Methods whose best rate is the lowest or the highest that was tried: a better one may lie
    beyond it."""
    found = []
    for method, rate in best(trials, stage).items():
        rates = rates_of(trials, method, stage)
        if len(rates) > 1 and rate in (rates[0], rates[-1]):
            found.append(method)
    return found


def beyond(trials: Sequence[Trial], stage: str) -> dict[str, float]:
    """Method → the rate to try beyond the grid, for those whose best is at an end of it: as many
    times the end as the end is the rate beside it. Trials beyond the grid do not count."""
    grid = [trial for trial in trials if not trial.beyond]
    chosen, found = best(grid, stage), {}
    for method in at_edge(grid, stage):
        rates = rates_of(grid, method, stage)
        end, next_one = rates[:2] if chosen[method] == rates[0] else rates[:-3:-1]
        found[method] = float(f"{end * end / next_one:.3g}")
    return found


def outdone(trials: Sequence[Trial], stage: str) -> list[tuple[Trial, Trial]]:
    """(chosen, better) of each method of which a late trial is better than the chosen one."""
    rates = best(trials, stage)
    chosen = {t.method: t for t in trials if t.stage == stage and rates.get(t.method) == t.base_lr}
    late = [t for t in trials if t.stage == stage and t.late]
    return [(chosen[t.method], t) for t in late if t.value > chosen[t.method].value]


def read_trials(path: Path) -> list[Trial]:
    """The trials of a tuning.json, none where there is no file. UserError where it is none."""
    if not path.is_file():
        return []
    with naming(path, "cannot be read"):
        text = path.read_bytes()
    try:
        found = [Trial(**trial) for trial in json.loads(text)["trials"]]
        trials = [replace(t, base_lr=float(t.base_lr), value=float(t.value)) for t in found]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no record of a tuning; remove it to tune again") from error
    for trial in trials:
        check_range(f"{path}: base_lr of {trial.method}", trial.base_lr, above=0)
        check_range(f"{path}: value of {trial.method}", trial.value)
    return trials

"""The page of eval/cifar_paper.py: claims, rows beside the paper's, tuning, published anchors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.paper.reproduction import beside
from eval.protocols import headings
from eval.reporting.chapters import picture_of
from eval.reporting.page import Chapter, Detail
from eval.reporting.run_records import read_json
from eval.reporting.tables import NONE, Cell, Row, Table
from eval.studies.archive import LOOK, PCA
from eval.studies.cheaper import cheaper_chapter
from eval.studies.study import Study, rules, summary, wanted_metrics
from eval.studies.tuning import Trial, at_edge, best, outdone, read_trials
from pipeline.errors import UserError, check_range

# MAE on CIFAR-10 as others report it: model, pretraining, metrics, source.
ANCHORS = (
    ("ViT-T", "2000 epochs", "finetuned 89.77 %; from scratch 74.13 %",
     "github.com/pprp/MAE-CIFAR (a fork of IcarusWizard/MAE), README"),
    ("ViT of under 3.65 million weights, images of 36 pixels", "not said in the abstract",
     "finetuned 96.41 %", "Tan 2024, arXiv:2402.03752, as listed by sotaverified.org"),
    ("ViT, 9 blocks, decoder of 3", "100 epochs",
     "linear probe 49.33 %; its encoder from scratch about 76 %",
     "github.com/ariG23498/mae-scalable-vision-learners, README"),
)  # fmt: skip

FACTS = "facts.json"
STAGES = {"pretrain": "pretraining", "finetune": "finetuning"}  # of the tuning, in words


@dataclass(frozen=True)
class Facts:
    """What the page says beside the results: claims and seeds that were asked for, seconds used of
    a core or GPU (unit), commands that did not fit."""

    claims: tuple[int, ...]
    seeds: int
    seconds: float
    unit: str
    left: tuple[str, ...] = ()


def read_facts(path: Path) -> Facts:
    """The facts of an archive. UserError where they are none."""
    try:
        found = read_json(path)
        facts = Facts(tuple(map(int, found["claims"])), int(found["seeds"]),
                      float(found["seconds"]), str(found["unit"]),
                      tuple(map(str, found["left"])))  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path.name}: is missing from the archive, or damaged") from error
    check_range(f"{path.name}: seconds", facts.seconds, at_least=0)
    return facts


def chapters(study: Study, facts: Facts) -> list[Chapter]:
    """The first chapters; those of the runs follow."""
    trials = read_trials(study.workspace.output / "tuning.json")
    found = [claims_chapter(study, facts, trials), rows_chapter(study)]
    found += [cheaper_chapter(study), anchors_chapter()]
    pca = study.workspace.output / LOOK / PCA
    if pca.is_file():
        found.append(look_chapter(pca))
    found += [tuning_chapter(trials)] if trials else []
    return [chapter for chapter in found if not chapter.empty]


def claims_chapter(study: Study, facts: Facts, trials: Sequence[Trial]) -> Chapter:
    """The claims; what contradicts the paper first."""
    scale = study.workspace.scale
    texts = [
        summary(study),
        *rate_warnings(trials),
        rules(study),
        f"Scale: {scale.name} of eval/paper/scales.yaml. What fails here may hold at the paper's "
        "scale, and the reverse.",
        scale.tried,
        f"Cost so far: {facts.seconds / 3600:.2f} {facts.unit}-hours.",
    ]
    details = []
    if facts.left:
        texts.append(f"Not run, for want of time: {len(facts.left)} commands, named below.")
        details.append(Detail("Not run, for want of time", (("commands", "\n".join(facts.left)),)))
    return Chapter(
        "claims", "The paper's claims", tuple(filter(None, texts)), tuple(study.tables()),
        details=tuple(details),
    )  # fmt: skip


def rows_chapter(study: Study) -> Chapter:
    """The rows with all that was measured of them, beside the paper's."""
    wanted = wanted_metrics(study.claims, study.names)
    shown = {name: metrics for name, metrics in wanted.items() if set(metrics) & set(headings())}
    rows = [(study.row(name), metrics) for name, metrics in shown.items()]
    texts = ("The paper's numbers are of ViT-B/16 on ImageNet; rows that are ours have none.",)
    table = beside("", rows, study.workspace, study.seeds)
    return Chapter("reproduced", "Beside the paper", texts, (table,))


def anchors_chapter() -> Chapter:
    """What others report of MAE on CIFAR-10."""
    rows = tuple(Row(tuple(map(Cell, anchor))) for anchor in ANCHORS)
    table = Table(("model", "pretraining", "CIFAR-10 test images", "source"), rows, text=True)
    texts = (
        "Of other models, epochs and recipes than ours, each of one run as far as its source says: "
        "no claim is judged by them.",
    )
    return Chapter("anchors", "What others report", texts, (table,))


def look_chapter(pca: Path) -> Chapter:
    """The patches of the encoders of seed 0 as colours."""
    text = (
        "The first three principal components of the patch tokens as red, green and blue, one "
        "basis per encoder; what the random encoder shows too was not learned."
    )
    picture = picture_of(pca, "Test images; a column per encoder, as eval/visualise.py draws them")
    return Chapter("look", "Inside the encoders", (text,), pictures=(picture,))


def tuning_chapter(trials: Sequence[Trial]) -> Chapter:
    """Every learning rate that was tried, on held-out training images; the chosen ones marked."""
    tables = [tuning_table(trials, stage) for stage in STAGES]
    texts = [
        "Chosen on a tenth of the training images, held out, with as many trials and as many "
        "images seen for every method, and one seed that no claim uses."
    ]
    if any(trial.beyond for trial in trials):
        late = any(trial.late for trial in trials)
        texts.append(
            "Beyond the grid: one more trial of each method whose best rate was at an end of it, "
            + ("made after the rates had been chosen, which stay." if late else "as the rest.")
        )
    texts += rate_warnings(trials)
    for stage, what in STAGES.items():
        if methods := at_edge(trials, stage):
            texts.append(
                f"At an end of the rates tried, so that a better one may be beyond it: {what} of "
                f"{', '.join(methods)}."
            )
    return Chapter("tuning", "Learning rates", tuple(texts), tuple(t for t in tables if t.rows))


def rate_warnings(trials: Sequence[Trial]) -> list[str]:
    """A sentence for each method whose rows have a worse rate than one that was tried later."""
    return [
        f"Warning: {what} of {chosen.method} has base_lr {chosen.base_lr:g} "
        f"({chosen.value:.2f} % on the held-out images) in every row; {better.base_lr:g}, tried "
        f"later, is better ({better.value:.2f} %). What these rows lose or win by may be the rate."
        for stage, what in STAGES.items()
        for chosen, better in outdone(trials, stage)
    ]


def tuning_table(trials: Sequence[Trial], stage: str) -> Table:
    """A row per method, a column per rate."""
    mine = [trial for trial in trials if trial.stage == stage]
    rates = sorted({trial.base_lr for trial in mine})
    chosen = best(trials, stage)
    found = {(trial.method, trial.base_lr): trial for trial in mine}
    rows = []
    for method in dict.fromkeys(trial.method for trial in mine):
        cells = [Cell(method)]
        for rate in rates:
            trial = found.get((method, rate))
            notes = ["chosen"] if chosen.get(method) == rate else []
            notes += ["beyond the grid"] if trial and trial.beyond else []
            value = f"{trial.value:.2f}" if trial else NONE
            value = "diverged" if trial and trial.diverged else value
            cells.append(Cell(value, ", ".join(notes)))
        rows.append(Row(tuple(cells)))
    metric = headings()[mine[0].metric] if mine else ""
    what = STAGES[stage].capitalize()
    head = ("method", *(f"{rate:g}" for rate in rates))
    return Table(head, tuple(rows), f"{what}: {metric} by base_lr")

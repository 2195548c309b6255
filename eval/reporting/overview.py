"""The report's first screen: every run's status, its best results, and whether it is healthy."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from eval.reporting.health import BAD, GOOD, LOOK, UNKNOWN, Check, check_run, overall
from eval.reporting.run_records import Group, Run
from eval.reporting.run_status import RunStatus, read_status
from eval.reporting.tables import Column, against_random, column_of, is_random, random_values

VERDICTS = {GOOD: "healthy", LOOK: "worth a look", BAD: "not healthy", UNKNOWN: "no data"}
MARKS = {GOOD: "✓", LOOK: "!", BAD: "✗", UNKNOWN: "?"}
MOST = 4  # results of a card


@dataclass(frozen=True)
class Metric:
    """A result of a run beside a random encoder's: words to show."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Card:
    """A run on the first screen: what its status, results and checks come to, in words."""

    name: str
    state: str
    reason: str
    verdict: str
    sentence: str
    facts: tuple[tuple[str, str], ...]
    metrics: tuple[Metric, ...]
    checks: tuple[Check, ...]
    progress: float | None = None

    @property
    def mark(self) -> str:
        return MARKS[self.verdict]


def cards(groups: Sequence[Group]) -> list[Card]:
    """A card per pretraining run."""
    return [card(run, groups) for group in groups if group.pretrained for run in group.runs]


def card(run: Run, groups: Sequence[Group]) -> Card:
    """The card of a run; groups: of the report, whose random encoders are the baseline."""
    status, checks = read_status(run.folder), check_run(run)
    verdict = overall(checks)
    if status.state == "failed":
        verdict = BAD
    elif verdict != BAD and (status.state == "cut off" or status.silent):
        verdict = LOOK
    progress = status.step / status.total if status.total else None
    return Card(
        run.name,
        status.state,
        status.reason,
        verdict,
        sentence(status, verdict, checks),
        facts(run, status),
        results(run, groups),
        tuple(checks),
        progress,
    )


def sentence(status: RunStatus, verdict: str, checks: Sequence[Check]) -> str:
    """The answer to "is my run healthy?"."""
    reasons = {"failed": ["it failed"], "cut off": ["it was cut off"]}.get(status.state, [])
    reasons += ["it has been silent"] if status.silent else []
    reasons += [f"look at “{c.name}”" for c in checks if c.verdict in (BAD, LOOK)]
    good = sum(c.verdict == GOOD for c in checks)
    missing = sum(c.verdict == UNKNOWN for c in checks)
    counted = f"{good} of {len(checks)} checks pass"
    if missing:
        counted += f", {missing} without data"
    words = VERDICTS[verdict]
    return f"{words[0].upper()}{words[1:]}: {'; '.join(reasons) or counted}."


def facts(run: Run, status: RunStatus) -> tuple[tuple[str, str], ...]:
    """Terms and what they are of this run, what is not known left out."""
    speed = run.typical("images_per_second")
    memory = run.typical("memory_gb")
    ranks = run.versions.get("ranks")
    device = str(run.versions.get("device", ""))
    if device and ranks:
        device = f"{ranks} × {device}" if ranks != 1 else device
    loss = run.series("loss")[1]
    epoch = run.series("epoch")[1]
    found = {
        "steps": f"{status.step} of {status.total}" if status.total else "",
        "epochs": f"{epoch[-1]:.3g}" if epoch else "",
        "loss": f"{loss[-1]:.4g}" if loss else "",
        "duration": duration(status),
        "started": f"{status.started:%Y-%m-%d %H:%M}" if status.started else "",
        "speed": f"{speed:,.0f} images/s" if speed is not None else "",
        "device": device,
        "precision": str(run.versions.get("precision", "")),
        "memory": f"{memory:.2f} GB per rank" if memory is not None else "",
        "data": data_of(run),
    }
    return tuple((term, text) for term, text in found.items() if text)


def data_of(run: Run) -> str:
    """The training images, in words."""
    folder, images = run.versions.get("data"), run.versions.get("images")
    return f"{images:,} images in {folder}" if isinstance(images, int) and folder else ""


def duration(status: RunStatus) -> str:
    """Hours, minutes and seconds of all starts, and how many there were."""
    if status.started is None:
        return ""
    minutes, seconds = divmod(round(status.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
    text = f"{hours} h {minutes:02d} min" if hours else text
    return text if status.starts < 2 else f"{text} in {status.starts} starts"


def results(run: Run, groups: Sequence[Group]) -> tuple[Metric, ...]:
    """A run's results beside random encoders', the largest gain first."""
    found: list[tuple[float, Metric]] = []
    for result in run.results:
        column = column_of(result)
        if column is None or is_random(result):
            continue
        value = float(result[column.field])
        random = random_values(groups, column)
        gain = value - mean(random) if random else None
        found.append((-gain if gain is not None else 0.0, metric(column, value, random, gain)))
    found.sort(key=lambda pair: pair[0])
    return tuple(m for _, m in found[:MOST])


def metric(column: Column, value: float, random: list[float], gain: float | None) -> Metric:
    """One result in words."""
    unit = f" {column.unit}" if column.unit else ""
    digits = 1 if column.unit else 3
    note = "no random encoder to compare with"
    if gain is not None:
        note = f"{against_random(gain, digits)} ({mean(random):.{digits}f}{unit})"
    return Metric(column.name, f"{value:.{digits}f}{unit}", note)


def headline(shown: Sequence[Card]) -> str:
    """All runs as one line of text."""
    if len(shown) < 2:
        return ""
    counts = [(VERDICTS[v], sum(c.verdict == v for c in shown)) for v in (BAD, LOOK, GOOD, UNKNOWN)]
    return f"{len(shown)} runs: " + ", ".join(f"{n} {word}" for word, n in counts if n) + "."

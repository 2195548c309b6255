"""The paper's claims as statements about paired differences, and how sure a few seeds make them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from eval.studies.significance import (
    CONFIDENCE,
    bootstrap_interval,
    holm,
    interval,
    p_value,
    seeds_needed,
)

REFUTED = "the opposite holds"
DIGITS = 9  # behind the point, of a difference

# (row, metric) → our values by seed, None where one is missing.
Values = Callable[[str, str], Sequence[float | None]]


@dataclass(frozen=True)
class Difference:
    """`better` should exceed `worse` in a metric; the same seeds make pairs.

    margin: it may fall short by as much (`at most this much worse`): a test of non-inferiority.
    """

    better: str
    worse: str
    metric: str
    unit: str = "points"
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: true where every difference is."""

    number: int
    text: str
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Judged:
    """A difference as found: the pairs' values, mean, its 95 % interval, p-value and verdict.

    p: of the mean against minus the margin, two-sided. corrected: the p-value that decides,
    corrected for the number of differences where `correct` has been called. level: what p would
    have to be below. holds: the mean plus the margin is surely above 0 (surely below: refuted;
    else undecided).
    """

    difference: Difference
    better: tuple[float, ...]
    worse: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float
    corrected: float
    level: float = 1 - CONFIDENCE

    @property
    def apart(self) -> tuple[float, ...]:
        """The paired differences."""
        return differences(self.better, self.worse)

    @property
    def bootstrap(self) -> tuple[float, float]:
        """The bootstrap's 95 % interval of the mean."""
        return bootstrap_interval(self.apart)

    @property
    def sure(self) -> bool:
        return self.corrected < 1 - CONFIDENCE

    @property
    def holds(self) -> bool:
        return self.sure and self.mean + self.difference.margin > 0

    @property
    def verdict(self) -> str:
        if not self.sure:
            return "undecided"
        return "holds" if self.holds else REFUTED

    @property
    def seeds_needed(self) -> int | None:
        """Seeds that would decide it, if mean and deviation are as found; see significance.py."""
        return seeds_needed(above(self.apart, self.difference.margin), self.level)


def differences(better: Sequence[float], worse: Sequence[float]) -> tuple[float, ...]:
    """Paired differences, without the last digits of floating point, which would be a deviation of
    differences that are equal."""
    return tuple(round(a - b, DIGITS) for a, b in zip(better, worse, strict=True))


def above(apart: Sequence[float], margin: float) -> list[float]:
    """What differences are above minus the margin."""
    return [round(value + margin, DIGITS) for value in apart]


def judge(difference: Difference, values: Values) -> Judged:
    """A difference over the seeds that have both values."""
    both = [
        (a, b)
        for a, b in zip(
            values(difference.better, difference.metric),
            values(difference.worse, difference.metric),
            strict=True,
        )
        if a is not None and b is not None
    ]
    better, worse = tuple(a for a, _ in both), tuple(b for _, b in both)
    apart = differences(better, worse)
    middle = mean(apart) if apart else float("nan")
    p = p_value(above(apart, difference.margin))
    return Judged(difference, better, worse, middle, *interval(apart), p, p)


def correct(judged: Sequence[Judged]) -> list[Judged]:
    """The same, each p-value corrected for their number by Holm; those without two pairs, which
    are no tests yet, do not count."""
    tested = [one for one in judged if len(one.apart) > 1]
    found = iter(holm([one.p for one in tested]))
    result = [replace(one, corrected=next(found)) if len(one.apart) > 1 else one for one in judged]
    left = sum(not one.sure for one in result if len(one.apart) > 1)
    level = (1 - CONFIDENCE) / max(1, left)  # of Holm's next step
    return [replace(one, level=level) for one in result]


def verdict(judged: Sequence[Judged]) -> bool:
    """Whether a claim is true: each of its differences holds."""
    return bool(judged) and all(one.holds for one in judged)


MASKED = ("MAE", "R-MAE", "C-MAE")
CLAIMS = (
    Claim(
        1,
        "MAE, R-MAE and C-MAE pretraining beat random initialisation in finetuning and with 10 % "
        "of the labels (Tab. 1, 2, 4)",
        tuple(
            Difference(method, "random", metric)
            for metric in ("finetune", "fewshot")
            for method in MASKED
        ),
    ),
    Claim(
        2,
        "CKA of full and masked images is higher for MAE, R-MAE and C-MAE than for supervised and "
        "random encoders where 70 to 90 % is dropped (Fig. 1; mean over these and all blocks), "
        "both of the patches that both encodings have and of all patches against those kept",
        tuple(
            Difference(method, other, f"cka {pool}", "")
            for pool in ("kept-in-both", "all-kept")
            for other in ("supervised", "random")
            for method in MASKED
        ),
    ),
    Claim(
        3,
        "Dropping mask tokens from C-MAE lifts the linear probe (Tab. 4)",
        (Difference("C-MAE without mask tokens", "C-MAE", "linprobe"),),
    ),
    Claim(
        4,
        "Pretraining on one image beats random initialisation in finetuning (Tab. 6)",
        (Difference("MAE, 1 image", "random", "finetune"),),
    ),
    Claim(
        5,
        "The PSNR of R-MAE is at or above that of MAE (Tab. 1)",
        (Difference("R-MAE", "MAE", "psnr", "dB"),),
    ),
)

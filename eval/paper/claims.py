"""The paper's claims as statements about paired differences, and how sure a few seeds make them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t as student

CONFIDENCE = 0.95
REFUTED = "the opposite holds"

# (row, metric) → our values by seed, None where one is missing.
Values = Callable[[str, str], Sequence[float | None]]


@dataclass(frozen=True)
class Difference:
    """`better` should exceed `worse` in a metric; the same seeds make pairs."""

    better: str
    worse: str
    metric: str
    unit: str = "points"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: true where every difference is."""

    number: int
    text: str
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Judged:
    """A difference as found: values, mean, its confidence interval, and the verdict.

    holds: the interval is entirely above 0 (entirely below: refuted; else undecided).
    """

    difference: Difference
    better: tuple[float, ...]
    worse: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        return self.low > 0

    @property
    def verdict(self) -> str:
        if self.holds:
            return "holds"
        return REFUTED if self.high < 0 else "undecided"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean; without bounds for fewer than two values."""
    if len(values) < 2:
        return float("-inf"), float("inf")
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


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
    apart = [a - b for a, b in both]
    middle = mean(apart) if apart else float("nan")
    return Judged(difference, better, worse, middle, *interval(apart))


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

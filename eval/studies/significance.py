"""What a few paired differences say: intervals, p-values, correction for many, seeds needed."""

from collections.abc import Sequence
from functools import cache
from itertools import product
from math import isfinite, sqrt
from statistics import mean, stdev
from types import ModuleType

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000  # of the bootstrap, where not every one can be listed
MOST_SEEDS = 1000  # more are as good as never


def _distributions() -> ModuleType:
    import scipy.stats  # a second, which no help should wait for

    return scipy.stats


def unusable(values: Sequence[float]) -> bool:
    """Whether values tell no deviation."""
    return len(values) < 2 or not all(map(isfinite, values))


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's interval of the mean; without bounds for fewer than two values, and for values
    that are not finite."""
    if unusable(values):
        return float("-inf"), float("inf")
    quantile = float(_distributions().t.ppf((1 + confidence) / 2, len(values) - 1))
    half = quantile * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap's percentile interval of the mean (Efron 1979); without bounds where Student's
    is. Of up to six values every resample is listed. It is never wider than the range of the
    values, so of few it is too narrow, and Student's is the one that decides.
    """
    n = len(values)
    if unusable(values):
        return float("-inf"), float("inf")
    means = np.asarray(values, np.float64)[_resamples(n)].mean(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@cache
def _resamples(n: int) -> np.ndarray:
    """Numbers of the values in each resample, int [resamples, n]: all n^n, or drawn ones."""
    if n**n <= 6**6:
        return np.array(list(product(range(n), repeat=n)))
    return np.random.default_rng(0).integers(0, n, (RESAMPLES, n))


def p_value(values: Sequence[float]) -> float:
    """Of Student's two-sided test that the mean is 0; 1, which decides nothing, for fewer than two
    values and for values that are not finite."""
    if unusable(values):
        return 1.0
    middle, deviation = mean(values), stdev(values)
    if not deviation:
        return 0.0 if middle else 1.0
    statistic = abs(middle) / (deviation / sqrt(len(values)))
    return float(2 * _distributions().t.sf(statistic, len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979): a family of tests at level a, each
    rejected where its corrected value is below a, has any false rejection in at most the share a.
    """
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, n in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[n])
        corrected[n] = min(1.0, largest)
    return corrected


def seeds_needed(values: Sequence[float], level: float = 1 - CONFIDENCE) -> int | None:
    """Pairs that Student's two-sided test at `level` needs to find a mean as found, with this
    deviation, in 80 % of studies (noncentral t). None where it is over a thousand, or fewer than
    two values, or values that are not finite, tell no deviation.
    """
    if unusable(values):
        return None
    middle, deviation = abs(mean(values)), stdev(values)
    if not middle:
        return None
    if not deviation:
        return 2
    n = 2
    while n <= MOST_SEEDS and power(middle / deviation, n, level) < POWER:
        n += 1
    return n if n <= MOST_SEEDS else None


def power(effect: float, n: int, level: float) -> float:
    """How often Student's two-sided test of n pairs at `level` finds a mean of `effect` standard
    deviations."""
    quantile = float(_distributions().t.ppf(1 - level / 2, n - 1))
    shift = effect * sqrt(n)
    if shift > 50:  # the noncentral t loses its digits there; only the deviation still varies
        return float(_distributions().chi2.cdf((n - 1) * (shift / quantile) ** 2, n - 1))
    found = float(_distributions().nct.sf(quantile, n - 1, shift))
    return found if found == found else 0.0  # nan where quantile and shift are both far out

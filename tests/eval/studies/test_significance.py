"""The statistics of paired differences against scipy's tests, published values and simulation."""

import math
from itertools import product
from statistics import mean

import numpy as np
import pytest
from scipy.stats import bootstrap, false_discovery_control, nct, t, ttest_1samp, ttest_rel

from eval.studies.claims import Difference, correct, judge
from eval.studies.significance import (
    _resamples,
    bootstrap_interval,
    holm,
    interval,
    p_value,
    power,
    seeds_needed,
)

SETS = [(1.0, 2.0, 4.0), (0.5, -0.25), (3.0, 3.5, 2.0, 9.0), (0.1, 0.2, -0.3, 0.4, 0.1, 0.7, 0.0)]


@pytest.mark.parametrize("numbers", SETS)
def test_interval_and_p_are_students(numbers):
    expected = ttest_1samp(numbers, 0)
    low, high = expected.confidence_interval(0.95)
    assert interval(numbers) == pytest.approx((low, high))
    assert p_value(numbers) == pytest.approx(expected.pvalue)
    wide = expected.confidence_interval(0.99)
    assert interval(numbers, 0.99) == pytest.approx((wide.low, wide.high))


def test_pairs_are_tested_as_scipys_paired_test():
    table = {("a", "x"): [50.0, 70.0, 60.0], ("b", "x"): [48.0, 67.5, 57.9]}
    one = judge(Difference("a", "b", "x"), lambda row, metric: table[row, metric])
    assert one.p == pytest.approx(ttest_rel(*table.values()).pvalue)


def test_the_bootstrap_lists_every_resample_of_few_values():
    values = (1.0, 2.0, 4.0)
    means = [mean(r) for r in product(values, repeat=3)]
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(values) == pytest.approx(tuple(expected))
    assert bootstrap_interval([5.0]) == (float("-inf"), float("inf"))


def test_resamples_of_up_to_six_values_are_listed():
    assert _resamples(6).shape == (6**6, 6)
    assert _resamples(7).shape == (10_000, 7)


def test_the_bootstrap_of_more_values_is_scipys():
    values = np.random.default_rng(1).normal(3, 2, 40)
    expected = bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert bootstrap_interval(values) == pytest.approx(tuple(expected), abs=0.03)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_no_p_from_too_little():
    assert p_value([]) == p_value([3.0]) == p_value([0.0, 0.0]) == 1.0
    assert p_value([2.0, 2.0]) == 0.0


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_values_that_are_not_finite_decide_nothing(odd):
    values = [1.0, odd, 2.0]
    assert p_value(values) == 1.0
    assert seeds_needed(values) is None
    assert interval(values) == bootstrap_interval(values) == (float("-inf"), float("inf"))
    broken, fine = judged((values, [0.0] * 3), ([3.0, 3.1, 2.9], [0.0] * 3))
    assert [one.verdict for one in correct([broken, fine])] == ["undecided", "holds"]


def test_equal_differences_have_no_deviation_of_the_last_digits():
    """0.3 - 0.1 and 0.5 - 0.3 differ by 3e-17 and 70.1 - 70.6 + 0.5 is no more than 0."""
    (equal,) = judged(([0.3, 0.5, 70.4], [0.1, 0.3, 70.2]))
    assert (equal.p, equal.verdict) == (0.0, "holds")
    assert equal.low == equal.high == equal.mean == 0.2
    (at_margin,) = judged(([70.1, 60.2, 0.7], [70.6, 60.7, 1.2]), margin=0.5)
    assert (at_margin.p, at_margin.verdict, at_margin.seeds_needed) == (1.0, "undecided", None)


def test_the_bootstrap_is_never_wider_than_the_values():
    for values in SETS:
        low, high = bootstrap_interval(values)
        assert min(values) <= low < high <= max(values)


@pytest.mark.parametrize(("true", "share"), [(-0.5, 0.025), (0.0, 0.0), (-2.0, 0.0)])
def test_a_claim_with_a_margin_is_rarely_true_by_chance(true, share):
    """At the margin itself one side of the two-sided test: 2.5 % of studies. And 0 of the truth
    far below it; where the truth is far above nearly all hold."""
    draws = np.random.default_rng(6).normal(true, 0.1, (600, 4))
    found = [judged((list(row), [0.0] * 4), margin=0.5)[0] for row in draws]
    holds = np.mean([one.verdict == "holds" for one in found])
    refuted = np.mean([one.verdict == "the opposite holds" for one in found])
    if true == -0.5:
        assert (holds, refuted) == pytest.approx((share, share), abs=0.015)
    else:
        assert (holds > 0.95, refuted > 0.95) == (true == 0.0, true == -2.0)
    one = found[0]
    expected = ttest_1samp([v + 0.5 for v in draws[0]], 0)
    assert one.p == pytest.approx(expected.pvalue, rel=1e-5)
    low, high = expected.confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((low - 0.5, high - 0.5))
    assert (one.p < 0.05) == (one.low > -0.5 or one.high < -0.5)  # both say the same


def test_two_one_sided_margins_make_rows_equal_or_not():
    """Claim 10 has both directions: within half a point both hold, two points apart one fails."""
    close, apart = [60.1, 60.0, 60.2], [62.1, 62.0, 62.2]
    base = [60.0, 60.0, 60.0]
    assert [one.verdict for one in judged((close, base), (base, close), margin=0.5)] == [
        "holds", "holds",
    ]  # fmt: skip
    assert [one.verdict for one in judged((apart, base), (base, apart), margin=0.5)] == [
        "holds", "the opposite holds",
    ]  # fmt: skip


def test_holms_correction():
    """By hand: sorted .005 .01 .03 .04 times 4 3 2 1, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    p = np.random.default_rng(3).uniform(0, 0.2, 9)
    bonferroni = np.minimum(1, 9 * p)
    ours = np.array(holm(list(p)))
    assert (ours <= bonferroni + 1e-12).all()
    assert (ours >= false_discovery_control(p)).all()  # Benjamini-Hochberg is milder
    assert ours.min() == pytest.approx(bonferroni.min())


def test_holms_correction_keeps_its_promise():
    """Of families of 5 true nulls about 5 % have a false rejection; uncorrected, 23 %."""
    draws = np.random.default_rng(4).normal(size=(2000, 5, 4))
    p = ttest_1samp(draws, 0, axis=2).pvalue
    wrong = np.mean([min(holm(list(row))) < 0.05 for row in p])
    assert 0.03 < wrong < 0.07
    assert np.mean(p.min(axis=1) < 0.05) > 0.18


@pytest.mark.parametrize(("effect", "n"), [(1.0, 5), (0.5, 20), (2.0, 4)])
def test_power_is_that_of_simulated_studies(effect, n):
    draws = np.random.default_rng(5).normal(effect, 1, (20_000, n))
    found = np.mean(ttest_1samp(draws, 0, axis=1).pvalue < 0.05)
    assert power(effect, n, 0.05) == pytest.approx(found, abs=0.012)


def test_power_is_the_noncentral_t_as_long_as_that_has_digits():
    quantile, shift = t.ppf(0.975, 1), 10 * math.sqrt(2)
    assert power(10, 2, 0.05) == pytest.approx(nct.sf(quantile, 1, shift), rel=1e-6)


def test_two_values_far_from_0_are_not_sure_at_a_small_level():
    """One degree of freedom: Student's t is Cauchy's, and the deviation half normal."""
    shift, level = 200 * math.sqrt(2), 0.05 / 28
    quantile = 1 / math.tan(math.pi * level / 2)
    assert power(200, 2, level) == pytest.approx(
        math.erf(shift / quantile / math.sqrt(2)), rel=0.01
    )
    assert power(200, 2, level) < 0.8
    assert seeds_needed([10.0, 10.1], level) == 3


def test_seeds_needed():
    """Effects 0.5, 0.8 and 1 need 34, 15 and 10 pairs (Cohen's tables, G*Power)."""
    for effect, n in ((0.5, 34), (0.8, 15), (1.0, 10)):
        values = [effect - 1 / 2**0.5, effect + 1 / 2**0.5]  # deviation 1
        assert seeds_needed(values) == n
        assert power(effect, n, 0.05) >= 0.8 > power(effect, n - 1, 0.05)
    assert seeds_needed([1.0, -1.0]) is None  # no difference is never found
    assert seeds_needed([1.01, -0.99]) is None  # nor a tiny one
    assert seeds_needed([1.0]) is None
    assert seeds_needed([1.0, 1.0]) == 2
    assert seeds_needed([5.0, 5.001]) == 2
    one = math.sqrt(0.5)  # so that the deviation is 1
    assert seeds_needed([0.1 - one, 0.1 + one]) == pytest.approx((1.96 + 0.84) ** 2 / 0.01, abs=6)
    assert seeds_needed([0.05 - one, 0.05 + one]) is None  # over a thousand
    assert seeds_needed([1.0, 3.0], 0.001) > seeds_needed([1.0, 3.0], 0.05)


def judged(*pairs, margin=0.0):
    table = {}
    for number, (a, b) in enumerate(pairs):
        table |= {(f"a{number}", "x"): a, (f"b{number}", "x"): b}
    return [
        judge(
            Difference(f"a{n}", f"b{n}", "x", margin=margin), lambda row, metric: table[row, metric]
        )
        for n in range(len(pairs))
    ]


def test_a_family_is_corrected_together():
    zero = [0.0, 0.0, 0.0]
    clear, close, open_, single = judged(
        ([10.0, 10.1, 10.05], zero), ([3.0, 3.5, 2.4], zero), ([1.0, -1.0, 0.5], zero),
        ([4.0, None, None], zero),
    )  # fmt: skip
    assert [one.verdict for one in (clear, close, open_)] == ["holds", "holds", "undecided"]
    both = correct([clear, close, open_, single])
    assert both[0].corrected == pytest.approx(3 * clear.p)  # the one without pairs is no test
    assert both[1].corrected == pytest.approx(2 * close.p)
    assert [one.verdict for one in both] == ["holds", "holds", "undecided", "undecided"]
    many = correct([close, *[open_] * 9])
    assert many[0].verdict == "undecided"
    assert many[0].level == pytest.approx(0.005)  # ten are undecided: Holm's first step
    assert many[0].seeds_needed > close.seeds_needed
    assert both[2].level == pytest.approx(0.05)


def test_a_margin_allows_to_fall_short():
    a, b = [-0.3, -0.35, -0.25], [0.0, 0.0, 0.0]
    (strict,), (lenient,) = judged((a, b)), judged((a, b), margin=1.0)
    assert strict.verdict == "the opposite holds"
    assert lenient.verdict == "holds"
    assert lenient.mean == strict.mean == pytest.approx(-0.3)
    assert lenient.low == strict.low  # of the difference itself
    (worse,) = judged(([-3.0, -3.1, -2.9], b), margin=1.0)
    assert worse.verdict == "the opposite holds"

"""Learning rate and momentum, each step against a plain loop."""

import math

import pytest

from pipeline.config.recipe import RECIPES, load_recipe
from pipeline.config.schedules import ema_momentum, learning_rate, warmup_cosine


def plain(peak, low, warmup, total):
    """The rates of whole numbers of steps: a ramp of `warmup` steps, then half a cosine."""
    rates = [peak * step / warmup for step in range(warmup)]
    for step in range(total - warmup):
        angle = math.pi * step / (total - warmup)
        rates.append((peak + low) / 2 + (peak - low) / 2 * math.cos(angle))
    return rates


@pytest.mark.parametrize(
    ("peak", "low", "warmup", "total"),
    [(0.3, 0.0, 5, 40), (2.0, 0.25, 7, 31), (1e-3, 1e-6, 1, 2), (0.5, 0.1, 0, 12)],
)
def test_every_step_follows_the_plain_loop(peak, low, warmup, total):
    rates = [warmup_cosine(s, peak=peak, total=total, warmup=warmup, low=low) for s in range(total)]
    assert rates == pytest.approx(plain(peak, low, warmup, total), rel=1e-12, abs=1e-15)
    assert rates[warmup] == peak  # the first step after warm-up has the peak itself


def test_past_the_end_the_rate_stays_low():
    for step in (31, 32, 45, 62, 10**6):  # 55 would be the peak again, were the cosine not cut
        rate = warmup_cosine(step, peak=2.0, total=31, warmup=7, low=0.25)
        assert rate == pytest.approx(0.25, abs=1e-12)
    assert warmup_cosine(55, peak=2.0, total=31, warmup=7) == pytest.approx(0.0, abs=1e-12)


def test_steps_may_be_fractions():
    assert warmup_cosine(2, peak=1.0, total=10, warmup=2.5) == pytest.approx(0.8)
    assert warmup_cosine(3, peak=1.0, total=10, warmup=2.5) == pytest.approx(
        (1 + math.cos(math.pi * 0.5 / 7.5)) / 2
    )


def test_a_warmup_as_long_as_the_run_ends_at_the_peak():
    assert warmup_cosine(4, peak=1.0, total=4, warmup=4) == 1.0


def test_the_learning_rate_of_a_recipe():
    recipe = load_recipe(
        RECIPES / "rmae.yaml",
        ["optimizer.min_lr=1e-5", "optimizer.epochs=10", "optimizer.warmup_epochs=2"],
    )
    expected = plain(3.0e-4 * 1024 / 256, 1e-5, 2 * 5, 10 * 5)
    assert [learning_rate(recipe, s, 5) for s in range(50)] == pytest.approx(expected, rel=1e-12)
    assert learning_rate(recipe, 60, 5) == pytest.approx(1e-5)
    shipped = load_recipe(RECIPES / "rmae.yaml")
    assert 0 < learning_rate(shipped, 100 * 1251 - 1, 1251) < 1e-11


def test_the_teachers_momentum():
    constant = load_recipe(RECIPES / "cmae.yaml")
    cosine = load_recipe(RECIPES / "cmae.yaml", ["ema.schedule=cosine", "ema.momentum=0.99"])
    for step in range(0, 101, 10):
        assert ema_momentum(constant, step, 100) == 0.996
        expected = 1 - 0.005 * (1 + math.cos(math.pi * step / 100))
        assert ema_momentum(cosine, step, 100) == pytest.approx(expected, rel=1e-12)
    assert ema_momentum(cosine, 0, 100) == pytest.approx(0.99)
    assert ema_momentum(cosine, 100, 100) == 1.0

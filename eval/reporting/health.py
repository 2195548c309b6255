"""Is a run healthy? One verdict per check, with its threshold and the reason for it."""

import math
from dataclasses import dataclass
from statistics import median

from eval.reporting.run_records import Run

GOOD, LOOK, BAD, UNKNOWN = "good", "look", "bad", "no data"
ORDER = (BAD, LOOK, GOOD, UNKNOWN)
FEW = 5  # logged steps below which a course cannot be judged

FALL, RISE = 0.02, 0.2
SPREAD, COLLAPSED = 0.25, 0.1
MARGIN = 0.05
SKIPPED = 0.01
WAIT, STARVED = 0.1, 0.3
SPIKE, VANISHED = 10.0, 1e-6


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: verdict, what was found, and the rule that decides."""

    name: str
    verdict: str
    found: str
    rule: str


def check_run(run: Run) -> list[Check]:
    """The checks that this run's measure logs something for, or should."""
    checks = [_loss(run), _features(run)]
    if run.series("negative")[1]:
        checks.append(_pairs(run))
    return [*checks, _gradient(run), _skipped(run), _samples(run), _wait(run)]


def overall(checks: list[Check]) -> str:
    """The worst verdict; "no data" only where no check has any."""
    found = {check.verdict for check in checks}
    return next(verdict for verdict in ORDER if verdict in found or verdict == UNKNOWN)


def ends(values: list[float]) -> tuple[float, float]:
    """Medians of the first and of the last fifth, without the first value (start-up)."""
    body = values[1:]
    size = max(1, len(body) // 5)
    return median(body[:size]), median(body[-size:])


def _loss(run: Run) -> Check:
    name = "loss falls"
    rule = (
        f"the last fifth is {FALL:.0%} below the first, and has not climbed back {RISE:.0%} of the "
        "way from the lowest (a rising loss: lower the learning rate)"
    )
    steps, values = run.series("loss")
    if gaps := _gaps(run, "loss", name, rule):
        return gaps
    if len(values) < FEW:
        return Check(name, UNKNOWN, f"{len(values)} logged steps, {FEW} needed", rule)
    first, last = ends(values)
    size = max(1, (len(values) - 1) // 5)
    windows = {
        steps[n + size]: median(values[n + 1 : n + 1 + size]) for n in range(len(values) - size)
    }
    lowest = min(windows, key=windows.__getitem__)
    back = (last - windows[lowest]) / max(first - windows[lowest], 1e-12)
    found = f"{first:.4g} → {last:.4g}"
    if first - last < FALL * abs(first):
        return Check(name, BAD if last > first * (1 + FALL) else LOOK, found, rule)
    if back > RISE:
        return Check(
            name, LOOK, f"{found}, lowest {windows[lowest]:.4g} at step {lowest:.0f}", rule
        )
    return Check(name, GOOD, found, rule)


def _gaps(run: Run, key: str, name: str, rule: str) -> Check | None:
    """A quantity that was not finite in some logged steps, which leave it out: bad where the
    newest is one of them."""
    without = [key not in row for row in run.metrics]
    if not any(without):
        return None
    found = f"not finite in {sum(without)} of {len(without)} logged steps"
    return Check(name, BAD if without[-1] else LOOK, found, rule)


def _features(run: Run) -> Check:
    rule = (
        f"at least {SPREAD}; below {COLLAPSED} all images have nearly the same features "
        "(1: spread evenly, 0: collapsed)"
    )
    values = run.series("feature_std")[1]
    if not values:
        return Check("features do not collapse", UNKNOWN, "feature_std is not logged", rule)
    last = median(values[-max(1, len(values) // 5) :])
    verdict = BAD if last < COLLAPSED else LOOK if last < SPREAD else GOOD
    return Check("features do not collapse", verdict, f"feature_std {last:.2f}", rule)


def _pairs(run: Run) -> Check:
    rule = (
        f"mean cosines at the end, {MARGIN} apart; otherwise two views of an image are no more "
        "alike than two images"
    )
    positive, negative = run.series("positive")[1], run.series("negative")[1]
    if not positive or not negative:
        return Check("positives above negatives", UNKNOWN, "one of them is not logged", rule)
    high, low = positive[-1], negative[-1]
    verdict = GOOD if high - low >= MARGIN else LOOK if high > low else BAD
    if len(positive) < FEW and verdict != GOOD:
        verdict = UNKNOWN
    return Check("positives above negatives", verdict, f"{high:.2f} against {low:.2f}", rule)


def _gradient(run: Run) -> Check:
    name = "gradient norm is steady"
    rule = (
        f"finite, above {VANISHED:g}, in the second half below {SPIKE:.0f} times its median "
        "(spikes: clip the gradient or lower the learning rate)"
    )
    values = run.series("grad_norm")[1]
    if not values:
        return Check(name, UNKNOWN, "grad_norm is not logged", rule)
    if gaps := _gaps(run, "grad_norm", name, rule):
        return gaps
    half = values[len(values) // 2 :]
    middle, most = median(half), max(half)
    found = f"median {middle:.3g}, most {most:.3g}"
    if middle < VANISHED:
        return Check(name, BAD, found, rule)
    return Check(name, LOOK if most > SPIKE * middle else GOOD, found, rule)


def _skipped(run: Run) -> Check:
    rule = (
        f"none whose gradient was not finite; up to {SKIPPED:.0%} may be chance, more: another "
        "precision or a lower learning rate"
    )
    values = run.series("nonfinite_steps")[1] or run.series("skipped_steps")[1]
    if not values:
        return Check("no skipped steps", UNKNOWN, "not logged", rule)
    skipped, steps = max(values), run.metrics[-1]["step"]
    verdict = GOOD if not skipped else LOOK if skipped <= SKIPPED * steps else BAD
    return Check("no skipped steps", verdict, f"{skipped:.0f} of {steps:.0f}", rule)


def _samples(run: Run) -> Check:
    rule = "damaged ones are left out and counted; shard_tools/verify_shards.py finds them"
    values = run.series("bad_samples")[1] or run.series("skipped")[1]
    if not values:
        return Check("every image decodes", UNKNOWN, "not logged", rule)
    return Check(
        "every image decodes", LOOK if max(values) else GOOD, f"{max(values):.0f} bad", rule
    )


def _wait(run: Run) -> Check:
    rule = (
        f"median share of the step, at most {WAIT:.0%}; above {STARVED:.0%} the loader sets the "
        "speed: more data.workers or a faster disk"
    )
    wait = run.typical("data_wait")
    if wait is None or not math.isfinite(wait):
        return Check("data is in time", UNKNOWN, "not logged", rule)
    verdict = BAD if wait > STARVED else LOOK if wait > WAIT else GOOD
    return Check("data is in time", verdict, f"{wait:.1%} waiting", rule)

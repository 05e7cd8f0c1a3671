"""Curves of several seeds a side: bands, and whether the sides are the same, different, or not to be told apart yet.

What is tested is declared before anything is looked at: for each metric the mean of the last quarter of its curve and
the mean of the whole curve, one number a seed each. d = mean of side B minus mean of side A.

    difference   t-test of d = 0: of the seeds' own differences where both sides have the same seeds (paired), else
                 Welch's. p-values are corrected by Holm over all metrics and both summaries: a comparison of two equal
                 sides is called different in at most 5 of 100 cases, however many metrics it has.
    equivalence  two one-sided t-tests (TOST) of |d| < margin, at 5 %. The margin is in units of the pooled standard
                 deviation across seeds, and 1 by default: changing the trainer moves the mean by less than changing
                 the seed moves a run. Half of that would need about 70 unpaired seeds a side, and nobody runs them.

A metric is `different` where a difference is significant, unless the 95 % interval of d lies within a tenth of the
seeds' standard deviation (paired runs can show rounding itself to be significant); it is the `same` where equivalence
is shown for both summaries; else one `cannot tell`.

Power: `detectable` is the difference that this test, with these seeds, finds in 8 of 10 cases. `more_seeds` is how many
are missing until a difference of 0 would be shown equivalent *and* one of the size of the margin found, each in 8 of 10
cases. It does not use the difference that was seen, unless there are seeds enough already: then the truth lies near the
margin, and it is the number that would find the difference that was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy import special

Outcome = Literal["same within noise", "different", "cannot tell"]
Curves = Mapping[int, Float[np.ndarray, " steps"]]  # by seed

LEVEL = 0.05
POWER = 0.8
MARGIN = 1.0  # pooled standard deviations across seeds
NEGLIGIBLE = 0.1  # the same units: a significant difference below this is still the same
MAX_SEEDS = 200
SUMMARIES: Mapping[str, Callable[[np.ndarray], float]] = {
    "last quarter": lambda curve: float(curve[-max(1, len(curve) // 4) :].mean()),
    "whole curve": lambda curve: float(curve.mean()),
}


@dataclass(frozen=True, kw_only=True)
class Band:
    """Mean over the seeds at each step, and the half-width of its 95 % interval (0 for one seed)."""

    mean: Float[np.ndarray, " steps"]
    half_width: Float[np.ndarray, " steps"]


@dataclass(frozen=True, kw_only=True)
class Test:
    """One summary of one metric. difference: B minus A. deviation: pooled across seeds. interval: 95 %, of the
    difference. p_different is corrected by Holm. detectable, margin: in the metric's own units. None: too few seeds."""

    summary: str
    means: tuple[float, float]
    difference: float
    deviation: float | None
    interval: tuple[float, float] | None
    margin: float | None
    p_raw: float | None
    p_different: float | None
    p_same: float | None
    detectable: float | None
    more_seeds: int | None

    @property
    def is_negligible(self) -> bool:
        if self.interval is None or self.deviation is None:
            return False
        return max(abs(end) for end in self.interval) <= NEGLIGIBLE * self.deviation

    @property
    def is_different(self) -> bool:
        return self.p_different is not None and self.p_different < LEVEL and not self.is_negligible

    @property
    def is_same(self) -> bool:
        return self.p_same is not None and self.p_same < LEVEL and not self.is_different


@dataclass(frozen=True, kw_only=True)
class MetricVerdict:
    """bands: of side A and of side B. more_seeds: a side, where one cannot tell; None beyond MAX_SEEDS."""

    metric: str
    steps: Sequence[int]
    bands: tuple[Band, Band]
    tests: Sequence[Test]
    is_paired: bool

    @property
    def outcome(self) -> Outcome:
        if any(test.is_different for test in self.tests):
            return "different"
        return "same within noise" if all(test.is_same for test in self.tests) else "cannot tell"

    @property
    def more_seeds(self) -> int | None:
        wanted = [test.more_seeds for test in self.tests if not test.is_same]
        known = [one for one in wanted if one is not None]
        return None if len(known) < len(wanted) or not known else max(known)


def band(curves: Curves) -> Band:
    """The band of one side."""
    values = np.stack(list(curves.values()))
    n = len(values)
    width = np.zeros(values.shape[1])
    if n > 1:
        width = _quantile(n - 1, 1 - LEVEL / 2) * values.std(axis=0, ddof=1) / math.sqrt(n)
    return Band(mean=values.mean(axis=0), half_width=width)


def judge(
    curves: Mapping[str, tuple[Curves, Curves]], steps: Mapping[str, Sequence[int]], *, margin: float = MARGIN
) -> list[MetricVerdict]:
    """The verdict on each metric. curves: metric -> (side A, side B), each by seed; all of a metric as long as its
    `steps`. margin: in pooled standard deviations across seeds."""
    if not margin > 0:
        raise ValueError(f"the margin must be above 0, got {margin}")
    num_tests = len(curves) * len(SUMMARIES)
    raw = {
        metric: [
            _test(name, summary, a, b, margin=margin, level=LEVEL / num_tests) for name, summary in SUMMARIES.items()
        ]
        for metric, (a, b) in curves.items()
    }
    corrected = iter(holm([test.p_raw for tests in raw.values() for test in tests]))
    return [
        MetricVerdict(
            metric=metric,
            steps=steps[metric],
            bands=(band(curves[metric][0]), band(curves[metric][1])),
            tests=[_with_p(test, next(corrected)) for test in tests],
            is_paired=_is_paired(*curves[metric]),
        )
        for metric, tests in raw.items()
    ]


def overall(verdicts: Sequence[MetricVerdict]) -> tuple[Outcome, int | None]:
    """Different where any metric is, the same where all are; and how many more seeds a side where one cannot tell
    (None: more than MAX_SEEDS)."""
    if any(one.outcome == "different" for one in verdicts):
        return "different", None
    unsure = [one.more_seeds for one in verdicts if one.outcome == "cannot tell"]
    if not unsure:
        return "same within noise", None
    known = [one for one in unsure if one is not None]
    return "cannot tell", max(known) if len(known) == len(unsure) else None


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None (no test was made) stays."""
    order = sorted((value, index) for index, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, index) in enumerate(order):
        largest = max(largest, min(1.0, value * (len(order) - rank)))
        corrected[index] = largest
    return corrected


def _with_p(test: Test, p: float | None) -> Test:
    return Test(**{**vars(test), "p_different": p})


def _is_paired(a: Curves, b: Curves) -> bool:
    return set(a) == set(b)


def _test(
    name: str, summary: Callable[[np.ndarray], float], a: Curves, b: Curves, *, margin: float, level: float
) -> Test:
    """level: of the strictest test that Holm may ask for, for `detectable`."""
    left, right = (np.array([summary(side[seed]) for seed in sorted(side)]) for side in (a, b))
    difference = float(right.mean() - left.mean())
    nothing = Test(
        summary=name, means=(float(left.mean()), float(right.mean())), difference=difference, deviation=None,
        interval=None, margin=None, p_raw=None, p_different=None, p_same=None, detectable=None, more_seeds=None,
    )  # fmt: skip
    if min(len(left), len(right)) < 2:
        return nothing
    n, paired = min(len(left), len(right)), _is_paired(a, b)
    variances = [float(side.var(ddof=1)) for side in (left, right)]
    deviation = math.sqrt(np.average(variances, weights=[len(left) - 1, len(right) - 1]))
    if paired:
        error, freedom = float((right - left).std(ddof=1)) / math.sqrt(n), n - 1.0
    else:
        parts = [variance / len(side) for variance, side in zip(variances, (left, right), strict=True)]
        error = math.sqrt(sum(parts))
        weights = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (left, right), strict=True))
        freedom = error**4 / weights if weights else len(left) + len(right) - 2.0
    bound = margin * deviation
    half = float(_quantile(freedom, 1 - LEVEL / 2)) * error
    p_same = max(_p(bound - difference, error, freedom), _p(bound + difference, error, freedom))
    one_seed = error * math.sqrt(n)  # the error with a single (pair of) seed(s)
    return Test(
        **{
            **vars(nothing),
            "deviation": deviation,
            "interval": (difference - half, difference + half),
            "margin": bound,
            "p_raw": _p(abs(difference), error, freedom, sides=2),
            "p_same": p_same,
            "detectable": _detectable(error, freedom, level),
            "more_seeds": None
            if p_same < LEVEL
            else _more_seeds(n, abs(difference), one_seed, bound, paired=paired, level=level),
        }
    )


def _p(distance: float, error: float, freedom: float, *, sides: int = 1) -> float:
    """p-value of a t-test that rejects for a large `distance`. Without any spread the distance decides alone."""
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return sides * float(special.stdtr(freedom, -distance / error))


def _detectable(error: float, freedom: float, level: float) -> float:
    return error * float(_quantile(freedom, 1 - level / 2) + _quantile(freedom, POWER))


def _power(
    distance: float, errors: Float[np.ndarray, " sizes"], freedoms: Float[np.ndarray, " sizes"], critical: np.ndarray
) -> Float[np.ndarray, " sizes"]:
    """Of a t-test to reject, the truth being `distance` away (the noncentral t by a shifted central one)."""
    if not errors[0]:
        return np.ones_like(errors)
    return special.stdtr(freedoms, distance / errors - critical)


def _quantile(freedom: Any, share: float) -> Any:
    """Of Student's t. (scipy.stats says the same, a hundred times slower.)"""
    return special.stdtrit(freedom, share)


def _more_seeds(n: int, seen: float, one_seed: float, bound: float, *, paired: bool, level: float) -> int | None:
    """Seeds a side beyond the n that are there; None beyond MAX_SEEDS."""

    sizes = np.arange(n, MAX_SEEDS + 1)
    errors, freedoms = one_seed / np.sqrt(sizes), (sizes - 1.0) * (1 if paired else 2)
    strict, loose = _quantile(freedoms, 1 - level / 2), _quantile(freedoms, 1 - LEVEL)
    found = _power(bound, errors, freedoms, strict)
    shown = 2 * _power(bound, errors, freedoms, loose) - 1
    enough = (found >= POWER) & (shown >= POWER)
    if enough[0]:
        enough = _power(seen, errors, freedoms, strict) >= POWER
    later = np.flatnonzero(enough[1:])
    return int(later[0]) + 1 if later.size else None

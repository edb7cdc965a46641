"""What the intervals promise, simulated: how often they hold the truth, and how often they tell apart what is alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
from scipy.stats import rv_continuous

from ml2o_dist.evaluation.statistics import Interval, Strata, improvement_interval, iqm_interval, paired_interval

lognorm, norm = scipy.stats.lognorm, scipy.stats.norm
SHAPES: dict[str, Sequence[rv_continuous]] = {
    "normal": [norm()],
    "log-normal": [lognorm(1.0)],
    "heavy tails": [scipy.stats.t(3)],
    "three normal problems": [norm(0, 1), norm(1, 0.3), norm(3, 2)],
    "three log-normal problems": [lognorm(0.5), lognorm(0.8, scale=1.5), lognorm(1.0, scale=2)],
    "three spreads": [norm(0, 1), norm(0, 0.1), norm(0, 3)],
}
"""One distribution per problem, of the figures of its seeds."""


def true_iqm(problems: Sequence[rv_continuous]) -> float:
    """Twice the integral of x over the middle half of the mixture."""

    def cdf(x: float) -> float:
        return float(np.mean([problem.cdf(x) for problem in problems]))

    low, high = (scipy.optimize.brentq(lambda x, p=p: cdf(x) - p, -100, 100) for p in (0.25, 0.75))
    # by parts: the integral of x dF from low to high
    return 2 * (0.75 * high - 0.25 * low - scipy.integrate.quad(cdf, low, high, limit=200)[0])


def draws(problems: Sequence[rv_continuous], seeds: int, count: int) -> list[Strata]:
    """`count` sets of figures of one optimizer on all problems."""
    stream = np.random.default_rng(seeds)
    figures = [problem.rvs(size=(count, seeds), random_state=stream) for problem in problems]
    return [[figures[k][i].tolist() for k in range(len(problems))] for i in range(count)]


def share_holding(truth: float, intervals: Sequence[Interval]) -> float:
    return float(np.mean([found.low <= truth <= found.high for found in intervals]))


def test_the_true_iqm_is_that_of_a_large_sample() -> None:
    assert true_iqm([norm(2, 3)]) == pytest.approx(2)
    problems = SHAPES["three log-normal problems"]
    sample = [problem.rvs(size=300_000, random_state=k) for k, problem in enumerate(problems)]
    assert true_iqm(problems) == pytest.approx(scipy.stats.trim_mean(np.concatenate(sample), 0.25), rel=0.005)


@pytest.mark.parametrize("shape", ["normal", "log-normal", "three normal problems"])
@pytest.mark.parametrize("seeds", [3, 10])
def test_intervals_of_few_seeds_hold_the_true_value(shape: str, seeds: int) -> None:
    """Unexpanded, those of 3 seeds hold it in 75 to 80 % of cases."""
    found = [iqm_interval(figures, repetitions=400) for figures in draws(SHAPES[shape], seeds, 500)]
    assert share_holding(true_iqm(SHAPES[shape]), found) >= 0.90


@pytest.mark.parametrize("shape", ["normal", "log-normal", "three spreads"])
def test_intervals_of_many_seeds_hold_the_true_value_as_often_as_they_say(shape: str) -> None:
    found = [iqm_interval(figures, repetitions=400) for figures in draws(SHAPES[shape], 50, 1000)]
    assert 0.93 <= share_holding(true_iqm(SHAPES[shape]), found) <= 0.97


@pytest.mark.parametrize(("seeds", "most"), [(10, 28), (50, 18)])
@pytest.mark.parametrize("compare", [paired_interval, improvement_interval])
def test_rules_that_are_alike_are_seldom_told_apart(seeds: int, most: int, compare: Callable[..., Interval]) -> None:
    """In 10 of 200 comparisons at the nominal level, whose standard deviation is 3."""
    nothing = 0.0 if compare is paired_interval else 0.5
    runs = draws(SHAPES["three log-normal problems"], seeds, 400)
    found = [compare(a, b, repetitions=400) for a, b in zip(runs[::2], runs[1::2], strict=True)]
    assert 200 * (1 - share_holding(nothing, found)) <= most


@pytest.mark.parametrize(("shift", "seeds"), [(0.0, 5), (1.0, 10), (2.33, 10), (3.3, 10)])
def test_improvement_intervals_hold_the_true_probability_up_to_its_ends(shift: float, seeds: int) -> None:
    """Of normal losses P(X < Y) is the normal distribution at shift / sqrt(2): 0.5, 0.76, 0.95 and 0.99."""
    runs = draws([norm()], seeds, 600)
    found = [
        improvement_interval(a, [[y + shift for y in b[0]]], repetitions=400)
        for a, b in zip(runs[::2], runs[1::2], strict=True)
    ]
    assert share_holding(float(norm.cdf(shift / math.sqrt(2))), found) >= 0.90


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_hold_the_true_value_as_often_as_they_say(shape: str) -> None:
    truth = true_iqm(SHAPES[shape])
    for seeds, least, most in ((10, 0.93, 1.0), (50, 0.93, 0.97)):
        found = [iqm_interval(figures, repetitions=1000) for figures in draws(SHAPES[shape], seeds, 2000)]
        assert least <= share_holding(truth, found) <= most


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_rules_that_are_alike_are_told_apart_as_seldom_as_they_should(shape: str) -> None:
    for seeds, most in ((10, 14), (50, 14)):
        runs = draws(SHAPES[shape], seeds, 4000)
        found = [paired_interval(a, b, repetitions=1000) for a, b in zip(runs[::2], runs[1::2], strict=True)]
        assert 200 * (1 - share_holding(0.0, found)) <= most

"""Statistics against scipy and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch

from ml2o_dist.evaluation.statistics import (
    Interval,
    PairedDifference,
    Strata,
    exponential_average,
    improvement_interval,
    interquartile_mean,
    iqm_interval,
    mean_and_standard_error,
    paired_difference,
    paired_interval,
    probability_of_improvement,
    share_interval,
)

INF, NAN = math.inf, math.nan


def strata(*sizes: int, seed: int = 0) -> list[list[float]]:
    """Log-normal figures, a problem of each size; later problems lie higher and spread further."""
    stream = np.random.default_rng(seed)
    return [((1 + k) * np.exp(0.3 * (1 + k) * stream.normal(size=n))).tolist() for k, n in enumerate(sizes)]


def ends(interval: Interval) -> tuple[float, float, float]:
    return interval.low, interval.estimate, interval.high


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_mean_and_standard_error_equal_scipy(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).tolist()
    mean, error = mean_and_standard_error(values)
    assert mean == pytest.approx(sum(values) / count, rel=1e-12)
    assert error == pytest.approx(scipy.stats.sem(values), rel=1e-12)


def test_one_value_has_no_standard_error_and_none_is_refused() -> None:
    mean, error = mean_and_standard_error([3.0])
    assert mean == 3.0
    assert math.isnan(error)
    with pytest.raises(ValueError, match="no values"):
        mean_and_standard_error([])


@pytest.mark.parametrize("count", [2, 5, 17])
def test_paired_difference_equals_the_paired_t_statistic(count: int) -> None:
    stream = torch.Generator().manual_seed(count)
    reference = (torch.randn(count, generator=stream, dtype=torch.float64) * 100).tolist()
    losses = [r + d for r, d in zip(reference, torch.randn(count, generator=stream).double().tolist(), strict=True)]
    difference = paired_difference(losses, reference)
    assert difference.pairs == count
    t = scipy.stats.ttest_rel(losses, reference).statistic
    assert difference.mean / difference.standard_error == pytest.approx(t, rel=1e-9)
    swapped = paired_difference(reference, losses)
    assert (swapped.mean, swapped.standard_error) == pytest.approx((-difference.mean, difference.standard_error))


def test_pairing_removes_what_the_seeds_share() -> None:
    reference = [1.0, 100.0, 10_000.0]
    difference = paired_difference([r + d for r, d in zip(reference, (1.0, 2.0, 3.0), strict=True)], reference)
    assert difference.mean == pytest.approx(2.0)
    assert difference.standard_error == pytest.approx(1 / math.sqrt(3))


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 losses.*paired.* 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("mean", "error", "no_worse", "verdict"),
    [
        (-3.0, 1.0, True, "better by more than one standard error"),
        (-1.0, 1.0, True, "no worse within one standard error"),
        (1.0, 1.0, True, "no worse within one standard error"),
        (1.001, 1.0, False, "worse by more than one standard error"),
        (0.0, math.nan, True, "no worse within one standard error"),
        (0.001, math.nan, False, "worse by more than one standard error"),
        (-math.inf, math.nan, True, "better by more than one standard error"),
        (math.inf, math.nan, False, "worse by more than one standard error"),
        (math.nan, math.nan, False, "both diverged"),
    ],
)
def test_verdicts(mean: float, error: float, no_worse: bool, verdict: str) -> None:
    difference = PairedDifference(mean, error, 5)
    assert difference.no_worse_within_one_se is no_worse
    assert difference.verdict == verdict


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_is_infinitely_worse(bad: float) -> None:
    assert paired_difference([1.0, bad], [1.0, 1.0]).mean == math.inf
    assert paired_difference([1.0, 1.0], [1.0, bad]).mean == -math.inf
    assert math.isnan(paired_difference([1.0, bad], [1.0, bad]).mean)
    assert math.isnan(paired_difference([bad, 1.0], [1.0, bad]).mean)


def test_exponential_average_is_the_weighted_mean() -> None:
    values = [3.0, -1.0, 4.0, 1.0, 5.0]
    smooth = exponential_average(values, span=2.0)
    for k in range(len(values)):
        weights = [math.exp(-(k - j) / 2.0) for j in range(k + 1)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert smooth[k] == pytest.approx(expected, rel=1e-12)


def test_exponential_average_steps_over_gaps() -> None:
    smooth = exponential_average([2.0, math.nan, 2.0, math.inf], span=3.0)
    assert math.isnan(smooth[1])
    assert math.isnan(smooth[3])
    assert smooth[2] == pytest.approx(2.0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 30, 101])
def test_interquartile_mean_equals_scipys_trimmed_mean(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert interquartile_mean(values) == pytest.approx(scipy.stats.trim_mean(values, 0.25), rel=1e-12)


def test_interquartile_mean_by_hand() -> None:
    assert interquartile_mean([1e9, 3.0, 1.0, 2.0, -1e9]) == 2.0
    assert interquartile_mean([[8.0, 1.0, 2.0], [-5.0, 100.0, 4.0]]) == pytest.approx((1 + 2 + 4 + 8) / 4)


@pytest.mark.parametrize("refused", [[], [1.0, INF, 2.0, 3.0], [NAN]])
def test_interquartile_mean_takes_only_finite_values(refused: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no values|not finite"):
        interquartile_mean(refused)


def test_an_interval_is_the_percentile_interval_widened_by_hesterbergs_factor() -> None:
    """The IQM of 3 seeds is their mean, so that all 27 resamples can be written down."""
    seeds = (1.0, 2.0, 4.5)
    means = np.repeat([np.mean(drawn) for drawn in itertools.product(seeds, repeat=3)], 1000)
    factor = math.sqrt(3 / 2) * scipy.stats.t.ppf(0.95, 2) / scipy.stats.norm.ppf(0.95)
    low, high = 2.5 + factor * (np.quantile(means, [0.05, 0.95]) - 2.5)
    assert ends(iqm_interval([seeds], level=0.9, repetitions=20_000)) == pytest.approx((low, 2.5, high))


@pytest.mark.parametrize("outlier", [0.0, 1000.0])
@pytest.mark.parametrize("sizes", [(8,), (5, 5), (5, 9, 20), (2, 10), (10, 3)])
def test_problems_are_resampled_apart_and_weigh_by_their_winsorised_spread(
    sizes: tuple[int, ...], outlier: float
) -> None:
    samples = [np.array(figures) for figures in strata(*sizes, seed=5)]
    samples[-1][0] += outlier
    stream = np.random.default_rng(99)
    drawn = np.concatenate([stream.choice(sample, (40_000, len(sample))) for sample in samples], axis=1)
    pooled = np.concatenate(samples)
    estimate = scipy.stats.trim_mean(pooled, 0.25)
    quantiles = np.quantile(scipy.stats.trim_mean(drawn, 0.25, axis=1), [0.025, 0.975])
    winsorised = np.split(scipy.stats.mstats.winsorize(pooled, (0.25, 0.25)).data, np.cumsum(sizes)[:-1])
    parts = [len(part) * np.var(part, ddof=1) for part in winsorised]  # Welch and Satterthwaite's formula by hand
    freedom = sum(parts) ** 2 / sum(part**2 / (n - 1) for part, n in zip(parts, sizes, strict=True))
    growth = sum(parts) / sum(len(part) * np.var(part) for part in winsorised)
    factor = math.sqrt(growth) * scipy.stats.t.ppf(0.975, freedom) / scipy.stats.norm.ppf(0.975)
    low, high = estimate + factor * (quantiles - estimate)
    assert ends(iqm_interval([s.tolist() for s in samples], repetitions=40_000)) == pytest.approx(
        (low, estimate, high), abs=0.03 * (high - low)
    )


def test_an_interval_moves_with_its_figures_and_turns_with_their_sign() -> None:
    figures = strata(10, 7)
    low, estimate, high = ends(iqm_interval(figures))
    moved = iqm_interval([[3 - 2 * value for value in problem] for problem in figures])
    assert ends(moved) == pytest.approx((3 - 2 * high, 3 - 2 * estimate, 3 - 2 * low))


def test_intervals_are_equal_for_one_seed_and_differ_for_another() -> None:
    ours, theirs = strata(6, 6), strata(6, 6, seed=1)
    makers: tuple[Callable[[int], Interval], ...] = (
        lambda seed: iqm_interval(ours, seed=seed),
        lambda seed: paired_interval(ours, theirs, seed=seed),
        lambda seed: improvement_interval(ours, theirs, seed=seed),
    )
    for made in makers:
        assert made(0) == made(0)
        assert made(0) != made(1)
        assert made(0).low == pytest.approx(made(1).low, abs=0.2 * (made(0).high - made(0).low))


def test_a_higher_level_has_a_longer_interval() -> None:
    ours, theirs = strata(6, 6), strata(6, 6, seed=1)
    for wide, narrow in (
        (iqm_interval(ours, level=0.99), iqm_interval(ours, level=0.8)),
        (improvement_interval(ours, theirs, level=0.99), improvement_interval(ours, theirs, level=0.8)),
        (share_interval(2, 9, level=0.99), share_interval(2, 9, level=0.8)),
    ):
        assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


@pytest.mark.parametrize("figures", [[[3.0]], [[1.0], [2.0], [4.0]], [[1.0], [2.0, 4.0, 6.0]]])
def test_a_problem_with_one_seed_leaves_no_interval(figures: Strata) -> None:
    others = [[value + 1 for value in problem] for problem in figures]
    for found, estimate in (
        (iqm_interval(figures), interquartile_mean([value for problem in figures for value in problem])),
        (paired_interval(figures, others), -1.0),
        (improvement_interval(figures, others), probability_of_improvement(figures, others)),
    ):
        assert found.estimate == estimate
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_figures_that_do_not_differ_have_an_interval_without_length() -> None:
    assert iqm_interval([[2.0, 2.0, 2.0], [2.0, 2.0]]) == Interval(2.0, 2.0, 2.0)
    assert paired_interval(strata(5, 4), strata(5, 4)) == Interval(0.0, 0.0, 0.0)


def test_figures_all_beyond_the_quartiles_have_an_interval_nevertheless() -> None:
    """Winsorised, neither problem has any spread, so that their own 0.5 and 2 count. The IQM is the mean of the higher
    of the first two and the lower of the others: (0 + 10) / 2 or (1 + 12) / 2 at the least and at the most."""
    freedom = (0.5 + 2) ** 2 / (0.5**2 + 2**2)
    factor = math.sqrt(2) * scipy.stats.t.ppf(0.975, freedom) / scipy.stats.norm.ppf(0.975)
    found = iqm_interval([[0.0, 1.0], [10.0, 12.0]])
    assert ends(found) == pytest.approx((5.5 - 0.5 * factor, 5.5, 5.5 + 1.0 * factor))


def test_pairs_are_compared_seed_by_seed() -> None:
    theirs = strata(8, 8, seed=2)
    ours = [[value - 1 - 0.01 * k for k, value in enumerate(problem)] for problem in theirs]
    found = paired_interval(ours, theirs)
    assert found.estimate == pytest.approx(-1 - 0.01 * 3.5)
    assert -1.08 < found.low < found.high < -1
    apart = paired_interval([problem[::-1] for problem in ours], theirs)
    assert apart.high - apart.low > 10 * (found.high - found.low)
    assert ends(paired_interval(theirs, ours)) == pytest.approx(tuple(-end for end in reversed(ends(found))))


@pytest.mark.parametrize("sizes", [(4,), (7, 3), (5, 5, 9)])
def test_probability_of_improvement_is_mann_whitneys_u(sizes: tuple[int, ...]) -> None:
    ours, theirs = strata(*sizes), strata(*reversed(sizes), seed=1)
    u = [scipy.stats.mannwhitneyu(y, x).statistic / (len(x) * len(y)) for x, y in zip(ours, theirs, strict=True)]
    assert probability_of_improvement(ours, theirs) == pytest.approx(np.mean(u))
    assert probability_of_improvement(theirs, ours) == pytest.approx(1 - np.mean(u))


def test_probability_of_improvement_by_hand() -> None:
    assert probability_of_improvement([[1.0, 2.0]], [[2.0, 3.0]]) == 3.5 / 4
    assert probability_of_improvement([[1.0, INF]], [[INF, 2.0, 0.0]]) == 2.5 / 6  # INF and INF tie
    assert probability_of_improvement([[1.0, 2.0], [5.0]], [[3.0, 3.0], [4.0]]) == 0.5  # the mean over problems


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([[1.0, 2.2, 6.0]], [[2.0, 3.0, 5.0]]),
        ([[1.0, 2.2, 6.0], [1.0, 4.0, 7.0, 9.0]], [[2.0, 3.0, 5.0], [3.0, 2.0, 6.0, 8.0]]),
    ],
)
def test_improvement_interval_is_the_logit_interval_of_all_joint_resamples(ours: Strata, theirs: Strata) -> None:
    variances = []  # of each problem's part of the mean
    for x, y in zip(ours, theirs, strict=True):
        n = len(x)
        wins = [
            scipy.stats.mannwhitneyu([y[i] for i in seeds], [x[i] for i in seeds]).statistic / n**2
            for seeds in itertools.product(range(n), repeat=n)
        ]
        variances.append(np.var(wins) * n / (n - 1) / len(ours) ** 2)
    freedom = sum(variances) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(variances, ours, strict=True))
    p = probability_of_improvement(ours, theirs)
    margin = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(variances)) / (p * (1 - p))
    low, high = (1 / (1 + math.exp(-math.log(p / (1 - p)) + sign * margin)) for sign in (1, -1))
    found = improvement_interval(ours, theirs, repetitions=100_000)
    assert ends(found) == pytest.approx((low, p, high), abs=0.005)


def test_improvement_turns_round_when_the_two_are_exchanged() -> None:
    ours, theirs = strata(6, 9), strata(6, 9, seed=1)
    low, estimate, high = ends(improvement_interval(ours, theirs))
    assert 0 < low < estimate < high < 1
    assert ends(improvement_interval(theirs, ours)) == pytest.approx((1 - high, 1 - estimate, 1 - low))


def test_pairs_that_all_agree_leave_room_for_one_that_does_not() -> None:
    low, high = [[1.0, 2.0, 3.0], [1.0, 2.0]], [[7.0, 8.0, 9.0], [8.0, 9.0]]
    wilson = scipy.stats.binomtest(5, 5).proportion_ci(method="wilson")
    assert ends(improvement_interval(low, high)) == pytest.approx((wilson.low, 1.0, 1.0))
    assert ends(improvement_interval(high, low)) == pytest.approx((0.0, 0.0, 1 - wilson.low))
    mixed = improvement_interval([low[0], high[1]], [high[0], low[1]])
    assert 0 < mixed.low < 0.4 < mixed.estimate == 0.5 < 0.6 < mixed.high < 1


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 10), (5, 10), (10, 10), (0, 1), (3, 200)])
def test_share_interval_is_wilsons(count: int, total: int) -> None:
    oracle = scipy.stats.binomtest(count, total).proportion_ci(0.9, method="wilson")
    found = share_interval(count, total, level=0.9)
    assert ends(found) == pytest.approx((oracle.low, count / total, oracle.high), abs=1e-12)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_of_no_runs_nothing_is_known() -> None:
    found = share_interval(0, 0)
    assert math.isnan(found.estimate)
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: iqm_interval([]), "at least one"),
        (lambda: iqm_interval([[1.0, 2.0], []]), "no values"),
        (lambda: iqm_interval([[1.0, 2.0], [INF, 1.0]]), "1 of 2 values.*not finite"),
        (lambda: iqm_interval([[1.0, 2.0]], level=1.0), "level is 1.0.*0 < level < 1"),
        (lambda: iqm_interval([[1.0, 2.0]], repetitions=1), "1 repetitions"),
        (lambda: paired_interval([[1.0, 2.0]], [[1.0]]), r"\[2\].*paired.*\[1\]"),
        (lambda: paired_interval([[1.0, 2.0]], [[1.0, 2.0], [3.0]]), "paired"),
        (lambda: improvement_interval([[1.0, 2.0]], [[1.0]]), "paired"),
        (lambda: probability_of_improvement([[1.0]], []), "1 problems.* 0"),
        (lambda: probability_of_improvement([], []), "0 problems.* 0"),
        (lambda: probability_of_improvement([[1.0]], [[]]), "without figures"),
        (lambda: probability_of_improvement([[NAN]], [[1.0]]), "NaN"),
        (lambda: share_interval(3, 2), "3 of 2 is no share"),
        (lambda: share_interval(-1, 2), "-1 of 2 is no share"),
        (lambda: share_interval(1, 2, level=0.0), "the level is 0.0"),
        (lambda: share_interval(0, 0, level=5.0), "the level is 5.0"),
    ],
)
def test_what_has_no_interval_is_refused(refused: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()

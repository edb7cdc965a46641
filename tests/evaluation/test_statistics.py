"""Statistics against scipy and closed forms."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from ml2o_dist.evaluation.statistics import (
    PairedDifference,
    exponential_average,
    mean_and_standard_error,
    paired_difference,
)


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
    with pytest.raises(ValueError, match="2 losses cannot be paired with 3"):
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

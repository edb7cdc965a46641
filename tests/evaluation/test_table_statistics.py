"""Tables of optimizers against scipy and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from ml2o_dist.evaluation.table_statistics import delta_m, mean_ranks, performance_profile, ratios_to_best

INF, NAN = math.inf, math.nan
LOSSES = [[1.0, 4.0, INF, INF], [2.0, 2.0, 3.0, INF], [4.0, 2.0, 6.0, INF]]


def test_ratios_to_best_by_hand() -> None:
    assert ratios_to_best(LOSSES).tolist() == [[1, 2, INF, INF], [2, 1, 1, INF], [4, 1, 2, INF]]


def test_ratios_do_not_depend_on_the_scale_of_a_run() -> None:
    losses = np.random.default_rng(0).lognormal(size=(4, 9))
    ratios = ratios_to_best(losses)
    assert ratios_to_best(losses * np.geomspace(1e-8, 1e8, 9)) == pytest.approx(ratios)
    assert ratios.min(axis=0).tolist() == [1.0] * 9


def test_performance_profile_by_hand() -> None:
    profile = performance_profile(ratios_to_best(LOSSES), [0.99, 1, 2, 4, 1e300, INF])
    assert profile.tolist() == [
        [0, 1 / 4, 2 / 4, 2 / 4, 2 / 4, 2 / 4],
        [0, 2 / 4, 3 / 4, 3 / 4, 3 / 4, 3 / 4],
        [0, 1 / 4, 2 / 4, 3 / 4, 3 / 4, 3 / 4],
    ]
    assert performance_profile([1.0, 3.0, NAN], [2.0, 3.0]).tolist() == pytest.approx([1 / 3, 2 / 3])


def test_performance_profile_is_the_empirical_distribution() -> None:
    ratios = np.random.default_rng(1).lognormal(size=37)
    taus = np.linspace(0.1, 5, 50)
    assert performance_profile(ratios, taus) == pytest.approx(scipy.stats.ecdf(ratios).cdf.evaluate(taus))


@pytest.mark.parametrize("high", [3, 1000])
def test_mean_ranks_are_scipys(high: int) -> None:
    """Of three values there are many ties."""
    losses = np.random.default_rng(high).integers(0, high, size=(6, 20)).astype(float)
    losses[losses == 0] = INF
    assert mean_ranks(losses) == pytest.approx(scipy.stats.rankdata(losses, axis=0).mean(axis=1).tolist())


def test_mean_ranks_by_hand() -> None:
    assert mean_ranks(LOSSES) == [(1 + 3 + 3 + 2) / 4, (2 + 1.5 + 1 + 2) / 4, (3 + 1.5 + 2 + 2) / 4]
    assert mean_ranks([[5.0]]) == [1.0]


def test_delta_m_is_below_0_where_it_is_better() -> None:
    assert delta_m([0.5, 3.0], [1.0, 4.0], higher_is_better=False) == pytest.approx(-100 * (1 / 2 + 1 / 4) / 2)
    assert delta_m([0.9, 0.6], [0.6, 0.8], higher_is_better=True) == pytest.approx(-100 * (1 / 2 - 1 / 4) / 2)
    assert delta_m([2.0], [1.0], higher_is_better=False) == pytest.approx(100)
    assert delta_m([-3.0], [-2.0], higher_is_better=False) == pytest.approx(-50)
    assert delta_m([INF, 1.0], [1.0, 1.0], higher_is_better=False) == INF


def test_delta_m_has_no_figure_relative_to_0() -> None:
    assert math.isnan(delta_m([1.0, 1.0], [1.0, 0.0], higher_is_better=False))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: ratios_to_best([[1.0, 0.0]]), "positive losses.* 0"),
        (lambda: ratios_to_best([[1.0, -INF]]), "one is -inf"),
        (lambda: ratios_to_best([[1.0], [NAN]]), "a loss is NaN"),
        (lambda: ratios_to_best([1.0, 2.0]), r"shape \[2\]"),
        (lambda: mean_ranks([[1.0], [NAN]]), "a loss is NaN"),
        (lambda: mean_ranks([[], []]), r"shape \[2, 0\]"),
        (lambda: mean_ranks([[1.0, 2.0], [1.0]]), "inhomogeneous"),
        (lambda: delta_m([1.0], [1.0, 2.0], higher_is_better=True), "1 tasks.* 2"),
        (lambda: delta_m([], [], higher_is_better=True), "0 tasks"),
    ],
)
def test_what_is_no_table_is_refused(refused: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()

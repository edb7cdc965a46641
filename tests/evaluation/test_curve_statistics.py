"""Learning curves against plain loops and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from ml2o_dist.evaluation.curve_statistics import log_area, speedup, steps_to_target, trailing_mean

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("window", [1, 2, 7, 20])
def test_trailing_mean_is_the_mean_of_the_last_steps(window: int) -> None:
    curve = np.random.default_rng(window).normal(size=20)
    means = trailing_mean(curve, window)
    assert len(means) == 20
    for k in range(20):
        if k + 1 < window:
            assert math.isnan(means[k])
        else:
            assert means[k] == pytest.approx(np.mean(curve[k + 1 - window : k + 1]))


def test_a_gap_spoils_only_the_windows_that_hold_it() -> None:
    means = trailing_mean([1.0, 3.0, NAN, 5.0, 7.0, INF, -INF, 1.0, 1.0], 2)
    assert means.tolist() == pytest.approx([NAN, 2.0, NAN, NAN, 6.0, INF, NAN, -INF, 1.0], nan_ok=True)


def test_steps_to_target_counts_from_1_and_waits_for_a_window() -> None:
    curve = [9.0, 1.0, 5.0, 4.0, 3.0, 2.0]
    assert steps_to_target(curve, 1.0, 1) == 2
    assert steps_to_target(curve, 4.5, 2) == 3  # the means of two are 5, 3, 4.5, 3.5, 2.5
    assert steps_to_target(curve, 2.5, 2) == 6
    assert steps_to_target(curve, 2.49, 2) is None
    assert steps_to_target(curve, INF, 6) == 6
    assert steps_to_target([NAN, NAN, 1.0], 2.0, 1) == 3


@pytest.mark.parametrize("factor", [2, 5])
def test_a_curve_that_runs_through_another_so_many_times_as_fast_has_that_speedup(factor: int) -> None:
    steps = np.arange(1, 1001)
    slow, fast = np.exp(-steps / 500), np.exp(-factor * steps / 500)
    assert speedup(fast, slow, 1) == pytest.approx(factor)
    assert speedup(slow, fast, 1) == pytest.approx(1 / factor)
    assert speedup(slow, slow, 50) == 1.0


def test_the_target_of_a_speedup_is_the_higher_end() -> None:
    ours, baseline = [8.0, 4.0, 2.0, 1.0], [8.0, 7.0, 6.0, 4.0]
    assert speedup(ours, baseline, 1) == 4 / 2
    assert speedup(ours, baseline, 2) == 4 / 3  # 5 is the mean of the baseline's last two; ours is at 6, 3, 1.5
    assert speedup(ours, [9.0, 4.0], 1) == 1.0  # of other lengths


@pytest.mark.parametrize("bad", [INF, NAN])
def test_a_diverged_run_has_neither_speedup_nor_area(bad: float) -> None:
    good, diverged = [3.0, 2.0, 1.0], [3.0, bad, 1.0]
    for a, b in ((good, diverged), (diverged, good), (good, []), ([], good)):
        assert math.isnan(speedup(a, b, 1))
        assert math.isnan(log_area(a, b))


def test_log_area_is_the_mean_log_ratio() -> None:
    assert log_area([1.0, 2.0, 8.0], [2.0, 4.0, 16.0]) == pytest.approx(-math.log(2))
    assert log_area([4.0, 1.0], [1.0, 4.0]) == pytest.approx(0.0, abs=1e-12)
    stream = np.random.default_rng(0)
    ours, reference = stream.lognormal(size=(2, 30))
    assert log_area(ours, reference) == pytest.approx(sum(map(math.log, ours / reference)) / 30)
    assert log_area(reference, ours) == pytest.approx(-log_area(ours, reference))


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_log_area_needs_positive_losses(loss: float) -> None:
    assert math.isnan(log_area([1.0, loss], [1.0, 2.0]))
    assert math.isnan(log_area([1.0, 2.0], [1.0, loss]))
    assert speedup([1.0, loss], [1.0, 1.0], 1) == 1.0


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: trailing_mean([1.0, 2.0], 0), "window is 0.*1 to .*2 steps"),
        (lambda: trailing_mean([1.0, 2.0], 3), "the window is 3"),
        (lambda: trailing_mean([[1.0], [2.0]], 1), r"shape \[2, 1\]"),
        (lambda: steps_to_target([], 1.0, 1), "the 0 steps"),
        (lambda: speedup([1.0, 2.0], [1.0], 2), "the window is 2"),
        (lambda: log_area([1.0, 2.0], [1.0]), "2 steps.* 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(refused: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()

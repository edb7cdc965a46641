"""A panel shows the figures that it is given, and is scaled to those that can be told apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ml2o_dist.evaluation.evaluated import Curve, Evaluation, FailedCell
from ml2o_dist.evaluation.statistics import exponential_average
from ml2o_dist.reporting.evaluation_panels import (
    draw_acceptance,
    draw_curves,
    draw_ends,
    draw_profile,
    draw_times,
    end_points,
    profile_losses,
)
from ml2o_dist.reporting.optimizer_looks import optimizer_looks
from tests.evaluation.synthetic import (
    CURVED,
    DIGITS,
    DIGITS_ROWS,
    EVALUATION,
    FRONT,
    MANY,
    STEPS,
    diverged,
    evaluation,
    failed,
    row,
)

LOOKS = optimizer_looks(EVALUATION)


def panel() -> Axes:
    return Figure().subplots()


def lines(drawn: Axes) -> dict[str, np.ndarray]:
    """The y values of the lines by colour."""
    return {to_hex(line.get_color()): np.asarray(line.get_ydata(), dtype=float) for line in drawn.get_lines()}


def said(drawn: Axes) -> list[str]:
    return [text.get_text() for text in drawn.texts]


def test_a_learning_curve_is_the_smoothed_curve_over_its_steps_and_its_band_the_error() -> None:
    drawn = panel()
    draw_curves(drawn, EVALUATION.rows_of(MANY), LOOKS)
    learned = next(each for each in EVALUATION.rows_of(MANY) if each.optimizer == "learned")
    smooth = exponential_average(learned.curve.loss, 120 / 20)
    np.testing.assert_allclose(lines(drawn)[LOOKS["learned"].colour], smooth)
    (line,) = [each for each in drawn.get_lines() if to_hex(each.get_color()) == LOOKS["learned"].colour]
    assert list(line.get_xdata()) == list(range(1, 121))
    (band,) = [each for each in drawn.collections if to_hex(each.get_facecolor()[0]) == LOOKS["learned"].colour]
    errors = exponential_average(learned.curve.error, 120 / 20)
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(max(m + e for m, e in zip(smooth, errors, strict=True)))
    assert heights.min() == pytest.approx(min(m - e for m, e in zip(smooth, errors, strict=True)))


def test_a_diverged_run_does_not_set_the_scale_and_is_counted() -> None:
    drawn = panel()
    draw_curves(drawn, DIGITS_ROWS, LOOKS)
    low, high = drawn.get_ylim()
    assert drawn.get_yscale() == "log"
    assert 0.3 < low < 0.6
    assert 3.9 < high < 10
    assert said(drawn) == ["1 of 6 diverged"]


def test_a_run_that_only_grew_does_not_either() -> None:
    grown = Curve(tuple(range(1, 61)), tuple(4 * 1.3**k for k in range(60)), (0.0,) * 60)
    drawn = panel()
    rows = [row("mean+adam", "p", 0.5), row("mgda+adam", "p", 1e6, curve=grown)]
    draw_curves(drawn, rows, LOOKS)
    assert drawn.get_ylim()[1] < 20
    negative = Curve(grown.steps, tuple(-k / 10 for k in range(60)), (0.0,) * 60)
    drawn = panel()
    draw_curves(drawn, [replace(rows[0], curve=negative), rows[1]], LOOKS)
    assert drawn.get_yscale() == "linear"
    low, high = drawn.get_ylim()
    assert -8 < low < -5
    assert high < 20


def test_where_all_diverged_there_is_a_panel_nevertheless() -> None:
    drawn = panel()
    draw_curves(drawn, [diverged(row("mean+adam", "p", 1.0), 3), diverged(row("mgda+adam", "p", 1.0), 3)], LOOKS)
    assert said(drawn) == ["2 of 2 diverged"]
    nothing = Curve((1, 2), (math.nan, math.nan), (math.nan, math.nan))
    draw_curves(panel(), [row("mean+adam", "p", 1.0, curve=nothing)], LOOKS)


def test_the_profile_counts_the_runs_within_a_factor_of_the_best() -> None:
    a, b = (1.0, 2.0, 8.0, math.inf), (2.0, 1.0, 1.0, 1.0)
    shown = evaluation(
        [row("mean+adam", "p", 1.0, seeds=4, seed_losses=a), row("learned", "p", 1.0, seeds=4, seed_losses=b)]
    )
    losses = profile_losses(shown)
    assert losses == {"mean+adam": list(a), "learned": list(b)}
    drawn = panel()
    draw_profile(drawn, losses, LOOKS)
    by_colour = {to_hex(line.get_color()): line for line in drawn.get_lines()}
    for name, factor, share in [
        ("mean+adam", 1.0, 25), ("mean+adam", 2.1, 50), ("mean+adam", 7.9, 50), ("mean+adam", 8.0, 75),
        ("learned", 1.0, 75), ("learned", 1.9, 75), ("learned", 2.1, 100),
    ]:  # fmt: skip
        line = by_colour[LOOKS[name].colour]
        at = np.searchsorted(np.asarray(line.get_xdata()), factor * (1 + 1e-9), side="right") - 1
        assert np.asarray(line.get_ydata())[at] == share, (name, factor)


def test_problems_whose_losses_are_not_positive_are_not_in_the_profile() -> None:
    rows = [
        row("a", "p", 1.0),
        row("b", "p", 2.0),
        row("a", "q", 1.0, seed_losses=(1.0, -1.0, 1.0)),
        row("b", "q", 2.0),
    ]
    assert {name: len(losses) for name, losses in profile_losses(evaluation(rows)).items()} == {"a": 3, "b": 3}
    assert profile_losses(evaluation(rows[2:])) == {}


def test_runs_that_failed_for_some_optimizer_are_not_in_the_profile() -> None:
    rows = [
        row("a", "p", 1.0, seed_losses=(1.0, math.inf, 3.0)),
        row("b", "p", 2.0, seed_losses=(math.nan, 2.0, 4.0), seeds=2, failed=1),
    ]
    shown = evaluation(rows, failures=[FailedCell("b", "p", 0, None, "no memory")])
    assert profile_losses(shown) == {"a": [math.inf, 3.0], "b": [2.0, 4.0]}
    assert profile_losses(Evaluation.from_json(json.loads(json.dumps(shown.to_json())))) == profile_losses(shown)


def test_an_optimizer_without_any_run_hides_no_other_in_the_profile() -> None:
    rows = [row("a", "p", 1.0), failed(row("b", "p", 2.0))]
    assert profile_losses(evaluation(rows)) == {"a": list(rows[0].seed_losses)}


def test_a_problem_that_an_optimizer_was_not_run_on_is_not_in_the_profile() -> None:
    rows = [row("a", "p", 1.0), row("b", "p", 2.0), row("a", "q", 1.0)]
    assert profile_losses(evaluation(rows)) == {each.optimizer: list(each.seed_losses) for each in rows[:2]}


def test_end_points_of_two_objectives_are_marks_before_the_front() -> None:
    drawn = panel()
    ends = end_points(EVALUATION, CURVED)
    draw_ends(drawn, ends, FRONT, LOOKS)
    (front,) = drawn.get_lines()
    np.testing.assert_array_equal(front.get_xydata(), FRONT)
    marks = {to_hex(each.get_facecolor()[0]): each.get_offsets() for each in drawn.collections}
    assert len(marks) == 3
    np.testing.assert_array_equal(marks[LOOKS["learned"].colour], ends["learned"])
    assert said(drawn) == []
    (low, high), points = drawn.get_xlim(), [point[0] for each in ends.values() for point in each]
    assert low < min(*points, 0)
    assert high > max(points)


def test_end_points_far_outside_are_counted_and_do_not_set_the_scale() -> None:
    ends = {"mean+adam": [(0.1 * k, 1 - 0.1 * k) for k in range(8)], "mgda+adam": [(1e9, 0.5), (0.5, 1e7)]}
    drawn = panel()
    draw_ends(drawn, ends, (), LOOKS)
    assert said(drawn) == ["2 end points far outside"]
    assert drawn.get_xlim()[1] < 2


def test_end_points_that_are_not_finite_are_counted_as_diverged() -> None:
    line = [(0.1 * k, 1 - 0.1 * k) for k in range(8)]
    for strays, words in (
        ([(math.inf, 1.0), (math.nan, math.nan), (0.5, -math.inf)], "3 end points diverged"),
        ([(math.nan, 0.5), (1e9, 0.5)], "1 end point diverged\n1 end point far outside"),
    ):
        drawn = panel()
        draw_ends(drawn, {"mean+adam": line, "mgda+adam": strays}, (), LOOKS)
        assert said(drawn) == [words]
        assert drawn.get_xlim()[1] < 2
    drawn = panel()
    draw_ends(drawn, {"mean+adam": [(math.nan, math.nan)]}, (), LOOKS)
    assert said(drawn) == ["1 end point diverged"]
    draw_ends(panel(), {"mean+adam": []}, FRONT, LOOKS)


def test_end_points_over_orders_of_magnitude_have_a_logarithmic_axis() -> None:
    drawn = panel()
    draw_ends(drawn, {"mean+adam": [(10.0**-k, 1.0 + k) for k in range(2, 9)]}, (), LOOKS)
    assert (drawn.get_xscale(), drawn.get_yscale()) == ("log", "linear")


@pytest.mark.parametrize("objectives", [3, 5])
def test_end_points_of_more_objectives_are_lines_over_them(objectives: int) -> None:
    shown = evaluation(
        [row(name, "p", loss, objectives=objectives) for name, loss in (("mean+adam", 1), ("mgda+adam", 2))]
    )
    ends = end_points(shown, "p")
    drawn = panel()
    draw_ends(drawn, ends, (), LOOKS)
    assert len(drawn.get_lines()) == 2 * (3 + 1), "each seed's, and their mean"
    mean = next(line for line in drawn.get_lines() if line.get_marker() == LOOKS["mean+adam"].mark)
    lowest, highest = np.min([*ends["mean+adam"], *ends["mgda+adam"]], axis=0), np.max(ends["mgda+adam"], axis=0)
    expected = (np.mean(ends["mean+adam"], axis=0) - lowest) / (highest - lowest)
    np.testing.assert_allclose(mean.get_ydata(), expected)
    assert f"{highest[0]:.2g}" in said(drawn)


def test_one_objective_has_no_end_points_to_show() -> None:
    assert end_points(evaluation([row("mean+adam", "p", 1.0, objectives=1)]), "p") == {}


def test_bars_are_as_long_as_a_step_takes_and_name_the_evaluations() -> None:
    rows = [row("mean+adam", DIGITS, 1.0, ms_per_step=0.5), row("gml2o:learned", DIGITS, 1.0, ms_per_step=2.0),
            failed(row("mgda+adam", DIGITS, 1.0))]  # fmt: skip
    drawn = panel()
    draw_times(drawn, rows, LOOKS, named=True)
    assert [bar.get_width() for bar in drawn.patches] == [0.5, 2.0, 0.0]
    assert [to_hex(bar.get_facecolor()) for bar in drawn.patches][1] == LOOKS["gml2o:learned"].colour
    assert [text.strip() for text in said(drawn)] == ["0.5 ms, 3 evals", "2 ms, 3 evals", "failed"]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["mean+adam", "gml2o:learned", "mgda+adam"]


def test_acceptance_is_drawn_of_guarded_optimizers_alone() -> None:
    drawn = panel()
    draw_acceptance(drawn, DIGITS_ROWS, LOOKS)
    guarded = next(each for each in DIGITS_ROWS if each.optimizer == "gml2o:learned")
    expected = [100 * share for share in exponential_average(guarded.curve.acceptance, STEPS / 20)]
    (line,) = drawn.get_lines()
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert list(line.get_xdata()) == list(guarded.curve.steps)
    assert to_hex(line.get_color()) == LOOKS["gml2o:learned"].colour

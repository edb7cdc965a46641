"""Figures in words: what `learned` is compared with, on the seeds that both were run from."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from ml2o_dist.evaluation.evaluated import Evaluation, FailedCell
from ml2o_dist.evaluation.statistics import Interval
from ml2o_dist.reporting.evaluation_figures import (
    GUARD,
    LOSS,
    OPTIMIZER,
    best_baseline,
    number,
    row_figures,
    seed_losses,
    several,
    standing_figures,
    verdict_on,
    verdicts,
)
from tests.evaluation.synthetic import (
    DIGITS,
    DIGITS_ROWS,
    EVALUATION,
    LOST,
    diverged,
    evaluation,
    failed,
    row,
    standing,
)


def of(*losses: tuple[str, tuple[float, ...]], **changes: object) -> Evaluation:
    roles = {"learned": "learned", "initial": "other"}
    rows = [
        row(name, "p", sum(each) / len(each), seeds=len(each), role=roles.get(name, "baseline"), seed_losses=each)
        for name, each in losses
    ]  # type: ignore[arg-type]
    return evaluation(rows, **changes)  # type: ignore[arg-type]


def test_learned_is_held_against_the_best_baseline_and_against_the_untrained_network() -> None:
    shown = of(
        ("a", (2.0, 2.0, 2.0)), ("b", (1.0, 1.5, 0.5)), ("initial", (4.0, 4.0, 1.0)), ("learned", (0.9, 1.2, 0.6))
    )
    # paired differences -0.1, -0.3, 0.1: mean -0.1, standard deviation 0.2, standard error 0.2 / sqrt(3) = 0.115
    assert verdicts(shown, "p") == [
        "learned is 0.900 of b: no worse within one standard error (-0.100 ± 0.12), 2 of 3 seeds lower",
        "learned is 0.300 of initial: better by more than one standard error (-2.10 ± 0.85), 3 of 3 seeds lower",
    ]


def test_without_a_learned_entrant_nothing_is_said() -> None:
    assert verdicts(of(("a", (2.0,)), ("initial", (1.0,))), "p") == []
    assert verdict_on(of(("a", (2.0,))), "p") is None
    alone = of(("learned", (1.0, 1.0)))
    assert verdicts(alone, "p") == []
    assert verdict_on(alone, "p") is None


def test_a_baseline_that_is_called_learned_is_not_taken_for_it() -> None:
    shown = evaluation([row("learned", "p", 1.0), row("a", "p", 2.0)])
    assert verdicts(shown, "p") == []


def test_losses_that_are_not_positive_have_no_ratio() -> None:
    said = verdicts(of(("a", (-1.0, -1.0)), ("learned", (-2.0, -2.0))), "p")
    assert said == ["learned against a: better by more than one standard error (-1.00 ± 0.0), 2 of 2 seeds lower"]


def test_a_run_that_diverged_is_worse_and_two_are_level() -> None:
    (said,) = verdicts(of(("a", (1.0, 1.0)), ("learned", (0.5, math.inf))), "p")
    assert said == "learned against a: worse by more than one standard error, 1 of 2 seeds lower"
    (said,) = verdicts(of(("a", (math.inf, 1.0)), ("learned", (math.inf, 0.5))), "p")
    assert said == "learned against a: both diverged, 1 of 2 seeds lower"


def test_a_seed_that_one_of_the_two_could_not_be_run_from_is_left_out() -> None:
    failure = FailedCell("a", "p", 1, None, "a worker died")
    shown = of(("a", (1.0, math.nan, 2.0)), ("learned", (0.5, 9.0, 1.0)), failures=[failure])
    shown = replace(shown, rows=tuple(replace(each, loss=1.5) for each in shown.rows))
    (said,) = verdicts(shown, "p")
    assert said.startswith("learned is 0.500 of a: better")
    assert said.endswith("2 of 2 seeds lower")
    none = replace(shown, failed=tuple(replace(failure, seed=seed) for seed in range(3)))
    assert verdicts(none, "p") == ["learned against a: no seed was run with both"]
    assert verdict_on(none, "p") is None


def test_what_diverged_and_what_failed_are_told_apart_after_they_were_read_back() -> None:
    rows = (diverged(row("a", "p", 1.0, seeds=4), 2), row("learned", "p", 0.5, seeds=4))
    rows = (replace(rows[0], seed_losses=(math.inf, math.inf, math.nan, 1.0), failed=1), rows[1])
    shown = evaluation(rows, failures=[FailedCell("a", "p", 2, None, "died"), FailedCell("b", "p", 0, None, "died")])
    back = Evaluation.from_json(json.loads(json.dumps(shown.to_json(curves=True))))
    for each in (shown, back):
        losses = seed_losses(each, each.rows[0])
        assert losses[:2] == [math.inf, math.inf]
        assert math.isnan(losses[2])
        assert losses[3] == 1.0
        assert verdicts(each, "p") == verdicts(shown, "p")


def test_the_best_baseline_is_that_with_the_lowest_loss() -> None:
    assert best_baseline(DIGITS_ROWS).label == "mgda+adam@0.1"
    assert best_baseline([LOST, failed(DIGITS_ROWS[0])]) == LOST
    assert best_baseline(DIGITS_ROWS[-2:]) is None
    assert verdict_on(EVALUATION, DIGITS).verdict.startswith("better")


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(1234567.0, "#.4g", "1.235e+06"), (5.0, "#.4g", "5.000"), (180.0, ".0f", "180"), (12345.0, "#.4g", "1.234e+04"),
     (math.inf, "#.4g", "-"), (math.nan, "", "-"), (1234.0, "#.4g", "1234")],
)  # fmt: skip
def test_numbers(value: float, form: str, text: str) -> None:
    assert number(value, form) == text


def test_up_to_three_objectives_are_listed() -> None:
    assert several((1.0, 2.0, 3.0), "#.3g") == "1.00 / 2.00 / 3.00"
    assert several((1.0, 4.0, 2.0, 3.0), "#.3g") == "1.00 … 4.00 (4)"
    assert several((1.0, math.inf), "#.3g") == several((), "#.3g") == "-"


def test_what_a_figure_is_sorted_by_is_the_figure() -> None:
    figures = row_figures(DIGITS_ROWS[-1])
    assert figures[LOSS].value == 0.55
    assert figures[OPTIMIZER].value == "gml2o:learned"
    assert figures[GUARD] == ("38", 37.5)
    assert row_figures(LOST)[LOSS] == ("2 of 3 diverged", math.inf)
    text, value = row_figures(failed(LOST))[LOSS]
    assert text == "failed"
    assert math.isnan(value)
    shown = standing_figures(standing("a", "other", 0.5, 3, diverged=Interval(0.25, 0.1, 0.4), delta_m_accuracy=None))
    assert shown["ratio"] == ("0.5000 [0.4500, 0.5500]", 0.5)
    assert shown["diverged %"] == ("25", 25)
    assert shown["Δm % accuracy"].text == "-"
    assert shown["Δm %"] == ("-50.0", -50)

"""Standings against figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import rankdata, trim_mean

from ml2o_dist.evaluation.evaluated import Curve, Role, Row
from ml2o_dist.evaluation.standings import LARGEST_RATIO, log_ratios, ratio_interval, standings

INF, NAN = math.inf, math.nan


def row(optimizer: str, problem: str, losses: list[float], role: Role = "baseline", **changes: object) -> Row:
    run = [loss for loss in losses if not math.isnan(loss)]
    mean = float(np.mean(run)) if run else NAN
    made = Row(
        optimizer=optimizer, label=optimizer, role=role, problem=problem, steps=20, seeds=len(run),
        failed=len(losses) - len(run), diverged=losses.count(INF), loss=mean, loss_standard_error=0.0,
        seed_losses=tuple(losses), loss_at_evaluations=mean, loss_at_time=mean, losses=(mean / 4, 3 * mean / 4),
        test_accuracy=None, criticality=0.0, criticality_standard_error=0.0, criticality_relative=0.0, acceptance=None,
        evaluations=1.0, ms_per_step=1.0, guard_share=None, conflicting=0.0, mean_cosine=0.0, front=None,
        learning_rate=None, tuning={}, note="",
        curve=Curve(tuple(range(1, 21)), tuple(mean * (1 + (20 - k) / 20) for k in range(1, 21)), (0.0,) * 20),
    )  # fmt: skip
    return replace(made, **changes)


REFERENCE = {"p": [1.0, 2.0, 3.0, 4.0], "q": [10.0, 10.0, 10.0, 10.0]}
OTHER = {"p": [0.9, 1.8, 2.7, 3.6], "q": [20.0, 20.0, 20.0, 20.0]}
OURS = {"p": [0.5, 1.1, 1.4, 2.0], "q": [9.0, 11.0, 10.0, 8.0]}
ROWS = [
    *(row("mean+adam", problem, losses) for problem, losses in REFERENCE.items()),
    *(row("mgda", problem, losses) for problem, losses in OTHER.items()),
    *(row("ours", problem, losses, "learned") for problem, losses in OURS.items()),
]


def test_against_the_reference_and_the_best_baseline_of_each_problem() -> None:
    reference, mgda, ours = standings(ROWS, "mean+adam", {"p", "q"})
    assert [each.optimizer for each in (reference, mgda, ours)] == ["mean+adam", "mgda", "ours"]
    assert (ours.role, ours.problems) == ("learned", 2)
    ratios = np.log([a / b for problem in "pq" for a, b in zip(OURS[problem], REFERENCE[problem], strict=True)])
    assert ours.ratio.estimate == pytest.approx(math.exp(trim_mean(ratios, 0.25)))
    assert ours.ratio.low < ours.ratio.estimate < ours.ratio.high
    best = {"p": OTHER["p"], "q": REFERENCE["q"]}
    ratios = np.log([a / b for problem in "pq" for a, b in zip(OURS[problem], best[problem], strict=True)])
    assert ours.to_best.estimate == pytest.approx(math.exp(trim_mean(ratios, 0.25)))
    assert (reference.ratio.estimate, reference.ratio.low, reference.ratio.high) == (1.0, 1.0, 1.0)
    assert reference.delta_m == 0.0
    pairs = [[(a < b) + (a == b) / 2 for a in OURS[p] for b in REFERENCE[p]] for p in "pq"]
    assert ours.improvement.estimate == pytest.approx(np.mean([np.mean(each) for each in pairs]))
    table = np.array([[*losses["p"], *losses["q"]] for losses in (OURS, REFERENCE, OTHER)])
    assert ours.mean_rank == pytest.approx(rankdata(table, axis=0)[0].mean())
    assert reference.mean_rank == pytest.approx(rankdata(table[1:], axis=0)[0].mean()), "not among the learned ones"
    means = {p: (np.mean(OURS[p]), np.mean(REFERENCE[p])) for p in "pq"}
    assert ours.delta_m == pytest.approx(100 * np.mean([a / b - 1 for a, b in means.values()]))
    gain = np.mean([math.log(a / b) for a, b in means.values()])
    assert ours.log_area == pytest.approx(gain)
    assert ours.ratio_at_evaluations == ours.ratio_at_time == pytest.approx(math.exp(gain))
    assert ours.delta_m_accuracy is None
    assert (ours.diverged.estimate, ours.diverged.low) == (0.0, 0.0)


def test_how_much_quicker_is_the_geometric_mean_over_problems() -> None:
    """Curves fall linearly from twice the end to the end: ours at 0.5 passes the other's end of 0.9 at k = 4 (..)."""
    rows = [row("mean+adam", "p", [1.0, 1.0]), row("ours", "p", [0.55, 0.55], "learned")]
    _, ours = standings(rows, "mean+adam", {"p"})
    window, curve = 2, [0.55 * (1 + (20 - k) / 20) for k in range(1, 21)]
    baseline = [1 + (20 - k) / 20 for k in range(1, 21)]
    target = np.mean(baseline[-window:])
    needed = next(k for k in range(window, 21) if np.mean(curve[k - window : k]) <= target)
    assert needed < 20
    assert ours.speedup == pytest.approx(20 / needed)


def test_accuracies_count_with_the_sign_turned() -> None:
    rows = [row("mean+adam", "p", [1.0, 1.0], test_accuracy=(0.5, 0.8)),
            row("ours", "p", [1.0, 1.0], test_accuracy=(0.6, 0.72))]  # fmt: skip
    assert standings(rows, "mean+adam", {"p"})[1].delta_m_accuracy == pytest.approx(-100 * (0.2 - 0.1) / 2)


def test_problems_of_either_sign_count_for_ranks_alone() -> None:
    rows = [*ROWS, row("mean+adam", "n", [-1.0, 1.0]), row("mgda", "n", [2.0, 2.0]), row("ours", "n", [-2.0, -2.0])]
    plain, more = (standings(each, "mean+adam", {"p", "q"})[2] for each in (ROWS, rows))
    assert more.ratio == plain.ratio
    assert more.problems == 2
    assert more.mean_rank < plain.mean_rank
    assert math.isnan(standings(rows, "mean+adam", set())[2].ratio.estimate)


def test_diverged_and_failed_runs() -> None:
    ours = {"p": [INF, 1.0, 1.0, NAN], "q": [INF, INF, 5.0, 5.0]}
    theirs = {"p": [1.0, 1.0, INF, 1.0], "q": [INF, 5.0, 5.0, NAN]}
    top = math.log(LARGEST_RATIO)
    assert log_ratios(ours, theirs) == [[top, 0.0, -top], [0.0, top, 0.0]]
    assert log_ratios({"p": [0.0, 0.0, 1.0]}, {"p": [0.0, 1.0, 0.0]}) == [[0.0, -top, top]]
    rows = [
        *(row("mean+adam", p, each) for p, each in theirs.items()),
        *(row("x", p, each) for p, each in ours.items()),
    ]
    _, found = standings(rows, "mean+adam", {"p", "q"})
    assert found.diverged.estimate == pytest.approx(3 / 7)
    assert math.isnan(found.speedup)
    lost = standings([row("mean+adam", "p", [1.0, 1.0]), row("x", "p", [NAN, NAN])], "mean+adam", {"p"})[1]
    assert math.isnan(lost.ratio.estimate)
    assert math.isnan(lost.improvement.estimate)


def test_ranks_are_of_the_seeds_that_all_could_be_run_from() -> None:
    losses = {
        "mean+adam": [1.0, 4.0, NAN, 5.0],
        "mgda": [3.0, 1.0, 1.0, 1.0],
        "x": [2.0, 3.0, 9.0, NAN],
        "gone": [NAN] * 4,
    }
    rows = [row(name, "p", each) for name, each in losses.items()]
    *found, gone = (each.mean_rank for each in standings(rows, "mean+adam", {"p"}))
    table = np.array([losses[name][:2] for name in ("mean+adam", "mgda", "x")])
    assert found == pytest.approx(rankdata(table, axis=0).mean(axis=1))
    assert math.isnan(gone)


def test_without_the_reference_there_are_none() -> None:
    assert standings(ROWS, "pcgrad+adam", {"p", "q"}) == ()
    assert standings([], "mean+adam", set()) == ()


def test_the_reference_counts_as_a_baseline_though_it_was_named_as_an_optimizer() -> None:
    rows = [replace(each, role="other") for each in ROWS]
    _, _, ours = standings(rows, "mean+adam", {"p", "q"})
    assert ours.to_best == ours.ratio


def test_one_seed_has_no_interval() -> None:
    found = ratio_interval({"p": [1.0]}, {"p": [2.0]})
    assert found.estimate == pytest.approx(0.5)
    assert math.isnan(found.low)
    assert math.isnan(found.high)

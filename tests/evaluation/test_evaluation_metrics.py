"""What MLflow is told: keys that it takes, finite values, curves that keep their ends; and the tables' words."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.evaluated import Evaluation, Front, Row
from ml2o_dist.evaluation.evaluation_metrics import CURVE_POINTS, curve_metrics, metric_names, row_metrics
from ml2o_dist.evaluation.evaluation_report import evaluation_markdown, evaluation_table, row_figures

FRONT = Front(0.5, 0.6, 1, 0.04, -0.08)
ROW = Row(
    optimizer="mgda+adam",
    problem="quadratic[n=4]",
    seeds=3,
    failed=0,
    diverged=0,
    loss=1.25,
    loss_standard_error=0.125,
    losses=(0.5, 0.75),
    test_accuracy=None,
    criticality=0.25,
    criticality_standard_error=0.0625,
    criticality_relative=0.5,
    acceptance=None,
    evaluations=60.0,
    ms_per_step=1.5,
    guard_share=None,
    conflicting=0.5,
    mean_cosine=-0.1,
    front=None,
    learning_rate=0.03,
    tuning={0.03: 1.0},
    note="",
    curve=(3.0, 2.0, 1.0),
)
GUARDED = replace(ROW, optimizer="gml2o:nan", acceptance=0.0, guard_share=0.625, learning_rate=None, tuning={},
                  test_accuracy=(0.5, 0.75), front=FRONT)  # fmt: skip


def test_keys_are_those_that_mlflow_takes_and_differ() -> None:
    from mlflow.utils.validation import _validate_metric_name

    names = ["mgda+adam@0.01", "mgda adam@0.01", "mgda-adam-0.01", "gml2o:nan", "models:/ml2o@candidate", "../a/b",
             "multidigits[net=mlp,hidden=32]", "é", "x" * 300]  # fmt: skip
    keys = metric_names(names)
    assert list(keys) == names
    assert len(set(keys.values())) == len(names)
    assert keys["mgda+adam@0.01"] == "mgda-adam-0.01"
    assert keys["mgda-adam-0.01"] == "mgda-adam-0.01-2"
    assert keys["multidigits[net=mlp,hidden=32]"] == "multidigits-net-mlp-hidden-32"
    for key in keys.values():
        _validate_metric_name(f"loss/{key}/{key}")
        assert len(key) <= 90


@pytest.mark.parametrize(("steps", "points"), [(1, 1), (3, 3), (CURVE_POINTS, CURVE_POINTS), (7001, CURVE_POINTS)])
def test_a_curve_keeps_its_ends(steps: int, points: int) -> None:
    row = replace(ROW, curve=tuple(float(step) for step in range(steps)))
    shown = list(curve_metrics(row, {ROW.optimizer: "o"}, {ROW.problem: "p"}))
    assert len(shown) == points
    assert (shown[0][0], shown[-1][0]) == (0, steps - 1)
    assert all(metrics == {"curve/p/o": float(step)} for step, metrics in shown)


def test_what_is_not_finite_is_left_out() -> None:
    row = replace(ROW, loss=math.inf, criticality=math.nan, front=replace(FRONT, igd_plus=math.inf))
    assert row_metrics(row, {ROW.optimizer: "o"}, {ROW.problem: "p"}) == {
        "learning_rate/p/o": 0.03,
        "hypervolume/p/o": 0.5,
        "additive_epsilon/p/o": -0.08,
        "outside/p/o": 1.0,
    }


def test_the_figures_of_a_row() -> None:
    figures = row_figures(ROW)
    assert figures["optimizer"] == "mgda+adam@0.03"
    assert figures["loss, last tenth"] == "1.250 ± 0.12"
    assert figures["criticality"] == "0.250 ± 0.062"
    assert (figures["accepted"], figures["test accuracy"], figures["hypervolume"]) == ("-", "-", "-")
    figures = row_figures(GUARDED)
    assert (figures["accepted"], figures["guard"], figures["test accuracy"]) == ("0 %", "62 %", "50.0 / 75.0")
    assert (figures["outside"], figures["epsilon"]) == ("1 of 3", "-0.0800")
    lost = row_figures(replace(ROW, diverged=2, loss=math.inf, criticality=math.nan, note="x"))
    assert (lost["loss, last tenth"], lost["criticality"]) == ("2 of 3 diverged", "-")
    assert lost["optimizer"] == "mgda+adam@0.03 *"


def test_the_tables_fit_and_say_how_they_were_made() -> None:
    failed = replace(ROW, optimizer="uw@0.1", seeds=0, failed=3, loss=math.nan, losses=(), curve=())
    rows = (ROW, GUARDED, failed, replace(ROW, problem="fonseca"))
    evaluation = Evaluation(EvaluateSettings(seeds=3, steps=50), (), rows, ())
    stream = io.StringIO()
    Console(file=stream, width=80).print(evaluation_table(evaluation))
    text = stream.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for part in ("last tenth of 50 steps", "3 paired seeds", "0.001, 0.003, 0.01, 0.03, 0.1 on 1 other seed",
                 "gml2o:nan", "3 of 3 cells failed", "62 %", "1 of 3"):  # fmt: skip
        assert part in " ".join(text.split())
    markdown = evaluation_markdown(evaluation)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1
    assert "| `quadratic[n=4]` | `mgda+adam@0.03` |" in markdown
    assert "- `quadratic[n=4]`: * uw@0.1: 3 of 3 cells failed" in markdown

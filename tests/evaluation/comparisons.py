"""A comparison with everything in it: better, worse, the edge of a grid, a diverged baseline, five objectives."""

from __future__ import annotations

import math
from dataclasses import replace

from ml2o_dist.evaluation.benchmark import Comparison, ProblemComparison, Row, Versus
from ml2o_dist.evaluation.statistics import PairedDifference

STEPS = 60


def row(name: str, loss: float, *, lr: float | None = None, objectives: int = 2, **changes: object) -> Row:
    curve = tuple(loss * (1 + 3 * math.exp(-k / 10)) for k in range(STEPS))
    made = Row(
        optimizer=name,
        label=name if lr is None else f"{name}@{lr:g}",
        baseline=lr is not None,
        loss=loss,
        standard_error=0.0123,
        seed_losses=(loss - 0.01, loss, loss + 0.01),
        objectives=(loss / objectives,) * objectives,
        test={"test_accuracy": (0.912,) * objectives},
        ms_per_step=1.5,
        forwards=STEPS,
        backwards=STEPS * objectives,
        diverged=0,
        curve=curve,
        curve_error=(0.02,) * STEPS,
        tuning={} if lr is None else {lr: loss},
        note="",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def versus(reference: str, mean: float, error: float, ratio: float) -> Versus:
    difference = PairedDifference(mean, error, 3)
    return Versus(reference, difference, ratio, difference.no_worse_within_one_se, difference.verdict)


EDGE = row("mgda+adam", 0.75, lr=0.1, note="best learning rate 0.1 is at the edge of the grid")
LOST = row(
    "mean+sgd",
    math.inf,
    lr=1e6,
    standard_error=math.nan,
    objectives=2,
    diverged=2,
    curve=(4.0, 1e30) + (math.nan,) * (STEPS - 2),
)
DIGITS = ProblemComparison(
    "multidigits[hidden=40,net=mlp]",
    (row("learned", 0.5), EDGE, row("initial", 1.0), LOST),
    EDGE.label,
    versus(EDGE.label, -0.25, 0.05, 0.667),
    versus("initial", -0.5, 0.05, 0.5),
)
MANY = ProblemComparison(
    "quadratic[m=5]",
    (row("mean+adam", 0.2, lr=0.01, test={}, objectives=5), row("learned", 0.7, test={}, objectives=5)),
    "mean+adam@0.01",
    versus("mean+adam@0.01", 0.5, math.nan, 3.5),
    None,
)
COMPARISON = Comparison(STEPS, 3, 1, (0.001, 0.01, 0.1), (DIGITS, MANY))

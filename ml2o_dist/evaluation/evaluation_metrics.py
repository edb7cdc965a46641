"""What MLflow is told of an evaluation: the figures of each cell at its seed, and a learning curve for each row.

loss/PROBLEM/OPTIMIZER, and so criticality, acceptance, ...   a value for each seed, which is its step
mean_loss/PROBLEM/OPTIMIZER, and so hypervolume, ...          over the seeds, at step 0
curve/PROBLEM/OPTIMIZER                                       summed loss at each step, mean over the seeds
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

from ml2o_dist.evaluation.evaluated import EvaluatedCell, Row

CURVE_POINTS = 200
"""Most points of one curve: a picture shows no more, and every one costs MLflow a row."""

LONGEST_NAME = 80
"""Characters kept of a name, its end: MLflow takes 250 for a key."""


def metric_names(names: Iterable[str]) -> dict[str, str]:
    """Return, by name, what MLflow allows in a key; a number is added where two would be alike."""
    found: dict[str, str] = {}
    for name in names:
        base = re.sub(r"[^\w.\-: ]+", "-", name, flags=re.ASCII).strip("-.: ")[-LONGEST_NAME:] or "x"
        key, number = base, 2
        while key in found.values():
            key, number = f"{base}-{number}", number + 1
        found[name] = key
    return found


def cell_metrics(cell: EvaluatedCell, optimizers: Mapping[str, str], problems: Mapping[str, str]) -> dict[str, float]:
    """Return the figures of one cell that are finite, by key; to be logged at the cell's seed."""
    figures: dict[str, float | None] = {
        "loss": sum(cell.losses),
        "criticality": cell.criticality,
        "acceptance": cell.acceptance,
        "guard_share": cell.guard_share,
        "evaluations": float(cell.evaluations),
        "ms_per_step": cell.ms_per_step,
        "diverged": float(cell.diverged),
    }
    for name, values in (("loss", cell.losses), ("test_accuracy", cell.test_accuracy or ())):
        figures |= {f"{name}_{i + 1}": value for i, value in enumerate(values)}
    return _finite(figures, f"{problems[cell.problem]}/{optimizers[cell.optimizer]}")


def row_metrics(row: Row, optimizers: Mapping[str, str], problems: Mapping[str, str]) -> dict[str, float]:
    """Return the figures of a row that are finite, by key."""
    figures: dict[str, float | None] = {
        "mean_loss": row.loss,
        "mean_criticality": row.criticality,
        "learning_rate": row.learning_rate,
    }
    if row.front is not None:
        figures |= {
            "hypervolume": row.front.hypervolume,
            "igd_plus": row.front.igd_plus,
            "additive_epsilon": row.front.additive_epsilon,
            "outside": float(row.front.outside),
        }
    return _finite(figures, f"{problems[row.problem]}/{optimizers[row.optimizer]}")


def curve_metrics(
    row: Row, optimizers: Mapping[str, str], problems: Mapping[str, str]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, value by key) of the row's curve, at most `CURVE_POINTS`, the first and the last among them."""
    last = len(row.curve) - 1
    points = min(len(row.curve), CURVE_POINTS)
    for step in sorted({round(i * last / max(points - 1, 1)) for i in range(points)}):
        yield step, _finite({"curve": row.curve[step]}, f"{problems[row.problem]}/{optimizers[row.optimizer]}")


def _finite(figures: Mapping[str, float | None], place: str) -> dict[str, float]:
    return {f"{name}/{place}": value for name, value in figures.items() if value is not None and math.isfinite(value)}

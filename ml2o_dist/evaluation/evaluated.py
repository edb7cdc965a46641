"""What an evaluation came to: a record for each cell, a row for each optimizer on each problem, all as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.benchmark import plain_json


@dataclass(frozen=True)
class EvaluatedCell:
    """One optimizer on one problem from one seed.

    Attributes:
        losses: of each objective, mean over the last tenth of the steps, on the steps' own batches.
        test_accuracy, test_loss: of each task on unseen data; None where the problem has none.
        criticality, criticality_relative, criticality_gap, end_losses: of the end point on a large fixed batch, see
            `criticality.Criticality`.
        acceptance, guard_share: see `cells.GuardRecord`; None without a guard.
        evaluations: forwards and backwards, as the oracle charged them.
        ms_per_step: median wall time of a step.
        conflicting, mean_cosine: see `cells.Measured`.
    """

    optimizer: str
    problem: str
    seed: int
    steps: int
    losses: tuple[float, ...]
    test_accuracy: tuple[float, ...] | None
    criticality: float
    acceptance: float | None
    evaluations: int
    ms_per_step: float
    diverged: bool
    learning_rate: float | None
    test_loss: tuple[float, ...] | None
    end_losses: tuple[float, ...]
    criticality_relative: float
    criticality_gap: float
    guard_share: float | None
    forwards: int
    backwards: int
    conflicting: float
    mean_cosine: float


@dataclass(frozen=True)
class FailedCell:
    """A cell that failed twice; one of the tuning has no seed."""

    optimizer: str
    problem: str
    seed: int | None
    learning_rate: float | None
    error: str


@dataclass(frozen=True)
class Front:
    """The seeds' end points against the known front, by `metrics`.

    Attributes:
        hypervolume: of the end points; hypervolume_of_front: of the points of the front that all compare with.
        outside: how many end points are not better than the reference point in every objective, or not finite.
    """

    hypervolume: float
    hypervolume_of_front: float
    outside: int
    igd_plus: float
    additive_epsilon: float


@dataclass(frozen=True)
class Row:
    """One optimizer on one problem: means over its seeds, and their standard errors.

    A mean is inf or NaN where that of a seed is; `seeds` counts those that were run, `failed` those that could not be.
    `loss` is of the summed losses of the last tenth, `curve` of those of each step.
    """

    optimizer: str
    problem: str
    seeds: int
    failed: int
    diverged: int
    loss: float
    loss_standard_error: float
    losses: tuple[float, ...]
    test_accuracy: tuple[float, ...] | None
    criticality: float
    criticality_standard_error: float
    criticality_relative: float
    acceptance: float | None
    evaluations: float
    ms_per_step: float
    guard_share: float | None
    conflicting: float
    mean_cosine: float
    front: Front | None
    learning_rate: float | None
    tuning: Mapping[float, float]
    note: str
    curve: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation; without what was not run because it was stopped."""

    settings: EvaluateSettings
    cells: tuple[EvaluatedCell, ...]
    rows: tuple[Row, ...]
    failed: tuple[FailedCell, ...]

    def to_json(self) -> dict[str, Any]:
        """Return {cells, summary: {rows, failed, ...}} as JSON values; what is not finite becomes None."""
        rows = [{key: value for key, value in asdict(row).items() if key != "curve"} for row in self.rows]
        settings = self.settings
        summary = {
            "steps": settings.steps,
            "seeds": list(range(settings.seed, settings.seed + settings.seeds)),
            "learning_rates": settings.learning_rates,
            "rows": rows,
            "failed": [asdict(failure) for failure in self.failed],
        }
        plain: dict[str, Any] = plain_json({"cells": [asdict(cell) for cell in self.cells], "summary": summary})
        return plain

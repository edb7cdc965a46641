"""The result of an evaluation: cells, a row per optimizer and problem, a standing per optimizer; to and from JSON.

A figure that is not finite is null in JSON, and NaN when it is read back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.statistics import Figure, Interval
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import one_line

Role = Literal["learned", "baseline", "other"]
"""Role of an optimizer in an evaluation: meta-trained weights, one of the settings' baselines, or any other."""

CURVE_POINTS = 200
"""Maximum number of points kept of a curve."""


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
    losses: tuple[Figure, ...]
    test_accuracy: tuple[Figure, ...] | None
    criticality: Figure
    acceptance: float | None
    evaluations: int
    ms_per_step: float
    diverged: bool
    learning_rate: float | None
    test_loss: tuple[Figure, ...] | None
    end_losses: tuple[Figure, ...]
    criticality_relative: Figure
    criticality_gap: Figure
    guard_share: float | None
    forwards: int
    backwards: int
    conflicting: Figure
    mean_cosine: Figure


@dataclass(frozen=True)
class FailedCell:
    """A cell that failed twice; a cell of the tuning has no seed."""

    optimizer: str
    problem: str
    seed: int | None
    learning_rate: float | None
    error: str


@dataclass(frozen=True)
class Front:
    """The seeds' end points compared with the known front by the indicators of `metrics`.

    Attributes:
        hypervolume: of the end points; hypervolume_of_front: of the front's points that all are compared with.
        outside: number of end points that are not finite or not better than the reference point in every objective.
    """

    hypervolume: float
    hypervolume_of_front: float
    outside: int
    igd_plus: Figure
    additive_epsilon: Figure


@dataclass(frozen=True)
class Curve:
    """A learning curve, at most `CURVE_POINTS` points; each is the mean over the steps since the point before.

    Attributes:
        steps: the number of steps taken up to each point; at the last point all of them.
        loss, error: mean over the seeds of the summed loss on each step's own batch, and its standard error.
        acceptance: the share of seeds for which the guard took the learned candidate; None without a guard.
    """

    steps: tuple[int, ...] = ()
    loss: tuple[Figure, ...] = ()
    error: tuple[Figure, ...] = ()
    acceptance: tuple[Figure, ...] | None = None


@dataclass(frozen=True)
class Row:
    """One optimizer on one problem: means over its seeds, and their standard errors.

    A mean is inf or NaN if the figure of a seed is. `seeds` counts the seeds that were run, `failed` those that failed.

    Attributes:
        label: the optimizer as written, with the tuned learning rate.
        seed_losses: the summed loss over the last tenth of the steps from each seed, NaN where the cell failed; `loss`
            is the mean of the others.
        loss_at_evaluations, loss_at_time: the loss at the evaluations, or the time, that the reference spends in all
            its steps: over the last tenth of the steps within that budget. It equals `loss` without a reference, and
            where the optimizer spends less.
        losses: the mean of each objective.  learning_rate: None if it has none.
        tuning: learning rate -> criterion on the tuning seeds.  note: a warning about the tuning.
    """

    optimizer: str
    label: str
    role: Role
    problem: str
    steps: int
    seeds: int
    failed: int
    diverged: int
    loss: Figure
    loss_standard_error: Figure
    seed_losses: tuple[Figure, ...]
    loss_at_evaluations: Figure
    loss_at_time: Figure
    losses: tuple[Figure, ...]
    test_accuracy: tuple[Figure, ...] | None
    criticality: Figure
    criticality_standard_error: Figure
    criticality_relative: Figure
    acceptance: float | None
    evaluations: Figure
    ms_per_step: Figure
    guard_share: float | None
    conflicting: Figure
    mean_cosine: Figure
    front: Front | None
    learning_rate: float | None
    tuning: Mapping[float, Figure]
    note: str
    curve: Curve = Curve()


@dataclass(frozen=True)
class Standing:
    """One optimizer over all problems, against the reference and the best baseline of each problem, paired by seeds.

    A ratio is exp of the interquartile mean, over problems and seeds, of log(loss / the other's loss): below 1 =
    better. The losses are those of `Row.seed_losses`. Problems whose losses are not positive by construction are left
    out. Intervals are 95 % intervals, see `statistics`.

    Attributes:
        problems: number of problems that the figures cover.
        ratio: to the reference.  to_best: to the baseline with the lowest mean loss on each problem, the reference
            counting as one; a baseline is also compared with itself.
        ratio_at_evaluations, ratio_at_time: `ratio` after as many evaluations or as much time as the reference.
        improvement: the probability of a lower loss than the reference's.
        mean_rank: rank among the baselines and this optimizer; 1 is best.
        delta_m: in per cent, over the final losses of the objectives against the reference: below 0 = better;
            delta_m_accuracy: over the test accuracies, None if no problem has one; below 0 = better, too.
        speedup: the best baseline's steps to the same loss / this optimizer's steps: above 1 = faster; geometric mean
            over problems.
        log_area: mean over the steps of log(loss / the reference's loss), mean over problems: below 0 = better.
        diverged: share of the cells that diverged.
    """

    optimizer: str
    role: Role
    problems: int
    ratio: Interval
    to_best: Interval
    ratio_at_evaluations: Figure
    ratio_at_time: Figure
    improvement: Interval
    mean_rank: Figure
    delta_m: Figure
    delta_m_accuracy: Figure | None
    speedup: Figure
    log_area: Figure
    diverged: Interval


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        suite: name of the suite, "" if it is none.  suite_sha256: see `suites.suite_sha256`; results with equal
            hashes can be compared, even of different `optimizers`.
        data_sha256: of the problems' data sets, by name.
        standings: in the order of the optimizers; empty where the reference is not among them.
        fronts: by problem, some points [k, m] of the known front.
        seconds: duration, including that of cells found in the cache; None: unknown.
        git: commit of the package that made the evaluation, "" if unknown.
    """

    settings: EvaluateSettings
    suite: str
    suite_sha256: str
    data_sha256: Mapping[str, str]
    cells: tuple[EvaluatedCell, ...]
    rows: tuple[Row, ...]
    standings: tuple[Standing, ...]
    failed: tuple[FailedCell, ...]
    fronts: Mapping[str, tuple[tuple[float, ...], ...]]
    seconds: float | None = None
    git: str = ""

    @property
    def problems(self) -> list[str]:
        """The problems that have rows, as the user wrote them."""
        return list(dict.fromkeys(row.problem for row in self.rows))

    def rows_of(self, problem: str) -> list[Row]:
        """Return the rows of one problem, in the order of the optimizers."""
        return [row for row in self.rows if row.problem == problem]

    def standing(self, optimizer: str) -> Standing | None:
        """Return the standing of one optimizer, None if it has none."""
        return next((each for each in self.standings if each.optimizer == optimizer), None)

    def to_json(self, *, curves: bool = False) -> dict[str, Any]:
        """Return {cells, summary: {rows, standings, failed, ...}} as JSON values; non-finite numbers become None.

        With `curves` the tree includes curves and fronts, so that `from_json` reads back the whole evaluation.
        """
        summary: dict[str, Any] = {
            "suite": self.suite,
            "suite_sha256": self.suite_sha256,
            "steps": self.settings.steps,
            "seeds": list(range(self.settings.seed, self.settings.seed + self.settings.seeds)),
            "settings": self.settings.model_dump(mode="json", by_alias=True),
            "data_sha256": self.data_sha256,
            "rows": [asdict(row) for row in self.rows],
            "standings": [asdict(standing) for standing in self.standings],
            "failed": [asdict(failure) for failure in self.failed],
            "seconds": self.seconds,
            "git": self.git,
        }
        if curves:
            summary["fronts"] = self.fronts
        else:
            for row in summary["rows"]:
                del row["curve"]
        plain: dict[str, Any] = plain_json({"cells": [asdict(cell) for cell in self.cells], "summary": summary})
        return plain

    @classmethod
    def from_json(cls, tree: Any) -> Evaluation:
        """Return the evaluation that `to_json` turned into `tree`.

        Raises:
            UserError: `tree` is no such evaluation.
        """
        other = "it holds no evaluation of this version"
        if not (isinstance(tree, dict) and isinstance(tree.get("summary"), dict) and "cells" in tree):
            raise UserError(other)
        try:
            found = _EVALUATION.validate_python({"fronts": {}, **tree["summary"], "cells": tree["cells"]})
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise UserError(f"{other}: {one_line('.'.join(map(str, first['loc'])) + ': ' + first['msg'])}") from error
        if wrong := _disagreement(found):
            raise UserError(f"{other}: {one_line(wrong)}")
        return found


def _disagreement(found: Evaluation) -> str:
    """Return the first inconsistency of an evaluation in words; "" if there is none."""
    pairs = [(row.optimizer, row.problem) for row in found.rows]
    if len(set(pairs)) < len(pairs):
        return "an optimizer has two rows on one problem"
    tasks: dict[str, int] = {}
    accuracies: dict[str, int] = {}
    for row in found.rows:
        where = f"{row.optimizer} on {row.problem}"
        size = len(row.losses)
        accurate = None if row.test_accuracy is None else len(row.test_accuracy)
        agrees = accurate is None or accuracies.setdefault(row.problem, accurate) == accurate
        if not row.losses or tasks.setdefault(row.problem, size) != size or not agrees:
            return f"{where} has another number of objectives than the others there"
        curve = row.curve
        lengths = {len(curve.steps), len(curve.loss), len(curve.error)}
        lengths |= set() if curve.acceptance is None else {len(curve.acceptance)}
        if len(lengths) > 1 or len(curve.steps) > CURVE_POINTS:
            return f"the curve of {where} has parts of different lengths, or more than {CURVE_POINTS} points"
        if any(later <= earlier for earlier, later in pairwise((0, *curve.steps))):
            return f"the curve of {where} goes back"
    for problem, front in found.fronts.items():
        if len({len(point) for point in front}) > 1 or any(not point for point in front):
            return f"the front of {problem} has points of different lengths"
        if problem in tasks and front and len(front[0]) != tasks[problem]:
            return f"the front of {problem} has another number of objectives"
    for cell in found.cells:
        if cell.problem in tasks and len(cell.losses) != tasks[cell.problem]:
            return f"a cell of {cell.optimizer} on {cell.problem} has another number of objectives"
    return ""


_EVALUATION = TypeAdapter(Evaluation)


def plain_json(value: Any) -> Any:
    """Return `value` as dicts, lists, strings and finite numbers; non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

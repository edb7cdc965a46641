"""A learning rate for each hand-designed optimizer on each problem: the same grid, budget and seeds for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ml2o_dist.evaluation.cells import Cell, CellFailure, Outcome
from ml2o_dist.evaluation.optimizer_specs import OptimizerSpec


@dataclass(frozen=True)
class Tunable:
    """An optimizer that a user named without a learning rate: tuning finds one."""

    name: str
    optimizer: Callable[[float], OptimizerSpec]


@dataclass(frozen=True)
class Tuned:
    """The result of tuning one optimizer on one problem.

    Attributes:
        lr: the best learning rate.
        scores: learning rate -> criterion on the tuning seeds, infinite where a run diverged or failed.
        note: a warning for the reader; "" if there is none.
        failures: learning rate -> why a run failed there.
    """

    lr: float
    scores: Mapping[float, float]
    note: str
    failures: Mapping[float, str]


def tune(
    tunables: Sequence[Tunable],
    problems: Sequence[str],
    learning_rates: Sequence[float],
    trial: Callable[[OptimizerSpec, str], Sequence[Cell]],
    run_cells: Callable[[Sequence[Cell]], Sequence[Outcome]],
) -> dict[tuple[str, str], Tuned]:
    """Return the tuned learning rate of every optimizer on every problem, by (name, problem).

    The criterion is the summed loss over the last tenth of the steps, mean over the cells of a `trial`. The smallest
    rate wins a tie. `run_cells` gets the cells of all trials in one call and returns outcomes in the same order.
    """
    keys = [(each, problem, lr) for problem in problems for each in tunables for lr in learning_rates]
    trials = [trial(each.optimizer(lr), problem) for each, problem, lr in keys]
    cells = [cell for part in trials for cell in part]
    outcomes = iter(run_cells(cells) if cells else ())
    scores: dict[tuple[str, str], dict[float, float]] = {}
    failures: dict[tuple[str, str], dict[float, str]] = {}
    for (each, problem, lr), part in zip(keys, trials, strict=True):
        found = [next(outcomes) for _ in part]
        scores.setdefault((each.name, problem), {})[lr] = _criterion(found)
        for outcome in found:
            if isinstance(outcome, CellFailure):
                failures.setdefault((each.name, problem), {})[lr] = outcome.reason
    return {key: _best(values, failures.get(key, {})) for key, values in scores.items()}


def _criterion(outcomes: Sequence[Outcome]) -> float:
    losses = []
    for outcome in outcomes:
        if isinstance(outcome, CellFailure) or bool(outcome.diverged.any()):
            return math.inf
        losses.append(float(outcome.final_sum.mean()))
    return sum(losses) / len(losses)


def _best(scores: Mapping[float, float], failures: Mapping[float, str]) -> Tuned:
    lr = min(scores, key=lambda rate: (scores[rate], rate))
    note = ""
    if failures:
        note = f"tuning failed at learning rate {', '.join(f'{rate:g}' for rate in failures)}"
    elif not math.isfinite(scores[lr]):
        note = "diverged at every learning rate of the grid"
    elif len(scores) > 1 and lr in (min(scores), max(scores)):
        note = f"best learning rate {lr:g} is at the edge of the grid"
    return Tuned(lr, scores, note, failures)

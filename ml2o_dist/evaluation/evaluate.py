"""An evaluation: every optimizer on every problem, once for each seed; what is to be run, and what came of it.

Pure: the cells are run by whoever calls `tune_entrants` and `plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.errors import UserError
from ml2o_dist.evaluation.cells import Cell, CellFailure, CellResult, Outcome
from ml2o_dist.evaluation.contestants import Contestant
from ml2o_dist.evaluation.evaluated import EvaluatedCell, Evaluation, FailedCell, Front, Row
from ml2o_dist.evaluation.metrics import additive_epsilon, hypervolume, igd_plus
from ml2o_dist.evaluation.optimizer_names import Entrant
from ml2o_dist.evaluation.statistics import mean_and_standard_error
from ml2o_dist.evaluation.tuning import Tunable, Tuned, tune
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.problems.multitask import MultiTaskImages
from ml2o_dist.rules.base import Oracle
from ml2o_dist.seeding import derive_seed, generator

PROBLEM_SEED = 0
"""Coefficients are those of `ProblemContext()`: a seed is a starting point and an order of batches of one problem, so
that the seeds' end points lie before one front."""

FRONT_POINTS = 1000
"""How many points of a known front the indicators compare with."""

RunOutcomes = Callable[[Sequence[Cell]], Sequence[Outcome]]
Learning = Mapping[tuple[str, ProblemSpec], Tuned]
"""(name of an optimizer, problem) -> its learning rate, for those that were tuned."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A cell that is to be reported, with its names as they were written."""

    optimizer: str
    problem: str
    seed: int
    learning_rate: float | None
    cell: Cell


def problem_specs(settings: EvaluateSettings) -> dict[str, ProblemSpec]:
    """Return the problems by their names as written, each once."""
    return {text: ProblemSpec.parse(text) for text in settings.problems}


def check_fit(settings: EvaluateSettings, entrants: Sequence[Entrant]) -> dict[str, str]:
    """Let every entrant take one step on every problem, so that what does not fit together shows now.

    It also builds the image caches before several tasks ask for them. Returns the sha256 of the data behind the
    problems by name; raises UserError.
    """
    data: dict[str, str] = {}
    for text, spec in problem_specs(settings).items():
        problem = spec.build(ProblemContext(seed=PROBLEM_SEED, data_root=settings.data.root))
        if isinstance(problem, MultiTaskImages):
            data |= problem.data_hashes(test=True)
        start = problem.initial_parameters([settings.seed])
        for entrant in entrants:
            contestant = entrant.contestant(settings.learning_rates[0] if entrant.tuned else None)
            try:
                rule = contestant.rule(problem.device, problem.dtype)
                state = rule.initial_state(1, problem.objectives, problem.dimension)
                rule.step(Oracle(problem, generator("check", text)), start, state)
            except UserError as error:
                raise UserError(f"{entrant.name} on {text}: {error}") from error
    return data


def tune_entrants(settings: EvaluateSettings, entrants: Sequence[Entrant], run_cells: RunOutcomes) -> Learning:
    """Find the learning rate of each entrant that is `tuned` on each problem, from seeds that nothing else uses."""
    problems = list(dict.fromkeys(problem_specs(settings).values()))
    tunables = [Tunable(entrant.name, entrant.contestant) for entrant in entrants if entrant.tuned]

    def trial(contestant: Contestant, problem: ProblemSpec) -> list[Cell]:
        seeds = [derive_seed(settings.seed, "tuning", str(problem), i) for i in range(settings.tuning_seeds)]
        return [_cell(settings, contestant, problem, seed, "tuning") for seed in seeds]

    return tune(tunables, problems, settings.learning_rates, trial, run_cells)


def plan(settings: EvaluateSettings, entrants: Sequence[Entrant], tuned: Learning) -> list[Planned]:
    """Return the cells that are to be reported, problem by problem, optimizer by optimizer, seed by seed."""
    planned = []
    for text, problem in problem_specs(settings).items():
        for entrant in entrants:
            lr = tuned[entrant.name, problem].lr if entrant.tuned else entrant.learning_rate
            contestant = entrant.contestant(lr)
            for seed in range(settings.seed, settings.seed + settings.seeds):
                cell = _cell(settings, contestant, problem, seed, "report", settings.criticality_batches)
                planned.append(Planned(entrant.name, text, seed, lr, cell))
    return planned


def summarise(
    settings: EvaluateSettings, planned: Sequence[Planned], outcomes: Mapping[int, Outcome], tuned: Learning
) -> Evaluation:
    """Put together what came of the planned cells: `outcomes` by their index, those that were not run left out."""
    cells, rows = [], []
    failed = [
        FailedCell(name, text, None, lr, why)
        for text, problem in problem_specs(settings).items()
        for (name, where), found in tuned.items()
        if where == problem
        for lr, why in found.failures.items()
    ]
    groups: dict[tuple[str, str], list[int]] = {}
    for index, each in enumerate(planned):
        groups.setdefault((each.problem, each.optimizer), []).append(index)
    for indices in groups.values():
        results: list[tuple[EvaluatedCell, CellResult]] = []
        broken: list[FailedCell] = []
        for index in indices:
            each, outcome = planned[index], outcomes.get(index)
            if isinstance(outcome, CellResult):
                results.append((evaluated(each, outcome), outcome))
            elif isinstance(outcome, CellFailure):
                broken.append(FailedCell(each.optimizer, each.problem, each.seed, each.learning_rate, outcome.reason))
        cells += [cell for cell, _ in results]
        failed += broken
        if results or broken:
            first = planned[indices[0]]
            rows.append(_row(first, results, len(broken), tuned.get((first.optimizer, first.cell.problem))))
    return Evaluation(settings, tuple(cells), tuple(rows), tuple(failed))


def evaluated(planned: Planned, result: CellResult) -> EvaluatedCell:
    """Return the figures of a cell of one instance."""
    measured, guard = result.measured, result.guard
    if measured is None:
        raise ValueError(f"{planned.optimizer} on {planned.problem}: the end point was not measured")
    test = {name: tuple(values[0].tolist()) for name, values in result.test_metrics.items()}
    return EvaluatedCell(
        optimizer=planned.optimizer,
        problem=planned.problem,
        seed=planned.seed,
        steps=planned.cell.steps,
        losses=tuple(result.final[0].tolist()),
        test_accuracy=test.get("test_accuracy"),
        criticality=float(measured.end.absolute[0]),
        acceptance=None if guard is None else float(guard.acceptance[0]),
        evaluations=result.forwards + result.backwards,
        ms_per_step=result.ms_per_step,
        diverged=bool(result.diverged[0]),
        learning_rate=planned.learning_rate,
        test_loss=test.get("test_loss"),
        end_losses=tuple(measured.end.losses[0].tolist()),
        criticality_relative=float(measured.end.relative[0]),
        criticality_gap=float(measured.end.gap[0]),
        guard_share=None if guard is None else guard.share,
        forwards=result.forwards,
        backwards=result.backwards,
        conflicting=float(measured.conflicting[0]),
        mean_cosine=float(measured.mean_cosine[0]),
    )


def front_indicators(problem: Problem, points: Tensor) -> Front | None:
    """Compare end points [k, m] with the problem's front; None where no front or no reference point is known."""
    if problem.reference_point is None:
        return None
    try:
        front = problem.pareto_front(FRONT_POINTS)
    except UserError:  # none is known
        return None
    reached = points.where(points.isfinite().all(dim=1, keepdim=True), torch.inf)
    volume = hypervolume(reached, problem.reference_point)
    return Front(
        hypervolume=volume.value,
        hypervolume_of_front=hypervolume(front, problem.reference_point).value,
        outside=volume.outside,
        igd_plus=igd_plus(reached, front),
        additive_epsilon=additive_epsilon(reached, front),
    )


def _cell(
    settings: EvaluateSettings,
    contestant: Contestant,
    problem: ProblemSpec,
    seed: int,
    stream: str,
    criticality_batches: int = 0,
) -> Cell:
    return Cell(
        contestant=contestant,
        problem=problem,
        seeds=(seed,),
        stream=stream,
        steps=settings.steps,
        device=settings.device,
        data_root=settings.data.root,
        problem_seed=PROBLEM_SEED,
        criticality_batches=criticality_batches,
    )


def _row(
    planned: Planned, results: Sequence[tuple[EvaluatedCell, CellResult]], failed: int, tuned: Tuned | None
) -> Row:
    cells = [cell for cell, _ in results]
    loss, loss_error = _mean([float(result.final_sum[0]) for _, result in results])
    measure, measure_error = _mean([cell.criticality for cell in cells])
    curves = [result.losses[:, 0].sum(dim=1) for _, result in results]
    return Row(
        optimizer=planned.optimizer,
        problem=planned.problem,
        seeds=len(cells),
        failed=failed,
        diverged=sum(cell.diverged for cell in cells),
        loss=loss,
        loss_standard_error=loss_error,
        losses=_means([cell.losses for cell in cells]) or (),
        test_accuracy=_means([cell.test_accuracy for cell in cells]),
        criticality=measure,
        criticality_standard_error=measure_error,
        criticality_relative=_mean([cell.criticality_relative for cell in cells])[0],
        acceptance=_defined([cell.acceptance for cell in cells]),
        evaluations=_mean([cell.evaluations for cell in cells])[0],
        ms_per_step=_mean([cell.ms_per_step for cell in cells])[0],
        guard_share=_defined([cell.guard_share for cell in cells]),
        conflicting=_mean([cell.conflicting for cell in cells])[0],
        mean_cosine=_mean([cell.mean_cosine for cell in cells])[0],
        front=_front(planned, cells),
        learning_rate=planned.learning_rate,
        tuning={} if tuned is None else tuned.scores,
        note="" if tuned is None else tuned.note,
        curve=tuple(torch.stack(curves).mean(dim=0).tolist()) if curves else (),
    )


def _front(planned: Planned, cells: Sequence[EvaluatedCell]) -> Front | None:
    if not cells:
        return None
    cell = planned.cell
    problem = cell.problem.build(ProblemContext(seed=PROBLEM_SEED, dtype=torch.float64, data_root=cell.data_root))
    return front_indicators(problem, torch.tensor([each.end_losses for each in cells], dtype=torch.float64))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return mean_and_standard_error(values) if values else (math.nan, math.nan)


def _means(values: Sequence[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    """Return the mean of each component; None where there is none."""
    known = [value for value in values if value is not None]
    return tuple(_mean(component)[0] for component in zip(*known, strict=True)) if known else None


def _defined(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known)[0] if known else None

"""A benchmark: every optimizer on every problem, once for each seed. It plans the cells and summarises their results.

Pure: the caller of `tune_entrants` and `plan` runs the cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ml2o_dist.config import EvaluateSettings, split_steps
from ml2o_dist.evaluation.cells import Cell, CellFailure, CellResult, Outcome, finite_sum
from ml2o_dist.evaluation.evaluated import (
    CURVE_POINTS,
    Curve,
    EvaluatedCell,
    Evaluation,
    FailedCell,
    Front,
    Row,
)
from ml2o_dist.evaluation.metrics import additive_epsilon, hypervolume, igd_plus
from ml2o_dist.evaluation.optimizer_names import Entrant
from ml2o_dist.evaluation.optimizer_specs import OptimizerSpec
from ml2o_dist.evaluation.standings import standings
from ml2o_dist.evaluation.statistics import mean_and_standard_error
from ml2o_dist.evaluation.suites import suite_sha256
from ml2o_dist.evaluation.tuning import Tunable, Tuned, tune
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.rules.base import Oracle
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import derive_seed, generator

PROBLEM_SEED = 0
"""Every seed gets the same coefficients, those of `ProblemContext()`. A seed decides only the starting point and the
order of the batches, so that the end points of all seeds are compared with one front."""

FRONT_POINTS = 1000
"""Points of a known front that the indicators compare with."""

SHOWN_POINTS = 100
"""About how many points of a known front are kept for the pictures."""

RunOutcomes = Callable[[Sequence[Cell]], Sequence[Outcome]]
Learning = Mapping[tuple[str, str], Tuned]
"""(name of an optimizer, problem as written) -> its learning rate, for those that were tuned."""
DataHashes = Mapping[ProblemSpec, Mapping[str, str]]
"""Problem -> (name of a data set that it uses -> its sha256)."""


@dataclass(frozen=True)
class Task:
    """A problem as the user wrote it, and the number of steps on it."""

    text: str
    problem: ProblemSpec
    steps: int


@dataclass(frozen=True, eq=False)
class Planned:
    """A cell that is to be reported."""

    entrant: Entrant
    task: Task
    seed: int
    learning_rate: float | None
    cell: Cell


def tasks(settings: EvaluateSettings) -> list[Task]:
    """Return the problems of `settings`, each once."""
    found = []
    for text in dict.fromkeys(settings.problems):
        problem, steps = split_steps(text)
        found.append(Task(text, problem, steps or settings.steps))
    return found


def check_fit(settings: EvaluateSettings, entrants: Sequence[Entrant]) -> dict[ProblemSpec, dict[str, str]]:
    """Let every entrant take one step on every problem, so that a mismatch shows before the run.

    It also builds the image caches before several tasks ask for them. Returns `DataHashes`; raises UserError.
    """
    data: dict[ProblemSpec, dict[str, str]] = {}
    for task in tasks(settings):
        problem = task.problem.build(ProblemContext(seed=PROBLEM_SEED, data_root=settings.data.root))
        data[task.problem] = problem.data_hashes(test=True)
        start = problem.initial_parameters([settings.seed])
        for entrant in entrants:
            optimizer = entrant.optimizer(settings.learning_rates[0] if entrant.tuned else None)
            try:
                rule = optimizer.rule(problem.device, problem.dtype)
                state = rule.initial_state(1, problem.objectives, problem.layout)
                rule.step(Oracle(problem, generator("check", task.text)), start, state)
            except UserError as error:
                raise UserError(f"{entrant.name} on {task.text}: {error}") from error
    return data


def tune_entrants(settings: EvaluateSettings, entrants: Sequence[Entrant], run_cells: RunOutcomes) -> Learning:
    """Find the learning rate of each entrant that is `tuned` on each problem, from seeds used for nothing else."""
    tunables = [Tunable(entrant.name, entrant.optimizer) for entrant in entrants if entrant.tuned]
    by_text = {task.text: task for task in tasks(settings)}

    def trial(optimizer: OptimizerSpec, text: str) -> list[Cell]:
        task = by_text[text]
        seeds = [derive_seed(settings.seed, "tuning", str(task.problem), i) for i in range(settings.tuning_seeds)]
        return [_cell(settings, optimizer, task, seed, "tuning") for seed in seeds]

    return tune(tunables, list(by_text), settings.learning_rates, trial, run_cells)


def plan(settings: EvaluateSettings, entrants: Sequence[Entrant], tuned: Learning) -> list[Planned]:
    """Return the cells that are to be reported, problem by problem, optimizer by optimizer, seed by seed."""
    planned = []
    for task in tasks(settings):
        for entrant in entrants:
            lr = tuned[entrant.name, task.text].lr if entrant.tuned else entrant.learning_rate
            optimizer = entrant.optimizer(lr)
            for seed in range(settings.seed, settings.seed + settings.seeds):
                cell = _cell(settings, optimizer, task, seed, "report")
                cell = replace(cell, criticality_batches=settings.criticality_batches)
                planned.append(Planned(entrant, task, seed, lr, cell))
    return planned


def summarise(
    settings: EvaluateSettings,
    planned: Sequence[Planned],
    outcomes: Sequence[Outcome],
    tuned: Learning,
    data: DataHashes,
    seconds: float | None = None,
) -> Evaluation:
    """Return the evaluation made of the planned cells; `outcomes` has the order of `planned`."""
    failed = [
        FailedCell(name, text, None, lr, why)
        for (name, text), found in tuned.items()
        for lr, why in found.failures.items()
    ]
    groups: dict[tuple[str, str], list[tuple[Planned, Outcome]]] = {}  # by problem and optimizer
    for each, outcome in zip(planned, outcomes, strict=True):
        groups.setdefault((each.task.text, each.entrant.name), []).append((each, outcome))
        if isinstance(outcome, CellFailure):
            lr = each.learning_rate
            failed.append(FailedCell(each.entrant.name, each.task.text, each.seed, lr, outcome.reason))
    done = {
        key: [(each, outcome) for each, outcome in group if isinstance(outcome, CellResult)]
        for key, group in groups.items()
    }
    cells = [evaluated(each, result) for group in done.values() for each, result in group]
    problems = {task.text: _problem(settings, task) for task in tasks(settings)}
    rows = []
    for (text, name), group in groups.items():
        came = [outcome for _, outcome in group]
        reference = [result for _, result in done.get((text, settings.reference), [])]
        rows.append(_row(group[0][0], came, tuned.get((name, text)), _Budget.of(reference), problems[text]))
    return Evaluation(
        settings=settings,
        suite=settings.suite,
        suite_sha256=suite_sha256(settings),
        data_sha256={name: digest for hashes in data.values() for name, digest in hashes.items()},
        cells=tuple(cells),
        rows=tuple(rows),
        standings=standings(rows, settings.reference, {text for text, each in problems.items() if each.positive}),
        failed=tuple(failed),
        fronts={text: points for text, problem in problems.items() if (points := _shown_front(problem))},
        seconds=seconds,
    )


def evaluated(planned: Planned, result: CellResult) -> EvaluatedCell:
    """Return the figures of a cell of one instance."""
    measured, guard = result.measured, result.guard
    if measured is None:
        raise ValueError(f"{planned.entrant.name} on {planned.task.text}: the end point was not measured")
    test = {name: tuple(values[0].tolist()) for name, values in result.test_metrics.items()}
    return EvaluatedCell(
        optimizer=planned.entrant.name,
        problem=planned.task.text,
        seed=planned.seed,
        steps=planned.cell.steps,
        losses=tuple(result.final[0].tolist()),
        test_accuracy=test.get("test_accuracy"),
        criticality=float(measured.end.absolute[0]),
        acceptance=None if guard is None else float(guard.accepted[:, 0].double().mean()),
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
    front = _known_front(problem)
    if front is None or problem.reference_point is None:
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


def thinned(curves: Sequence[Tensor], accepted: Sequence[Tensor]) -> Curve:
    """Average curves [steps] of summed losses over the seeds, and over bins of steps where there are many.

    `accepted`: [steps] of every seed, or empty without a guard.
    """
    steps = len(curves[0])
    width = math.ceil(steps / CURVE_POINTS)
    ends = [min(end, steps) for end in range(width, steps + width, width)]
    binned = [[float(part.mean()) for part in torch.split(curve, width)] for curve in curves]
    stacked = [mean_and_standard_error(values) for values in zip(*binned, strict=True)]
    shares = None
    if accepted:
        mean = torch.stack(list(accepted)).double().mean(dim=0)
        shares = tuple(float(part.mean()) for part in torch.split(mean, width))
    means, errors = zip(*stacked, strict=True)
    return Curve(tuple(ends), means, errors, shares)


@dataclass(frozen=True)
class _Budget:
    """What the reference spends in all its steps, mean over its seeds; infinite without a reference."""

    evaluations: float = math.inf
    seconds: float = math.inf

    @classmethod
    def of(cls, results: Sequence[CellResult]) -> _Budget:
        if not results:
            return cls()
        evaluations = [float(result.evaluations[-1]) for result in results]
        seconds = [float(result.seconds.sum()) for result in results]
        return cls(_mean(evaluations)[0], _mean(seconds)[0] * (1 + 1e-6))  # room for rounding


def _cell(settings: EvaluateSettings, optimizer: OptimizerSpec, task: Task, seed: int, stream: str) -> Cell:
    return Cell(
        optimizer=optimizer,
        problem=task.problem,
        seeds=(seed,),
        stream=stream,
        steps=task.steps,
        device=settings.device,
        data_root=settings.data.root,
        problem_seed=PROBLEM_SEED,
    )


def _problem(settings: EvaluateSettings, task: Task) -> Problem:
    return task.problem.build(ProblemContext(seed=PROBLEM_SEED, dtype=torch.float64, data_root=settings.data.root))


def _row(planned: Planned, outcomes: Sequence[Outcome], tuned: Tuned | None, budget: _Budget, problem: Problem) -> Row:
    entrant, lr = planned.entrant, planned.learning_rate
    results = [outcome for outcome in outcomes if isinstance(outcome, CellResult)]
    cells = [evaluated(planned, result) for result in results]
    loss, loss_error = _mean([float(result.final_sum[0]) for result in results])
    pace = _mean([float(result.seconds.mean()) for result in results])[0]  # the mean over seeds: one seed is too noisy
    times = pace * torch.arange(1, planned.task.steps + 1)
    measure, measure_error = _mean([cell.criticality for cell in cells])
    curves = [result.losses[:, 0].sum(dim=1) for result in results]
    accepted = [result.guard.accepted[:, 0] for result in results if result.guard is not None]
    ends = torch.tensor([cell.end_losses for cell in cells], dtype=torch.float64)
    return Row(
        optimizer=entrant.name,
        label=f"{entrant.name}@{lr:g}" if entrant.tuned else entrant.name,
        role=entrant.role,
        problem=planned.task.text,
        steps=planned.task.steps,
        seeds=len(cells),
        failed=len(outcomes) - len(results),
        diverged=sum(cell.diverged for cell in cells),
        loss=loss,
        loss_standard_error=loss_error,
        seed_losses=tuple(
            float(outcome.final_sum[0]) if isinstance(outcome, CellResult) else math.nan for outcome in outcomes
        ),
        loss_at_evaluations=_mean([_after(result, result.evaluations, budget.evaluations) for result in results])[0],
        loss_at_time=_mean([_after(result, times, budget.seconds) for result in results])[0],
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
        front=front_indicators(problem, ends) if cells else None,
        learning_rate=lr,
        tuning={} if tuned is None else tuned.scores,
        note="" if tuned is None else tuned.note,
        curve=thinned(curves, accepted) if curves else Curve(),
    )


def _after(result: CellResult, spent: Tensor, budget: float) -> float:
    """Return the final summed loss after the steps with `spent` [steps] <= `budget`, after one step at least."""
    steps = max(1, int((spent <= budget).sum()))
    return float(finite_sum(result.final_after(steps))[0])


def _known_front(problem: Problem, points: int = FRONT_POINTS) -> Tensor | None:
    try:
        return problem.pareto_front(points)
    except UserError:  # no front is known
        return None


def _shown_front(problem: Problem) -> tuple[tuple[float, ...], ...]:
    """Return about `SHOWN_POINTS` points of the known front; () if no front is known."""
    front = _known_front(problem, SHOWN_POINTS)
    return () if front is None else tuple(map(tuple, front.tolist()))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return mean_and_standard_error(values) if values else (math.nan, math.nan)


def _means(values: Sequence[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    """Return the mean of each component over the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return tuple(_mean(component)[0] for component in zip(*known, strict=True)) if known else None


def _defined(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known)[0] if known else None

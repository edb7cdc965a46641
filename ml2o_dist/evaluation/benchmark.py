"""The comparison at the end of a run: tune each baseline, run everything on paired seeds, judge the learned rule.

Pure but for `run_cells`, which is handed in: a plain loop, Ray tasks, or anything else that runs cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.evaluation.cells import Cell, CellResult
from ml2o_dist.evaluation.contestants import Contestant, HandDesigned
from ml2o_dist.evaluation.statistics import PairedDifference, mean_and_standard_error, paired_difference
from ml2o_dist.evaluation.tuning import Tunable, tune
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.aggregated import parse_optimizer_name
from ml2o_dist.seeding import derive_seed

LEARNED = "learned"
INITIAL = "initial"
"""Labels of the contestants that the verdicts are about: the trained network, and the same before training."""

RunCells = Callable[[Sequence[Cell]], list[CellResult]]
"""Runs cells, in any order and place; results in the order of the cells."""


@dataclass(frozen=True)
class Baseline:
    """A baseline with its learning rate: `tuning` has the criterion at every rate tried, {} where it was given."""

    optimizer: str
    contestant: HandDesigned
    tuning: Mapping[float, float]
    note: str


@dataclass(frozen=True)
class Row:
    """One optimizer on one problem. Losses are means over the last tenth of the steps.

    Attributes:
        optimizer: as written in the settings, or the contestant's label.
        label: with the learning rate that it was run at.
        baseline: whether it is a hand-designed baseline of the settings.
        loss, standard_error: of the summed loss, over the seeds; inf where a seed's is no finite number.
        seed_losses: the summed loss of each seed.  objectives: the mean loss of each objective.
        test: means over the seeds of what the problem measures on unseen data, a value per objective.
        ms_per_step: as in `CellResult`.  forwards, backwards: evaluations charged to each seed.
        diverged: how many seeds did.
        curve, curve_error: mean and standard error of the summed loss at each step.
        tuning: learning rate -> criterion on the tuning seeds.  note: what a reader must know about the tuning.
    """

    optimizer: str
    label: str
    baseline: bool
    loss: float
    standard_error: float
    seed_losses: tuple[float, ...]
    objectives: tuple[float, ...]
    test: Mapping[str, tuple[float, ...]]
    ms_per_step: float
    forwards: int
    backwards: int
    diverged: int
    curve: tuple[float, ...]
    curve_error: tuple[float, ...]
    tuning: Mapping[float, float]
    note: str


@dataclass(frozen=True)
class Versus:
    """The learned rule against a reference, on the same seeds.

    `ratio` is the mean loss over the reference's: below 1 = better; NaN where a mean is not positive and finite.
    """

    reference: str
    difference: PairedDifference
    ratio: float
    within_one_se: bool
    verdict: str


@dataclass(frozen=True)
class ProblemComparison:
    """All rows of one problem, best first; `best_baseline` is the label of the best baseline on the report seeds."""

    problem: str
    rows: tuple[Row, ...]
    best_baseline: str | None
    versus_baseline: Versus | None
    versus_initial: Versus | None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: a table per problem, and how it was made; `seconds` is what it took, where known."""

    steps: int
    seeds: int
    tuning_seeds: int
    learning_rates: tuple[float, ...]
    problems: tuple[ProblemComparison, ...]
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and finite numbers; what is not finite becomes None."""
        plain: dict[str, Any] = plain_json(asdict(self))
        return plain

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Comparison:
        """Read what `to_json` returned; a figure that was not finite comes back as NaN.

        Raises:
            ValueError, TypeError, KeyError: `tree` is something else.
        """
        return cls(
            steps=tree["steps"],
            seeds=tree["seeds"],
            tuning_seeds=tree["tuning_seeds"],
            learning_rates=_floats(tree["learning_rates"]),
            problems=tuple(
                ProblemComparison(
                    problem=each["problem"],
                    rows=tuple(map(_row_from_json, each["rows"])),
                    best_baseline=each["best_baseline"],
                    versus_baseline=_versus_from_json(each["versus_baseline"]),
                    versus_initial=_versus_from_json(each["versus_initial"]),
                )
                for each in tree["problems"]
            ),
            seconds=tree.get("seconds"),
        )


def compare(settings: MetaTrainSettings, contestants: Sequence[Contestant], run_cells: RunCells) -> Comparison:
    """Compare `contestants` with the baselines of `settings.comparison` on the problems of `settings.family.test`.

    Each baseline without @LR is tuned per problem over `learning_rates`, all with the same budget, on seeds that are
    used for nothing else: the criterion is the mean summed loss over the last tenth, infinite where a run diverged.
    Contestants are not tuned. Then all run on the report seeds, paired: same starting points, same batches. The best
    baseline is chosen on the report seeds, in favour of the baselines. Verdicts are about the contestants labelled
    `learned` and `initial`, where there are any.

    Raises:
        UserError: a wrong baseline; or what a cell raises.
        ValueError: two contestants have one label.
    """
    labels = [contestant.label for contestant in contestants]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the labels of the contestants must differ: {labels}")
    problems = [ProblemSpec.parse(text) for text in settings.family.test]
    baselines = _baselines(settings, problems, run_cells)
    report: list[Cell] = []
    for problem in problems:
        seeds = _seeds(settings, "report", problem, settings.comparison.seeds)
        entrants: list[Contestant] = [*(baseline.contestant for baseline in baselines[problem]), *contestants]
        report += [_cell(settings, entrant, problem, seeds, "report") for entrant in entrants]
    results = iter(run_cells(report))
    tables = []
    for problem in problems:
        rows = [_row(next(results), baseline) for baseline in baselines[problem]]
        rows += [_row(next(results), None) for _ in contestants]
        tables.append(_judge(str(problem), rows))
    options = settings.comparison
    return Comparison(options.steps, options.seeds, options.tuning_seeds, options.learning_rates, tuple(tables))


def _baselines(
    settings: MetaTrainSettings, problems: Sequence[ProblemSpec], run_cells: RunCells
) -> dict[ProblemSpec, list[Baseline]]:
    """Give every baseline its learning rate on every problem."""
    options = settings.comparison
    given = {text: parse_optimizer_name(text)[2] for text in options.baselines}

    def trial(contestant: Contestant, problem: ProblemSpec) -> list[Cell]:
        seeds = _seeds(settings, "tuning", problem, options.tuning_seeds)
        return [_cell(settings, contestant, problem, seeds, "tuning")]

    tunables = [Tunable(text, partial(HandDesigned.parse, text)) for text, lr in given.items() if lr is None]
    tuned = tune(tunables, problems, options.learning_rates, trial, run_cells)
    found: dict[ProblemSpec, list[Baseline]] = {}
    for problem in problems:
        found[problem] = []
        for text in options.baselines:
            if (text, problem) in tuned:
                best = tuned[text, problem]
                found[problem].append(Baseline(text, HandDesigned.parse(text, best.lr), best.scores, best.note))
            else:
                found[problem].append(Baseline(text, HandDesigned.parse(text), {}, ""))
    return found


def _seeds(settings: MetaTrainSettings, purpose: str, problem: ProblemSpec, count: int) -> tuple[int, ...]:
    return tuple(derive_seed(settings.seed, purpose, str(problem), i) for i in range(count))


def _cell(
    settings: MetaTrainSettings, contestant: Contestant, problem: ProblemSpec, seeds: tuple[int, ...], stream: str
) -> Cell:
    return Cell(
        contestant=contestant,
        problem=problem,
        seeds=seeds,
        stream=stream,
        steps=settings.comparison.steps,
        device=settings.device,
        data_root=settings.data.root,
    )


def _row(result: CellResult, baseline: Baseline | None) -> Row:
    seed_losses = tuple(result.final_sum.tolist())
    loss, error = mean_and_standard_error(seed_losses)
    curves: Tensor = result.losses.sum(dim=2)  # [steps, P]
    count = curves.shape[1]
    spread = curves.std(dim=1) / math.sqrt(count) if count > 1 else torch.full_like(curves[:, 0], math.nan)
    return Row(
        optimizer=result.optimizer if baseline is None else baseline.optimizer,
        label=result.optimizer,
        baseline=baseline is not None,
        loss=loss,
        standard_error=error,
        seed_losses=seed_losses,
        objectives=tuple(result.final.mean(dim=0).tolist()),
        test={name: tuple(value.mean(dim=0).tolist()) for name, value in result.test_metrics.items()},
        ms_per_step=result.ms_per_step,
        forwards=result.forwards,
        backwards=result.backwards,
        diverged=int(result.diverged.sum()),
        curve=tuple(curves.mean(dim=1).tolist()),
        curve_error=tuple(spread.tolist()),
        tuning={} if baseline is None else baseline.tuning,
        note="" if baseline is None else baseline.note,
    )


def _judge(problem: str, rows: Sequence[Row]) -> ProblemComparison:
    ranked = tuple(sorted(rows, key=lambda row: row.loss))
    best = next((row for row in ranked if row.baseline), None)
    learned, initial = (
        next((row for row in rows if row.label == name and not row.baseline), None) for name in (LEARNED, INITIAL)
    )
    return ProblemComparison(
        problem=problem,
        rows=ranked,
        best_baseline=best.label if best is not None else None,
        versus_baseline=_versus(learned, best),
        versus_initial=_versus(learned, initial),
    )


def _versus(learned: Row | None, reference: Row | None) -> Versus | None:
    if learned is None or reference is None:
        return None
    difference = paired_difference(learned.seed_losses, reference.seed_losses)
    comparable = 0 < learned.loss < math.inf and 0 < reference.loss < math.inf
    return Versus(
        reference=reference.label,
        difference=difference,
        ratio=learned.loss / reference.loss if comparable else math.nan,
        within_one_se=difference.no_worse_within_one_se,
        verdict=difference.verdict,
    )


def plain_json(value: Any) -> Any:
    """Return dicts, lists, strings and finite numbers only; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _floats(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(_number(value) for value in values)


def _row_from_json(tree: Mapping[str, Any]) -> Row:
    return Row(
        **{
            **tree,
            **{key: _number(tree[key]) for key in ("loss", "standard_error", "ms_per_step")},
            **{key: _floats(tree[key]) for key in ("seed_losses", "objectives", "curve", "curve_error")},
            "test": {name: _floats(values) for name, values in tree["test"].items()},
            "tuning": {float(rate): _number(score) for rate, score in tree["tuning"].items()},
        }
    )


def _versus_from_json(tree: Mapping[str, Any] | None) -> Versus | None:
    if tree is None:
        return None
    mean, error = (_number(tree["difference"][key]) for key in ("mean", "standard_error"))
    difference = PairedDifference(mean, error, tree["difference"]["pairs"])
    return Versus(**{**tree, "difference": difference, "ratio": _number(tree["ratio"])})

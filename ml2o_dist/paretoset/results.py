"""The results of a run's approaches, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, TypeAdapter

from ml2o_dist.evaluation.metrics import igd_plus
from ml2o_dist.paretoset.approaches import OURS, Outcome
from ml2o_dist.paretoset.fronts import REFERENCE, Front, front_from_json
from ml2o_dist.runtime import shown_text
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import read_json, validated

SPLITS = ("validation", "test")


@dataclass(frozen=True, eq=False)
class ApproachResult:
    """One approach: its fronts and their cost.

    Attributes:
        fronts: the fronts by split; empty if all trainings diverged.
        steps, seconds, trained_parameters: totals over all its trainings.
        peak_mb: peak memory of the largest process.
        failures: EPO's linear programs without a solution.
        diverged: rays that have no network; the others' front stands.
        igd_plus: IGD+ of the test front to the best of all approaches' test points; None if that is not known.
    """

    approach: str
    fronts: dict[str, Front]
    steps: int
    seconds: float
    trained_parameters: int
    peak_mb: float
    failures: int
    diverged: int
    igd_plus: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        rest = {key: value for key, value in vars(self).items() if key != "fronts"}
        return rest | {split: front.to_json() for split, front in self.fronts.items()}


_Count = Annotated[int, Field(ge=0, lt=2**60)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _ApproachJson(BaseModel):
    approach: str
    steps: _Count
    seconds: _Amount
    trained_parameters: _Count
    peak_mb: _Amount
    failures: _Count
    diverged: _Count
    igd_plus: _Amount | None = None


class _FrontsJson(BaseModel):
    tasks: tuple[str, ...]
    data_sha256: dict[str, str]
    git: str | None
    approaches: list[dict[str, Any]]


_APPROACH, _FRONTS = TypeAdapter(_ApproachJson), TypeAdapter(_FrontsJson)


def assembled(outcomes: Sequence[Outcome]) -> list[ApproachResult]:
    """Join the rays of each approach, in the order of the outcomes, and compare their fronts."""
    by_name: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_name.setdefault(outcome["approach"], []).append(outcome)
    results = [_joined(name, each) for name, each in by_name.items()]
    points = [result.fronts["test"].losses for result in results if "test" in result.fronts]
    if not points:
        return results
    best = nondominated(torch.cat(points))
    return [_with_igd(result, best) for result in results]


@dataclass(frozen=True, eq=False)
class Fronts:
    """The content of `fronts.json`: the tasks' names, all approaches, and the inputs they were made from."""

    tasks: tuple[str, ...]
    approaches: list[ApproachResult]
    data_sha256: dict[str, str]
    git: str | None


def read_fronts(file: Path) -> Fronts:
    """Read the fronts of a run, `fronts.json` in its folder.

    Raises:
        FileNotFoundError: there are none.
        UserError: the file holds something else.
    """
    shown = f"fronts {str(file)!r}"
    found = validated(_FRONTS, read_json(file, "fronts", within=file.parent, finite=True), shown)
    try:
        approaches = [from_json(each) for each in found.approaches]
    except UserError as error:
        raise UserError(f"{shown} cannot be used: {error}") from error
    names = [each.approach for each in approaches]
    fronts = [front for each in approaches for front in each.fronts.values()]
    if len(set(names)) < len(names) or any(front.losses.shape[1] != len(found.tasks) for front in fronts):
        raise UserError(f"{shown} cannot be used: an approach stands there twice, or has other tasks")
    return Fronts(found.tasks, approaches, found.data_sha256, found.git)


def from_json(value: dict[str, Any]) -> ApproachResult:
    """Return the result that `ApproachResult.to_json` wrote; raises UserError if it is something else."""
    fronts = {split: front_from_json(value[split]) for split in SPLITS if split in value}
    rest = validated(_APPROACH, {key: each for key, each in value.items() if key not in SPLITS}, "an approach")
    return ApproachResult(fronts=fronts, **rest.model_dump())


def nondominated(points: torch.Tensor) -> torch.Tensor:
    """Return the rows of `points` [k, m] that no other row dominates."""
    no_worse = (points.unsqueeze(0) <= points.unsqueeze(1)).all(dim=2)
    better = (points.unsqueeze(0) < points.unsqueeze(1)).any(dim=2)
    return points[~(no_worse & better).any(dim=1)]


def best_first(results: Sequence[ApproachResult]) -> list[ApproachResult]:
    """Return the results by falling hypervolume, those without a front last."""
    return sorted(results, key=lambda r: -r.fronts["test"].hypervolume if "test" in r.fronts else math.inf)


def columns() -> list[str]:
    """Return the heads of the table."""
    return [
        "approach",
        "hypervolume",
        "IGD+",
        "monotonicity",
        "even loss",
        "even accuracy",
        "trained",
        "steps",
        "seconds",
        "MB",
        "remarks",
    ]


def cells(result: ApproachResult) -> list[str]:
    """Return one row of the table, of the test split; `even` is the point whose preference is nearest to even."""
    front = result.fronts.get("test")
    remarks = []
    if result.diverged:
        remarks.append(f"{result.diverged} diverged")
    if result.failures:
        remarks.append(f"{result.failures} linear programs without a solution")
    if front is not None and front.hypervolume == 0:
        remarks.append(f"no point has all losses below the reference {REFERENCE:g}")
    shown = [result.approach]
    if front is None:
        shown += ["-"] * 5
    else:
        even = int((front.rays - front.rays.mean(dim=1, keepdim=True)).square().sum(dim=1).argmin())
        monotonicity = front.monotonicity
        shown += [
            f"{front.hypervolume:.3f}",
            "-" if result.igd_plus is None else f"{result.igd_plus:.3f}",
            "-" if monotonicity is None else f"{monotonicity:.2f}",
            " ".join(f"{loss:.3f}" for loss in front.losses[even].tolist()),
            " ".join(f"{right:.3f}" for right in front.accuracies[even].tolist()),
        ]
    return [
        *shown,
        f"{result.trained_parameters:,}",
        f"{result.steps:,}",
        f"{result.seconds:.0f}",
        f"{result.peak_mb:.0f}",
        "; ".join(remarks),
    ]


def markdown(results: Sequence[ApproachResult], title: str) -> str:
    """Return the table as Markdown; ours is bold."""
    lines = [f"# {shown_text.markdown(title)}", "", shown_text.markdown_row(columns()), "|---" * len(columns()) + "|"]
    for result in best_first(results):
        row = [shown_text.markdown(cell) for cell in cells(result)]
        row[0] = f"**{row[0]}**" if result.approach == OURS else row[0]
        lines.append(shown_text.markdown_row(row))
    return "\n".join(lines) + "\n"


def _joined(name: str, outcomes: Sequence[Outcome]) -> ApproachResult:
    whole = [outcome for outcome in outcomes if not outcome["diverged"]]
    fronts = {}
    for split in SPLITS:
        parts = [front_from_json(outcome[split]) for outcome in whole]
        if parts:
            fronts[split] = Front(
                *(torch.cat([getattr(p, k) for p in parts]) for k in ("rays", "losses", "accuracies"))
            )
    return ApproachResult(
        approach=name,
        fronts=fronts,
        steps=sum(outcome["steps"] for outcome in outcomes),
        seconds=sum(outcome["seconds"] for outcome in outcomes),
        trained_parameters=sum(outcome["trained_parameters"] for outcome in outcomes),
        peak_mb=max(outcome["peak_mb"] for outcome in outcomes),
        failures=sum(outcome["failures"] for outcome in outcomes),
        diverged=len(outcomes) - len(whole),
    )


def _with_igd(result: ApproachResult, best: torch.Tensor) -> ApproachResult:
    if "test" not in result.fronts:
        return result
    return ApproachResult(**vars(result) | {"igd_plus": igd_plus(result.fronts["test"].losses, best)})

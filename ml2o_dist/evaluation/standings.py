"""Compare each optimizer with the reference and the best baselines over all problems of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from ml2o_dist.evaluation.curve_statistics import log_area, speedup
from ml2o_dist.evaluation.evaluated import Row, Standing
from ml2o_dist.evaluation.statistics import Interval, improvement_interval, iqm_interval, share_interval
from ml2o_dist.evaluation.table_statistics import delta_m, mean_ranks

LARGEST_RATIO = 1e6
"""Ratios of losses are clipped to [1 / LARGEST_RATIO, LARGEST_RATIO]; if one of the two runs diverged, to an end."""

Losses = Mapping[str, Sequence[float]]
"""Problem -> the loss of each seed, inf where it diverged, NaN where it could not be run."""


def standings(rows: Sequence[Row], reference: str, positive: Collection[str]) -> tuple[Standing, ...]:
    """Return the standing of each optimizer, in the order of the rows; () if the reference has no rows.

    Args:
        rows: of every optimizer on every problem.
        positive: the problems whose losses are positive by construction: ratios use these alone.
    """
    by_optimizer: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_optimizer.setdefault(row.optimizer, {})[row.problem] = row
    if reference not in by_optimizer:
        return ()
    baselines = {name for name, found in by_optimizer.items() if any(row.role == "baseline" for row in found.values())}
    baselines.add(reference)
    best = {
        problem: min((by_optimizer[name][problem] for name in baselines), key=_loss)
        for problem in by_optimizer[reference]
    }
    return tuple(
        _standing(found, by_optimizer[reference], best, [by_optimizer[name] for name in baselines - {name}], positive)
        for name, found in by_optimizer.items()
    )


def log_ratios(ours: Losses, theirs: Losses) -> list[list[float]]:
    """Return, by problem, log(our loss / theirs) of each seed that both ran, within +-log `LARGEST_RATIO`.

    The value is 0 where both diverged. Problems without a pair are left out.
    """
    strata = []
    for problem, losses in ours.items():
        pairs = [(a, b) for a, b in zip(losses, theirs[problem], strict=True) if not math.isnan(a) | math.isnan(b)]
        if pairs:
            strata.append([_log_ratio(a, b) for a, b in pairs])
    return strata


def ratio_interval(ours: Losses, theirs: Losses) -> Interval:
    """Return exp of the interquartile mean of `log_ratios`, with its interval; NaN if there are no ratios."""
    strata = log_ratios(ours, theirs)
    if not strata:
        return Interval(math.nan, math.nan, math.nan)
    found = iqm_interval(strata)
    return Interval(math.exp(found.estimate), math.exp(found.low), math.exp(found.high))


def _standing(
    found: Mapping[str, Row],
    reference: Mapping[str, Row],
    best: Mapping[str, Row],
    others: Sequence[Mapping[str, Row]],
    positive: Collection[str],
) -> Standing:
    first = next(iter(found.values()))
    shared = [problem for problem in found if problem in positive]
    ours, theirs, bests = ({p: each[p].seed_losses for p in shared} for each in (found, reference, best))
    pairs = [(found[p], reference[p]) for p in found]
    accuracies = [
        delta_m(a.test_accuracy, b.test_accuracy, higher_is_better=True)
        for a, b in pairs
        if a.test_accuracy is not None and b.test_accuracy is not None
    ]
    return Standing(
        optimizer=first.optimizer,
        role=first.role,
        problems=len(shared),
        ratio=ratio_interval(ours, theirs),
        to_best=ratio_interval(ours, bests),
        ratio_at_evaluations=_geometric_mean(
            [_ratio(found[p].loss_at_evaluations, reference[p].loss_at_evaluations) for p in shared]
        ),
        ratio_at_time=_geometric_mean([_ratio(found[p].loss_at_time, reference[p].loss_at_time) for p in shared]),
        improvement=_improvement(ours, theirs),
        mean_rank=_mean_rank(found, others),
        delta_m=_mean([delta_m(a.losses, b.losses, higher_is_better=False) for a, b in pairs if a.losses and b.losses]),
        delta_m_accuracy=_mean(accuracies) if accuracies else None,
        speedup=_geometric_mean([speedup(found[p].curve.loss, best[p].curve.loss, _window(found[p])) for p in shared]),
        log_area=_mean([log_area(found[p].curve.loss, reference[p].curve.loss) for p in shared]),
        diverged=share_interval(sum(row.diverged for row in found.values()), sum(row.seeds for row in found.values())),
    )


def _log_ratio(ours: float, theirs: float) -> float:
    if math.isinf(ours) and math.isinf(theirs):
        return 0.0
    return math.log(min(max(_ratio(ours, theirs), 1 / LARGEST_RATIO), LARGEST_RATIO))


def _ratio(ours: float, theirs: float) -> float:
    if theirs == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / theirs


def _improvement(ours: Losses, theirs: Losses) -> Interval:
    """Return `improvement_interval` over the seeds that ran for both; NaN if there are none."""
    strata = [
        [(a, b) for a, b in zip(losses, theirs[problem], strict=True) if not math.isnan(a) | math.isnan(b)]
        for problem, losses in ours.items()
    ]
    strata = [pairs for pairs in strata if pairs]
    if not strata:
        return Interval(math.nan, math.nan, math.nan)
    mine, others = ([[pair[i] for pair in pairs] for pairs in strata] for i in (0, 1))
    return improvement_interval(mine, others)


def _mean_rank(found: Mapping[str, Row], others: Sequence[Mapping[str, Row]]) -> float:
    """Return the mean rank of `found` over the seeds that ran for all; others without any run do not count."""
    ours, *theirs = ([loss for p in found for loss in rows[p].seed_losses] for rows in (found, *others))
    table = [ours, *(losses for losses in theirs if not all(map(math.isnan, losses)))]
    runs = [run for run in zip(*table, strict=True) if not any(map(math.isnan, run))]
    return mean_ranks(list(zip(*runs, strict=True)))[0] if runs else math.nan


def _loss(row: Row) -> float:
    return row.loss if math.isfinite(row.loss) else math.inf


def _window(row: Row) -> int:
    return max(1, len(row.curve.loss) // 10)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; NaN if there is no value, or one is not positive and finite."""
    if not values or not all(0 < value < math.inf for value in values):
        return math.nan
    return math.exp(_mean([math.log(value) for value in values]))

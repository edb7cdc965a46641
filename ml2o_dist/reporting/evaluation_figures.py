"""The figures of an evaluation as text, shared by the tables of the terminal, of Markdown and of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ml2o_dist.evaluation.evaluated import Evaluation, Front, Row, Standing
from ml2o_dist.evaluation.statistics import Interval, PairedDifference, paired_difference

NOTHING = "-"
STAR = " *"
RATIO_FORM = "#.4g"
"""Number format of ratios: they are often so near to 1 that three digits would not show the side."""
SHORT_HEADING = 8
"""Longest column name that is not broken into two lines, in characters."""
LEARNED, INITIAL = "learned", "initial"
"""Names of the entrants at the end of a meta-training: the kept weights, and the untrained network."""

OPTIMIZER, LOSS, OBJECTIVES, ACCURACY = "optimizer", "loss by steps", "per objective", "test accuracy %"
AT_EVALUATIONS, AT_TIME = "by evals", "by time"
CRITICALITY, TIME, EVALUATIONS, ACCEPTED, GUARD = "criticality", "ms/step", "evals", "accepted %", "guard %"
FRONT = ("hypervolume", "IGD+", "epsilon", "outside")
RATIO, TO_BEST, IMPROVED, RANK = "ratio", "to best", "improved %", "rank"
RATIO_AT_EVALUATIONS, RATIO_AT_TIME = "ratio by evals", "ratio by time"
DELTA_M, DELTA_M_ACCURACY, SPEEDUP, LOG_AREA, DIVERGED = "Δm %", "Δm % accuracy", "speedup", "log area", "diverged %"


class Shown(NamedTuple):
    """A figure as text, and its sort key: text, or a number, NaN if there is none."""

    text: str
    value: float | str


def row_figures(row: Row) -> dict[str, Shown]:
    """Return the cells of a row by column."""
    loss = Shown(_with_error(row.loss, row.loss_standard_error, "#.4g"), row.loss)
    if row.diverged:
        loss = Shown(f"{row.diverged} of {row.seeds} diverged", math.inf)
    if not row.seeds:
        loss = Shown("failed", math.nan)
    label = row.label + (STAR if note(row) else "")
    return {
        OPTIMIZER: Shown(label, label),
        LOSS: loss,
        AT_EVALUATIONS: _number(row.loss_at_evaluations, "#.4g"),
        AT_TIME: _number(row.loss_at_time, "#.4g"),
        OBJECTIVES: Shown(several(row.losses, "#.3g"), max(row.losses, default=math.nan)),
        ACCURACY: _percents(row.test_accuracy or ()),
        CRITICALITY: Shown(_with_error(row.criticality, row.criticality_standard_error, "#.3g"), row.criticality),
        TIME: _number(row.ms_per_step, ".2f"),
        EVALUATIONS: _number(row.evaluations, ".0f"),
        ACCEPTED: _share(row.acceptance),
        GUARD: _share(row.guard_share),
        **_front_figures(row.front, row.seeds),
    }


def row_columns(evaluation: Evaluation, rows: Sequence[Row]) -> list[str]:
    """Return the columns in which some row has a figure, without those that would repeat another column."""
    figures = [row_figures(row) for row in rows]
    needless = set()
    if all(len(row.losses) < 2 for row in rows):
        needless.add(OBJECTIVES)
    if not any(row.optimizer == evaluation.settings.reference for row in rows):
        needless |= {AT_EVALUATIONS, AT_TIME}
    return [
        name for name in row_figures(rows[0]) if name not in needless and any(f[name].text != NOTHING for f in figures)
    ]


def standing_figures(standing: Standing) -> dict[str, Shown]:
    """Return the cells of a standing by column."""
    share = standing.diverged
    return {
        OPTIMIZER: Shown(standing.optimizer, standing.optimizer),
        RATIO: _interval(standing.ratio, RATIO_FORM),
        TO_BEST: _interval(standing.to_best, RATIO_FORM),
        IMPROVED: _interval(_hundredfold(standing.improvement), ".0f"),
        RANK: _number(standing.mean_rank, ".2f"),
        RATIO_AT_EVALUATIONS: _number(standing.ratio_at_evaluations, "#.3g"),
        RATIO_AT_TIME: _number(standing.ratio_at_time, "#.3g"),
        DELTA_M: _number(standing.delta_m, "+.1f"),
        DELTA_M_ACCURACY: _number(_or_nan(standing.delta_m_accuracy), "+.1f"),
        SPEEDUP: _number(standing.speedup, "#.3g"),
        LOG_AREA: _number(standing.log_area, "+.3f"),
        DIVERGED: _number(100 * share.estimate, ".0f"),
    }


def standing_columns(standings: Sequence[Standing]) -> list[str]:
    """Return the columns in which some standing has a figure."""
    figures = [standing_figures(standing) for standing in standings]
    return [name for name in figures[0] if any(each[name].text != NOTHING for each in figures)]


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of one problem, the lowest loss first, then those that diverged, then those that failed."""
    return sorted(rows, key=lambda row: (not row.seeds, _or_inf(row.loss)))


def ranked_standings(standings: Sequence[Standing]) -> list[Standing]:
    """Return the standings, the lowest ratio first, or the lowest rank if there are no ratios."""
    return sorted(standings, key=lambda each: (_or_inf(each.ratio.estimate), _or_inf(each.mean_rank)))


def heading(name: str) -> tuple[str, str]:
    """Split the name of a column before its last word; the first part is "" for a short name."""
    first, _, last = name.rpartition(" ")
    return (first, last) if len(name) > SHORT_HEADING else ("", name)


def count(number: int, what: str) -> str:
    """Return a number and the noun it counts, in the plural unless the number is 1."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def verdicts(evaluation: Evaluation, problem: str) -> list[str]:
    """Return a sentence on `learned` against the best baseline of a problem, and one on it against `initial`."""
    rows = evaluation.rows_of(problem)
    learned = next((row for row in rows if row.optimizer == LEARNED and row.role == "learned"), None)
    initial = next((row for row in rows if row.optimizer == INITIAL and row.role != "baseline"), None)
    if learned is None:
        return []
    others = [row for row in (best_baseline(rows), initial) if row is not None]
    return [_verdict(evaluation, learned, other) for other in others]


def verdict_on(evaluation: Evaluation, problem: str) -> PairedDifference | None:
    """Return the paired difference of `learned` and a problem's best baseline; None without a pair."""
    rows = evaluation.rows_of(problem)
    learned, best = next((row for row in rows if row.optimizer == LEARNED), None), best_baseline(rows)
    if learned is None or best is None:
        return None
    pairs = _pairs(evaluation, learned, best)
    return paired_difference(*zip(*pairs, strict=True)) if pairs else None


def best_baseline(rows: Sequence[Row]) -> Row | None:
    """Return the baseline with the lowest loss, None if there is no baseline."""
    return next((row for row in ranked(rows) if row.role == "baseline"), None)


def seed_losses(evaluation: Evaluation, row: Row) -> list[float]:
    """Return the loss of each seed: inf where the run diverged, NaN where the cell failed.

    In JSON both are null; the list of failed cells tells one from the other.
    """
    failed = {(each.optimizer, each.problem, each.seed) for each in evaluation.failed}
    first = evaluation.settings.seed
    return [
        math.nan if (row.optimizer, row.problem, first + i) in failed else _or_inf(loss)
        for i, loss in enumerate(row.seed_losses)
    ]


def note(row: Row) -> str:
    """Return the warnings of a row, about failed cells and tuning; "" if there are none."""
    failed = f"{row.failed} of {row.seeds + row.failed} cells failed" if row.failed else ""
    return "; ".join(filter(None, (failed, row.note)))


def several(values: Sequence[float], form: str) -> str:
    """Return up to three values as text, or the range and the number of more values."""
    if not values or not all(map(math.isfinite, values)):
        return NOTHING
    if len(values) <= 3:
        return " / ".join(number(value, form) for value in values)
    return f"{number(min(values), form)} … {number(max(values), form)} ({len(values)})"


def number(value: float, form: str = "#.4g") -> str:
    """Return a figure as text, `NOTHING` if it is not finite."""
    return format(value, form).removesuffix(".") if math.isfinite(value) else NOTHING


def _verdict(evaluation: Evaluation, learned: Row, other: Row) -> str:
    pairs = _pairs(evaluation, learned, other)
    if not pairs:
        return f"{LEARNED} against {other.label}: no seed was run with both"
    ours, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
    difference = paired_difference(ours, theirs)
    ratio = ""
    if 0 < sum(ours) < math.inf and 0 < sum(theirs) < math.inf:
        ratio = f"{sum(ours) / sum(theirs):.3f} of "
    figures = ""
    if math.isfinite(difference.mean):
        figures = f" ({number(difference.mean, '+#.3g')} ± {number(difference.standard_error, '#.2g')})"
    lower = sum(a < b for a, b in pairs)
    seeds = f"{lower} of {count(len(pairs), 'seed')} lower"
    return f"{LEARNED} {'is ' if ratio else 'against '}{ratio}{other.label}: {difference.verdict}{figures}, {seeds}"


def _pairs(evaluation: Evaluation, row: Row, other: Row) -> list[tuple[float, float]]:
    """Return the pairs of losses of the seeds that ran for both rows."""
    both = zip(seed_losses(evaluation, row), seed_losses(evaluation, other), strict=False)
    return [(a, b) for a, b in both if not math.isnan(a) and not math.isnan(b)]


def _front_figures(front: Front | None, seeds: int) -> dict[str, Shown]:
    if front is None:
        return {name: Shown(NOTHING, math.nan) for name in FRONT}
    volume = f"{number(front.hypervolume)} of {number(front.hypervolume_of_front)}"
    figures = (
        Shown(volume, front.hypervolume),
        _number(front.igd_plus, "#.3g"),
        _number(front.additive_epsilon, "#.3g"),
        Shown(f"{front.outside} of {seeds}", front.outside),
    )
    return dict(zip(FRONT, figures, strict=True))


def _number(value: float, form: str) -> Shown:
    return Shown(number(value, form), value)


def _interval(interval: Interval, form: str) -> Shown:
    shown = number(interval.estimate, form)
    if shown == NOTHING:
        return Shown(NOTHING, math.nan)
    bounds = ""
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        bounds = f" [{number(interval.low, form)}, {number(interval.high, form)}]"
    return Shown(shown + bounds, interval.estimate)


def _hundredfold(share: Interval) -> Interval:
    return Interval(100 * share.estimate, 100 * share.low, 100 * share.high)


def _percents(shares: Sequence[float]) -> Shown:
    return Shown(several([100 * share for share in shares], ".1f"), min(shares, default=math.nan))


def _share(value: float | None) -> Shown:
    return _number(100 * _or_nan(value), ".0f")


def _with_error(mean: float, error: float, form: str) -> str:
    shown = number(mean, form)
    return shown if shown == NOTHING else f"{shown} ± {number(error, '#.2g')}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf

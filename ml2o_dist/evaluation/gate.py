"""The gate before a version becomes champion: it must beat the champion on a suite, by the paired interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.evaluation.standings import Losses, ratio_interval
from ml2o_dist.evaluation.statistics import Interval


@dataclass(frozen=True)
class Judgement:
    """The gate's judgement of a candidate.

    Attributes:
        passed: whether the candidate is better.
        ratio: the candidate's loss over the other's, see `standings.ratio_interval`: below 1 = better.
        reason: the judgement in one line, with the figures.
    """

    passed: bool
    ratio: Interval
    reason: str


def judge(evaluation: Evaluation, candidate: str, champion: str | None, *, named: str, over: str) -> Judgement:
    """Compare two optimizers of an evaluation, paired by seeds, over the problems with positive losses.

    The candidate passes if the whole interval of its ratio lies below 1.

    Args:
        candidate, champion: names in `evaluation`. Without a champion (None) the candidate must beat the tuned
            reference.
        named, over: names of candidate and champion for the reason.
    """
    other = champion or evaluation.settings.reference
    ours, theirs = (_losses(evaluation, name) for name in (candidate, other))
    shared = ours.keys() & theirs.keys()
    ours = {problem: losses for problem, losses in ours.items() if problem in shared}
    ratio = ratio_interval(ours, theirs)
    on = f"on {evaluation.suite or 'its problems'} ({len(ours)} problems, {evaluation.settings.seeds} paired seeds)"
    if math.isnan(ratio.high):
        return Judgement(False, ratio, f"{named} cannot be compared with {over} {on}: give it more seeds")
    figures = f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of {over}'s loss {on}"
    if ratio.high < 1:
        return Judgement(True, ratio, f"{named} is better than {over}: {figures}")
    what = "is worse than" if ratio.low > 1 else "is not shown to be better than"
    return Judgement(False, ratio, f"{named} {what} {over}: {figures}")


def _losses(evaluation: Evaluation, optimizer: str) -> Losses:
    """Return the losses by problem. Problems with a negative loss are left out: a ratio is meaningless there."""
    rows = [row for row in evaluation.rows if row.optimizer == optimizer]
    return {row.problem: row.seed_losses for row in rows if not any(loss < 0 for loss in row.seed_losses)}

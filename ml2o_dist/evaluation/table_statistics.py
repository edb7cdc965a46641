"""Comparisons of optimizers: ratios to the best, performance profiles, mean ranks and the mean relative change Delta_m.

A table of losses has a row per optimizer and a column per run, the same problem and seed in all rows. Lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ml2o_dist.evaluation.statistics import FloatArray


def ratios_to_best(losses: ArrayLike) -> FloatArray:
    """Return each loss over the best optimizer's of that run: `losses` and result [optimizers, runs].

    A run that diverged (an infinite loss) has an infinite ratio, even if all diverged. Source: r_{p,s} of Dolan & More
    2002, who use times instead of losses.

    Raises:
        ValueError: not two-dimensional, empty, a NaN, or a loss <= 0, for which a ratio is meaningless.
    """
    table = _loss_table(losses)
    if (table <= 0).any():
        raise ValueError(f"ratios need positive losses, and one is {table.min():g}")
    best = table.min(axis=0)
    return table / np.where(np.isfinite(best), best, 1.0)


def performance_profile(ratios: ArrayLike, taus: ArrayLike) -> FloatArray:
    """Return the share of runs with a ratio <= tau for each tau: `ratios` [..., runs], `taus` [t], result [..., t].

    rho(tau) of Dolan & More 2002, of `ratios_to_best`; of scores it is the performance profile of Agarwal et al. 2021.
    An infinite or NaN ratio is never within tau, so a profile ends at the share of runs that did not diverge.
    """
    values = np.asarray(ratios, dtype=np.float64)[..., None]
    return np.asarray(((values <= np.asarray(taus)) & np.isfinite(values)).mean(axis=-2), dtype=np.float64)


def mean_ranks(losses: ArrayLike) -> list[float]:
    """Return the mean rank over runs of each optimizer, 1 = best: `losses` [optimizers, runs], result [optimizers].

    Ties share the mean of their ranks; runs that diverged (infinite losses) rank last and tie. Source: Demsar 2006,
    "Statistical comparisons of classifiers over multiple data sets".

    Raises:
        ValueError: not two-dimensional, empty, or a NaN.
    """
    table = _loss_table(losses)
    others = table[None]
    better = (others < table[:, None]).sum(axis=1)
    equal = (others == table[:, None]).sum(axis=1)  # including itself
    return [float(rank) for rank in (better + (equal + 1) / 2).mean(axis=1)]


def delta_m(ours: Sequence[float], reference: Sequence[float], *, higher_is_better: bool) -> float:
    """Return the mean relative change over m tasks, in per cent: BELOW 0 IS BETTER than the reference, for either s_i.

    100 / m sum_i s_i (ours_i - reference_i) / |reference_i|, s_i = -1 for figures that should be high (accuracies),
    +1 for losses. Source: Maninis et al. 2019, who use the opposite sign: theirs is above 0 if it is better.
    NaN if a reference is 0.

    Raises:
        ValueError: the two are not of one length, or empty.
    """
    if len(ours) != len(reference) or not len(ours):
        raise ValueError(f"{len(ours)} tasks cannot be compared with {len(reference)}")
    if 0 in reference:
        return math.nan
    changes = [(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    return (-100 if higher_is_better else 100) * sum(changes) / len(changes)


def _loss_table(losses: ArrayLike) -> FloatArray:
    table = np.asarray(losses, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"losses have shape {list(table.shape)}; needed is [optimizers, runs]")
    if np.isnan(table).any():
        raise ValueError("a loss is NaN; a run that diverged counts as infinite, one that was not made as none")
    return table

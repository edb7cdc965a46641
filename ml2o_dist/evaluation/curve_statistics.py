"""Comparisons of learning curves: steps to a target, speedup, area under the log-loss curve.

A curve is a loss per step, [T], summed over objectives; its first value belongs to step 1. Lower is better.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ml2o_dist.evaluation.statistics import FloatArray


def trailing_mean(curve: ArrayLike, window: int) -> FloatArray:
    """Return the mean of the `window` steps up to each step of `curve` [T]: [T], NaN before step `window`.

    A shorter first window would make one lucky batch count as progress. A loss that is not finite makes the means of
    the windows that contain it not finite, and no others.

    Raises:
        ValueError: the curve is not one-dimensional, or `window` is not within 1..T.
    """
    losses = _curve(curve)
    if not 1 <= window <= len(losses):
        raise ValueError(f"the window is {window}; allowed are integers from 1 to the {len(losses)} steps of the curve")
    means = np.full(len(losses), np.nan)
    with np.errstate(invalid="ignore"):  # inf - inf in a window gives NaN, which is wanted
        means[window - 1 :] = np.lib.stride_tricks.sliding_window_view(losses, window).mean(axis=1)
    return means


def steps_to_target(curve: ArrayLike, target: float, window: int) -> int | None:
    """Return the first step at which the `trailing_mean` of `curve` [T] is <= `target`, or None if it never is.

    It is at least `window`: no mean is known before. Source: steps to reach a baseline's loss, as VeLO (Metz et al.
    2022) compares optimizers; the trailing mean, against the noise of mini-batches, is ours.

    Raises:
        ValueError: as `trailing_mean`.
    """
    reached = np.flatnonzero(trailing_mean(curve, window) <= target)
    return int(reached[0]) + 1 if len(reached) else None


def speedup(ours: ArrayLike, baseline: ArrayLike, window: int) -> float:
    """Return how many times faster `ours` reaches the loss that both reach: above 1 it is faster than `baseline`.

    Steps that `baseline` needs to the target / steps that `ours` needs, as VeLO (Metz et al. 2022) counts. The target
    (ours) is the higher of the trailing means at the two ends, which both curves reach by definition, so that a method
    that ends worse has a figure, too. The result is NaN if a loss of either curve is not finite (the run diverged) or
    a curve is empty: report the number of diverged runs beside it. The lengths may differ; the
    figure lies between window / T and T / window, T being the longer length.

    Raises:
        ValueError: as `trailing_mean`, for either curve.
    """
    curves = _curve(ours), _curve(baseline)
    if not all(len(curve) and np.isfinite(curve).all() for curve in curves):
        return math.nan
    means = [trailing_mean(curve, window) for curve in curves]
    target = max(mean[-1] for mean in means)
    needed, needed_by_baseline = (int(np.argmax(mean <= target)) + 1 for mean in means)
    return needed_by_baseline / needed


def log_area(ours: ArrayLike, reference: ArrayLike) -> float:
    """Return the mean over steps of log(ours) - log(reference): below 0 `ours` is lower on average.

    The area between the log-loss curves per step, in nats: -0.69 means half the reference's loss at every step. Unlike
    the final loss it counts early progress, and unlike `speedup` it needs no target. NaN where a loss is
    not positive or not finite, and where a curve is empty. Ours.

    Raises:
        ValueError: a curve is not one-dimensional, or the two are not of one length.
    """
    curves = _curve(ours), _curve(reference)
    if not all(len(curve) and (np.isfinite(curve) & (curve > 0)).all() for curve in curves):
        return math.nan
    if len(curves[0]) != len(curves[1]):
        raise ValueError(f"{len(curves[0])} steps cannot be compared with {len(curves[1])}")
    return float((np.log(curves[0]) - np.log(curves[1])).mean())


def _curve(curve: ArrayLike) -> FloatArray:
    losses = np.asarray(curve, dtype=np.float64)
    if losses.ndim != 1:
        raise ValueError(f"a curve has shape {list(losses.shape)}; needed is [steps]")
    return losses

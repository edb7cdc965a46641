"""Exact Pareto optimal search: weights of the objectives that lead to the Pareto point on a given ray.

Mahapatra & Rajan 2020, "Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in Pareto
Optimization", in the form of its linear program: it seeks the point where all r_i f_i are equal.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

LEAST = 1e-3
"""The least value of a preference's entries: at r_i = 0 the non-uniformity has log 0."""

BALANCED = 1e-4
"""The non-uniformity up to which all objectives descend together, as in the authors' code."""


def epo_weights(preference: Tensor, losses: Tensor, jacobian: Tensor) -> Tensor | None:
    """Return alpha [m] float64 on the simplex, such that -J^T alpha leads to the ray of r; None if the LP has none.

    With C = J J^T, h = r f / sum(r f), mu = sum_i h_i log(m h_i) and a_i = r_i (log(m h_i) - mu):
    if mu > `BALANCED` (off the ray), alpha maximises alpha^T C a, and no objective ascends that need not. Otherwise
    alpha maximises the sum of C alpha, with C alpha >= 0 and no loss of balance.

    Args:
        preference: r [m], a point of the simplex; smaller entries are raised to `LEAST`.
        losses: f [m] > 0.
        jacobian: J [m, n].
    """
    r = preference.double().clamp(min=LEAST).numpy(force=True)
    f = losses.double().numpy(force=True)
    with torch.no_grad():
        gram = (jacobian.double() @ jacobian.double().T).numpy(force=True)
    if not (np.isfinite(gram).all() and np.isfinite(f).all() and (f > 0).all()):
        return None
    scale = float(np.abs(gram).max())
    alpha = None if scale == 0 else _solve(r, f, gram / scale)  # homogeneous, but the solver's tolerance is not
    return None if alpha is None else torch.from_numpy(alpha).to(losses.device)


def non_uniformity(preference: NDArray[np.float64], losses: NDArray[np.float64]) -> float:
    """Return mu(r, f): the Kullback-Leibler divergence of r f / sum(r f) from uniform; 0 on the ray."""
    weighted = preference * losses
    share = weighted / weighted.sum()
    return float((share * np.log(len(share) * share)).sum())


def _solve(r: NDArray[np.float64], f: NDArray[np.float64], gram: NDArray[np.float64]) -> NDArray[np.float64] | None:
    m = len(r)
    weighted = r * f
    mu = non_uniformity(r, f)
    anchor = r * (np.log(m * weighted / weighted.sum()) - mu)
    pull = gram @ anchor
    if mu > BALANCED:
        gain = pull
        ascends = pull > 0
        least = np.zeros(m)
        if ascends.any():
            least = np.where(ascends, -np.inf, pull)
            least[weighted == weighted.max()] = 0.0
        rows, bounds = gram, least
    else:
        gain = gram.sum(axis=0)
        rows = np.vstack([gram, pull])
        bounds = np.append(np.zeros(m), -max(0.0, -float(pull.max())))
    bounded = np.isfinite(bounds)
    answer = linprog(
        -gain,
        A_ub=-rows[bounded] if bounded.any() else None,
        b_ub=-bounds[bounded] if bounded.any() else None,
        A_eq=np.ones((1, m)),
        b_eq=[1.0],
        bounds=(0.0, None),
        method="highs",
    )
    if answer.x is None or not answer.success:
        return None
    positive = np.clip(answer.x, 0.0, None)
    alpha: NDArray[np.float64] = positive / positive.sum()
    return alpha

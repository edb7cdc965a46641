"""Independent answers that the problems are held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls


def min_norm(jacobian: NDArray[np.float64]) -> float:
    """Return min over the simplex of |J^T w| for J [m, n].

    The y >= 0 that minimises |J^T y|^2 + (sum y - 1)^2 is a positive multiple of the minimiser: the best length on
    the ray of w leaves a / (1 + a), a = |J^T w|^2, which grows with a.
    """
    m = jacobian.shape[0]
    system = np.vstack([jacobian.T, np.ones((1, m))])
    weights, _ = nnls(system, np.concatenate([np.zeros(jacobian.shape[1]), [1.0]]))
    return float(np.linalg.norm(jacobian.T @ (weights / weights.sum())))


def gap_between(points: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return the Hausdorff distance of two sets of points [k, m] and [l, m]."""
    distances = np.linalg.norm(points[:, None] - others[None], axis=2)
    return float(max(distances.min(axis=1).max(), distances.min(axis=0).max()))

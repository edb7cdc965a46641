"""Points of the simplex: the exact min-norm convex combination of gradients, and the nearest convex weights.

Shapes: P instances, m objectives, n parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor


class MinNorm(NamedTuple):
    """The min-norm point v = J^T weights of the convex hull of m gradients, for each instance, in float64.

    Attributes:
        weights: [P, m], >= 0, sum 1.
        squared_norm: |v|^2, [P].
        gap: [P], |v|^2 - min_i <g_i, v> >= 0, which is 0 only at the minimum. It certifies the result: with v* the
            true min-norm point, |v - v*|^2 <= gap and (|v|^2 - gap) / |v| <= |v*| <= |v|.
    """

    weights: Tensor
    squared_norm: Tensor
    gap: Tensor


def min_norm(jacobian: Tensor) -> MinNorm:
    """Solve min over the simplex of |J^T lambda| for J [P, m, n], each instance by itself, in float64.

    The active-set method on m variables is exact up to rounding; Frank-Wolfe (the usual code of MGDA) stops at a
    tolerance. Lengths d_i = |g_i| and cosines K = U U^T, u_i = g_i / d_i, are handled separately, so that long rows do
    not hide short ones. With F F^T = K (eigendecomposition, clipped at 0) and d_min the
    smallest length, the y >= 0 that minimises

        |F^T y|^2 + (sum_i y_i d_min / d_i - 1)^2

    (`scipy.optimize.nnls`) is a multiple of lambda_i d_i: on the ray of lambda the smallest value is a / (1 + a),
    a = |J^T lambda|^2 / d_min^2, which grows with a. The point v is unique, the weights need not be. Gradients that
    vanish share the weight equally. An instance with a non-finite entry gets NaN.

    Against rational arithmetic (m <= 4; parallel, opposite, rank-deficient, lengths within 1e-8 .. 1e8 of each other)
    |v|^2 was off by at most 2e-15 min_i |g_i|^2. The gap was at most 4e-15 max_i |g_i| min_i |g_i| where lengths are
    comparable, and up to 2e-10 times that product where they differ by many orders, as products of long rows round.

    Source: non-negative least squares for the distance to a hull, Lawson & Hanson 1974, chapter 23; the separation of
    lengths and cosines is ours.
    """
    gradients = jacobian.double()
    finite = gradients.isfinite().flatten(1).all(dim=1)
    largest = gradients.abs().amax(dim=2, keepdim=True)
    directions = torch.where(largest > 0, gradients / largest, 0.0)  # no overflow in the squares
    norms = directions.square().sum(dim=2, keepdim=True).sqrt()
    directions = torch.where(norms > 0, directions / norms, 0.0)
    lengths = (largest * norms).squeeze(2).cpu().numpy()
    cosines = (directions @ directions.mT).cpu().numpy()
    solved = [
        _simplex_weights(k, d) if usable else np.full(len(d), np.nan)
        for k, d, usable in zip(cosines, lengths, finite.tolist(), strict=True)
    ]
    weights = torch.from_numpy(np.stack(solved)).to(gradients.device)
    point = torch.einsum("pm,pmn->pn", weights, gradients)
    squared = point.square().sum(dim=1)
    products = torch.einsum("pmn,pn->pm", gradients, point)
    return MinNorm(weights, squared, (squared - products.amin(dim=1)).clamp(min=0.0))


def min_norm_weights(jacobian: Tensor) -> Tensor:
    """Return the exact min-norm weights [P, m] of J [P, m, n], on its device, in its precision; see `min_norm`."""
    return min_norm(jacobian).weights.to(jacobian)


def project_to_simplex(values: Tensor) -> Tensor:
    """Return the points of the simplex nearest to `values` [P, m], on their device, in their precision.

    max(v - theta, 0) with theta = max_k (sum of the k largest v - 1) / k: exact, by sorting. A row with a NaN or +inf
    becomes NaN.
    Source: Held, Wolfe & Crowder 1974; Duchi et al. 2008.
    """
    shifted = values - values.amax(dim=1, keepdim=True)  # changes nothing but the rounding
    descending = shifted.sort(dim=1, descending=True).values
    counts = torch.arange(1, values.shape[1] + 1, dtype=values.dtype, device=values.device)
    threshold = ((descending.cumsum(dim=1) - 1.0) / counts).amax(dim=1, keepdim=True)
    return (shifted - threshold).clamp(min=0.0)


def _simplex_weights(cosines: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the min-norm weights [m] for gradients with these cosines [m, m] and lengths [m]."""
    smallest = lengths.min()
    if smallest == 0.0:
        return normalised((lengths == 0.0).astype(np.float64))
    values, vectors = np.linalg.eigh(cosines)
    factor = vectors * np.sqrt(values.clip(min=0.0))
    shares = smallest / lengths
    solution, _ = nnls(np.vstack([factor.T, shares]), np.append(np.zeros(len(lengths)), 1.0))
    return normalised(solution * shares)


def normalised(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the multiple of `weights` [m] whose sum is 1."""
    total: np.float64 = weights.sum()
    return weights / total

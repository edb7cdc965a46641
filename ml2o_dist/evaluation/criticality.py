"""How far a point is from Pareto criticality: the shortest convex combination of the gradients on a large fixed batch.

Shapes: P instances, m objectives, n parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from ml2o_dist.problems import Problem
from ml2o_dist.rules.min_norm import MinNorm, min_norm, normalised
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator

BATCHES = 64
"""Number of batches that are averaged. Noise lengthens the shortest combination by about the noise's standard
deviation / sqrt(all samples): with 64 batches of 64 samples by a 64th of one sample's noise."""


@dataclass(frozen=True, eq=False)
class Criticality:
    """How critical each of P points is, in float64. NaN where the point, its losses or gradients are not finite.

    Never report it without the losses: it is also small on flat stretches far from any Pareto point.

    Attributes:
        absolute: [P], min over the simplex of |J^T lambda|; with bounds of a projection, see `projected_min_norm`.
        relative: [P], `absolute` over the mean of |g_i| over the objectives, in [0, 1]; 0 where all gradients vanish.
        gap: [P], duality gap of the squared norm: the true minimum is at least `absolute` - `gap` / `absolute`.
        weights: [P, m], the minimising lambda.
        losses: [P, m], on the same batches.
    """

    absolute: Tensor
    relative: Tensor
    gap: Tensor
    weights: Tensor
    losses: Tensor


def criticality(problem: Problem, parameters: Tensor, *, batches: int = BATCHES, seed: int = 0) -> Criticality:
    """Measure how critical `parameters` [P, n] are, on a batch that `seed` fixes.

    A point is Pareto critical if no feasible direction makes all objectives smaller to first order: if and only if the
    measure is 0 (Fliege & Svaiter 2000). Bounds of the problem are taken into account.

    Raises:
        UserError: `batches` is less than 1.
    """
    jacobian, losses = mean_jacobian(problem, parameters, batches=batches, seed=seed)
    known = (parameters.isfinite().all(dim=1) & losses.isfinite().all(dim=1))[:, None, None]
    jacobian = jacobian.where(known, torch.nan)  # a box's clamp would make the gradient at NaN zero
    if problem.bounds is None:
        solved = min_norm(jacobian)
    else:
        lower, upper = problem.bounds
        solved = projected_min_norm(jacobian, parameters <= lower, parameters >= upper)
    absolute = solved.squared_norm.sqrt()
    mean_norm = torch.linalg.vector_norm(jacobian, dim=2).mean(dim=1)
    relative = torch.where(mean_norm == 0, 0.0, absolute / mean_norm)
    return Criticality(absolute, relative, solved.gap, solved.weights, losses)


def mean_jacobian(
    problem: Problem, parameters: Tensor, *, batches: int = BATCHES, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (J [P, m, n], losses [P, m]) in float64, averaged over a fixed list of batches drawn from `seed`.

    One batch is held at a time. Each is evaluated in the problem's precision; a noise-free problem needs only one.

    Raises:
        UserError: `batches` is less than 1.
    """
    if batches < 1:
        raise UserError(f"batches is {batches}; allowed are integers >= 1")
    stream = generator("criticality", seed)
    shape = (len(parameters), problem.objectives)
    jacobian = torch.zeros(*shape, problem.dimension, dtype=torch.float64, device=parameters.device)
    losses = torch.zeros(*shape, dtype=torch.float64, device=parameters.device)
    drawn = 0
    for _ in range(batches):
        batch = problem.sample_batch(stream)
        rows, values = problem.jacobian(parameters, batch)
        jacobian += rows
        losses += values
        drawn += 1
        if batch is None:
            break
    return jacobian / drawn, losses / drawn


def projected_min_norm(jacobian: Tensor, at_lower: Tensor, at_upper: Tensor) -> MinNorm:
    """Solve min over the simplex of |p(J^T lambda)| for J [P, m, n] on the bounds of a box, in float64.

    p(v) is the part of v that a descent inside the box can use: v_j, but min(v_j, 0) where coordinate j is at its lower
    bound (`at_lower` [P, n]), max(v_j, 0) at its upper, 0 at both. -p(v) is the projection of -v onto the tangent cone
    of the box, and |p(v)| the distance from -v to its normal cone: convex in v, so that the minimum over lambda is
    exact and has a duality gap, |p|^2 - min_i <g_i, p>. It is 0 at Pareto critical points only. The other usual form,
    |z - Proj(z - v)|, vanishes at the same points but is not convex where a step reaches the far bound, and mixes the
    units of gradients and parameters. `squared_norm` is |p|^2. An instance that is not finite gets NaN.

    Method (ours): a coordinate at a bound is dropped if its m slopes all point outwards, and kept if they all point
    inwards. Each other one gets a multiplier mu_j >= 0, and (lambda, mu) >= 0 are found together by non-negative least
    squares, as `min_norm` finds lambda alone.
    """
    gradients = jacobian.double()
    # Reverse each axis on which only the upper bound is reached: then all bounds are lower bounds.
    signs = torch.where(at_upper & ~at_lower, -1.0, 1.0).to(gradients)[:, None]
    turned = gradients * signs
    at_bound = at_lower | at_upper
    outwards = (turned >= 0).all(dim=1) | (at_lower & at_upper)
    turned = torch.where((at_bound & outwards)[:, None], 0.0, turned)
    turned = torch.where(gradients.isfinite().flatten(1).all(dim=1)[:, None, None], turned, torch.nan)
    mixed = at_bound & ~outwards & ~(turned <= 0).all(dim=1)
    solved = min_norm(turned)
    weights = solved.weights.clone()
    for p in (mixed.any(dim=1) & turned.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist():
        found = _weights_with_multipliers(turned[p].cpu().numpy(), mixed[p].cpu().numpy())
        weights[p] = torch.from_numpy(found).to(weights)
    point = torch.einsum("pm,pmn->pn", weights, turned)
    point = torch.where(mixed, point.clamp(max=0.0), point)
    squared = point.square().sum(dim=1)
    products = torch.einsum("pmn,pn->pm", turned, point)
    return MinNorm(weights, squared, (squared - products.amin(dim=1)).clamp(min=0.0))


def _weights_with_multipliers(gradients: NDArray[np.float64], mixed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the lambda [m] that minimises sum_j v_j^2, v = J^T lambda, with min(v_j, 0) where `mixed` [n] holds.

    Minimises |R y|^2 + |M y - mu|^2 + (sum_i y_i d_min / d_i - 1)^2 over y, mu >= 0: R^T R is the Gramian of the other
    coordinates, M has the mixed ones, y_i = lambda_i d_i up to a factor, as in `min_norm`.
    """
    lengths = np.linalg.norm(gradients, axis=1)
    smallest = lengths.min()
    if smallest == 0.0:
        return normalised((lengths == 0.0).astype(np.float64))
    directions = (gradients / lengths[:, None]).T
    others = np.linalg.qr(directions[~mixed], mode="r")
    count = int(mixed.sum())
    shares = smallest / lengths
    system = np.block(
        [
            [others, np.zeros((len(others), count))],
            [directions[mixed], -np.eye(count)],
            [shares[None], np.zeros((1, count))],
        ]
    )
    target = np.zeros(len(system))
    target[-1] = 1.0
    solution, _ = nnls(system, target, maxiter=30 * system.shape[1])
    return normalised(solution[: len(shares)] * shares)

"""Find the size of a rule's first step on its first batch, so that it need not be tuned.

Shapes: P instances, m objectives, n parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ml2o_dist.problems.base import Batch
from ml2o_dist.rules.base import Oracle

HALVINGS = 60
"""Most trials: from the longest step, as long as the parameter vector, down to 1e-18 of it."""

VISIBLE = 8.0
"""A promised decrease below this many units of the losses' rounding cannot be distinguished from 0."""


class FirstStep(NamedTuple):
    """The step size found for each instance.

    Attributes:
        alpha: [P] float64, 0 where none was found.
        steepening: [P] float64, >= 1: achieved decrease / promised decrease, or 1 if no more than promised was
            achieved. It is about the factor by which the gradient grows along the step.
    """

    alpha: Tensor
    steepening: Tensor


@torch.no_grad()
def first_step(
    oracle: Oracle, parameters: Tensor, direction: Tensor, weights: Tensor, losses: Tensor, batch: Batch
) -> FirstStep:
    """Find a step size along -`direction` [P, n] from `parameters` [P, n], separately for each instance.

    With phi = weights^T F on `batch`, whose gradient `direction` is, and z(a) the projection of z - a direction onto
    the problem's box, alpha is the first of |z| / |direction| * 2^-k, k = 0, 1, .. (1 for |z| where z = 0) with

        phi(z) - phi(z(a)) >= 1/2 <direction, z - z(a)>,

    half of what the gradient promises (Armijo 1966, constant 1/2: on a quadratic no more than the minimiser along the
    line, and more than half of it unless k = 0). If a step achieves more than was promised, which cannot happen for a
    convex phi, it has left a plateau, and steps of a size made for the plateau would jump over the minima beyond it.
    alpha is then divided by `steepening` = achieved / promised. alpha scales with the units: losses times s give
    alpha / s, and other units of the parameters likewise.

    A trial with non-finite losses is halved like any other. No step size is found (alpha = 0) if the direction is 0 or
    not finite, if losses at z are not finite, or if the promise falls below `VISIBLE` roundings of the losses, as at a
    critical point of the batch.
    The constants and the division are ours. Of 64 starts on Fonseca (n = 2, most of them on its plateau) 12 runs of
    DSSMG jumped to a region where gradients vanish and stayed there; with the division none did, and on quadratics and
    networks it changed nothing.

    Args:
        weights: [P, m], on the simplex.
        losses: [P, m], at `parameters` on `batch`.

    Every trial is one forward of all instances, counted by the oracle. The slowest instance determines how many.
    """
    start, size = direction.double().norm(dim=1), parameters.double().norm(dim=1)
    alpha = torch.where((start > 0) & start.isfinite(), torch.where(size > 0, size, 1.0) / start, 0.0)
    steepening = torch.ones_like(alpha)
    convex, before = weights.double(), losses.double()
    value = (convex * before).sum(dim=1)
    rounding = VISIBLE * torch.finfo(losses.dtype).eps * (convex * before.abs()).sum(dim=1)
    searching = alpha > 0
    for _ in range(HALVINGS):
        if not searching.any():
            break
        trial = oracle.problem.project(parameters - alpha[:, None].to(parameters) * direction)
        promised = (direction * (parameters - trial)).sum(dim=1, dtype=torch.float64)
        hopeless = searching & ~((promised > 0) & (promised >= rounding))
        alpha = torch.where(hopeless, 0.0, alpha)
        searching = searching & ~hopeless
        if not searching.any():
            break
        achieved = value - (convex * oracle.losses(trial, batch).double()).sum(dim=1)
        taken = searching & (achieved >= promised / 2)
        steepening = torch.where(taken, (achieved / promised).clamp(min=1.0), steepening)
        searching = searching & ~taken
        alpha = torch.where(searching, alpha / 2, alpha)
    return FirstStep(torch.where(searching, 0.0, alpha) / steepening, steepening)

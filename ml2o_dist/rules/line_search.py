"""The size of a rule's first step, found on its first batch: nothing is left to be tuned.

Shapes: P instances, m objectives, n parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ml2o_dist.problems.base import Batch
from ml2o_dist.rules.base import Oracle

HALVINGS = 60
"""Trials at most: from the longest step, as long as the parameters, down to 1e-18 of it."""

VISIBLE = 8.0
"""A promised decrease below so many units of the losses' rounding cannot be told from none."""


class FirstStep(NamedTuple):
    """The step size found for each instance.

    Attributes:
        alpha: [P] float64, 0 where none was found.
        steepening: [P] float64, >= 1: how many times the promised decrease the step achieved; 1 where it was no more
            than promised. About the factor by which the gradient grows along the step.
    """

    alpha: Tensor
    steepening: Tensor


@torch.no_grad()
def first_step(
    oracle: Oracle, parameters: Tensor, direction: Tensor, weights: Tensor, losses: Tensor, batch: Batch
) -> FirstStep:
    """Find a step size along -`direction` [P, n] from `parameters` [P, n], each instance by itself.

    With phi = weights^T F on `batch`, whose gradient `direction` is, and z(a) the projection of z - a direction onto
    the problem's box, alpha is the first of |z| / |direction| * 2^-k, k = 0, 1, .. (1 for |z| where z = 0) with

        phi(z) - phi(z(a)) >= 1/2 <direction, z - z(a)>,

    half of what the gradient promises (Armijo 1966, constant 1/2: on a quadratic no more than the minimiser along the
    line, and more than half of it unless k = 0). Where the step achieved more than was promised, which no convex phi
    does, it left a plateau, and steps made for the plateau would jump over what they find: alpha is divided by
    `steepening` = achieved / promised. Losses times s give alpha / s, parameters and losses in other units likewise.

    A trial whose losses are not finite is halved like any other. None is found (alpha = 0) where the direction is 0
    or not finite, where losses at z are not finite, and where the promise falls below `VISIBLE` roundings of the
    losses, as at a critical point of the batch.
    The constants and the division are ours. On 64 starts on Fonseca (n = 2, most of them on its plateau) 12 runs of
    DSSMG jumped to where gradients vanish and stayed there; with the division none did, and on quadratics and networks
    it changed nothing.

    Args:
        weights: [P, m], on the simplex.
        losses: [P, m], at `parameters` on `batch`.

    Every trial is one forward of all instances, charged by the oracle; as many as the slowest of them needs.
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

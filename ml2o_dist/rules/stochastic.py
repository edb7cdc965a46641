"""Stochastic multi-gradient rules with decreasing steps: SMG, and DSSMG, the convergent fallback of a guard.

Shapes: P instances, m objectives, n parameters. J_1, J_2 are Jacobians [P, m, n] on independent batches at one point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ml2o_dist.problems.base import Problem
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle, StepInfo, UpdateRule
from ml2o_dist.rules.line_search import first_step
from ml2o_dist.rules.min_norm import min_norm_weights, project_to_simplex
from ml2o_dist.runtime.errors import UserError


@dataclass(frozen=True)
class SMGState:
    """The state after `steps` steps: alpha_0 [P] float64, the size of step 0; 0 where it has not been found yet."""

    steps: int
    alpha_0: Tensor


@dataclass(frozen=True)
class DSSMGState(SMGState):
    """DSSMG's further state: the weights lambda_t [P, m], and gamma_0 [P] float64, 0 until alpha_0 is found."""

    weights: Tensor
    gamma_0: Tensor


class DecreasingSteps(UpdateRule):
    """z_{t+1} = z_t - alpha_t J_1^T lambda_t, projected onto the box, with alpha_t = alpha_0 / (t + 1)^p.

    Base of SMG and DSSMG. p in (1/2, 1] makes sum alpha_t infinite and sum alpha_t^2 finite. The default 0.55 (ours)
    is near the fast end: DSSMG's summed loss on MultiDigits (MLP, 3 seeds, last 20 of 200 steps) was 2.12, 2.28, 2.51,
    3.27 at p = 0.51, 0.55, 0.6, 0.75; on noisy quadratics the loss did not change up to 0.6. At the same p the factor
    of the noise in the bound, sum (t + 1)^-2p, is 50.6, 10.6, 5.6, 2.6.

    alpha_0 is given, or found by `first_step` on the first batch (ours). If none is found (the direction is zero or
    too small to be visible) the instance does not move and the next step searches its batch; t still increases.

    An instance with a non-finite gradient entry gets NaN parameters: it has diverged, which is a result. Other
    instances are not affected.
    """

    def __init__(self, p: float = 0.55, alpha_0: float | None = None) -> None:
        """Raises UserError for p outside (1/2, 1], or an `alpha_0` that is not positive and finite."""
        if not 0.5 < p <= 1.0:
            raise UserError(
                f"{type(self).__name__}: p is {p!r}; allowed are 0.5 < p <= 1, where the steps alpha_0 / (t + 1)^p "
                "have an infinite sum and a finite sum of squares"
            )
        if alpha_0 is not None:
            _check_positive(type(self).__name__, "alpha_0", alpha_0)
        self.p = p
        self.alpha_0 = alpha_0

    def decay(self, state: SMGState) -> float:
        """Return alpha_t / alpha_0 = (t + 1)^-p for the step that starts from `state`."""
        return 1.0 / math.pow(state.steps + 1, self.p)

    def alpha(self, state: SMGState) -> Tensor:
        """Return alpha_t [P] of the step that starts from `state`; 0 where alpha_0 has not been found yet.

        For the first step it is known only afterwards: `following.alpha_0 * decay(state)`.
        """
        return state.alpha_0 * self.decay(state)

    def _initial_alpha(self, instances: int) -> Tensor:
        return torch.full((instances,), self.alpha_0 or 0.0, dtype=torch.float64)


class SMG(DecreasingSteps):
    """Stochastic multi-gradient: lambda_t are the min-norm weights of J_1 itself, so z moves along its min-norm point.

    Each step uses one batch and one Jacobian; the weights are exact (`min_norm`). The weights depend on the same noise
    as the gradients, so the move is biased: E J_1^T lambda(J_1) is not J^T lambda(J). The rates of Liu & Vicente assume
    convex objectives and a bias that shrinks with the steps, as with growing batches. DSSMG needs neither.

    Source: Liu & Vicente 2021, decreasing steps; the form of the steps and the search of alpha_0 are ours.
    """

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> SMGState:
        """Return step 0, on the CPU; the first step takes it to the device of its Jacobian."""
        return SMGState(0, self._initial_alpha(instances))

    @torch.no_grad()
    def propose(self, oracle: Oracle, parameters: Tensor, state: SMGState, seen: StepInfo) -> tuple[Tensor, SMGState]:
        """Return the next point [P, n] and state; draws nothing."""
        weights = min_norm_weights(seen.jacobian)
        direction = _combine(weights, seen.jacobian)
        alpha_0, _ = _settle(oracle, parameters, state, direction, weights, seen)
        candidate = _move(oracle.problem, parameters, alpha_0 * self.decay(state), direction)
        return _diverge(candidate, direction), SMGState(state.steps + 1, alpha_0)


class DSSMG(DecreasingSteps):
    """Double-sampling SMG: the weights take one projected gradient step on 1/2 |J^T lambda|^2 for each step of z.

        z_{t+1}      = Proj_box(z_t - alpha_t J_1^T lambda_t)
        lambda_{t+1} = Proj_simplex(lambda_t - gamma_t J_1 (J_2^T lambda_t)),      lambda_0 = 1/m

    J_1, J_2 on independent batches at z_t. lambda_t is older than J_1, so the move is unbiased; J_1 and J_2 are
    independent, so the weight step is: E J_1 J_2^T lambda_t = J J^T lambda_t (one batch for both would add the
    gradients' covariance). Only the one gradient J_2^T lambda_t is computed, not all of J_2: a step costs two batches,
    two forwards and m + 1 backwards.

    **Scale.** gamma_t = alpha_t / C in the bound below, so C has the unit of the losses. It is written through the
    free number `c`: gamma_t = gamma_0 / (t + 1)^p, gamma_0 = 1 / (c tr(J_1 J_1^T) r^2) on the batch that gave alpha_0,
    r its `steepening` (1 where alpha_0 is given); that is C = c alpha_0 tr(J_1 J_1^T) r^2. The trace bounds the largest
    eigenvalue of J J^T, so with c >= 1 the first weight step does not overshoot, in any units of losses and parameters.
    With a smaller c the weights follow the gradients faster, and their noise enters the bound as M_2 / C. Measured on
    quadratics, Fonseca and MultiDigits: losses are alike for c in 1 .. 10; below 0.3 the weights jump between vertices.

    **Bound.** Let every f_i be L-smooth and bounded below, no box, and given the past E J_1 = E J_2 = J(z_t),
    E|J_1^T lambda_t|^2 <= M_1, E|J_1 J_2^T lambda_t|^2 <= M_2. For any fixed lambda of the simplex let V_t =
    lambda^T F(z_t) + C/2 |lambda_t - lambda|^2. Given the past, by L-smoothness,

        E lambda^T F(z_{t+1}) <= lambda^T F(z_t) - alpha_t <J^T lambda, J^T lambda_t> + L/2 alpha_t^2 M_1,

    and since Proj_simplex does not expand and leaves lambda in place, with C gamma_t = alpha_t,

        C/2 E|lambda_{t+1} - lambda|^2 <= C/2 |lambda_t - lambda|^2 - alpha_t <lambda_t - lambda, J J^T lambda_t>
                                          + alpha_t^2 M_2 / (2 C).

    The terms in <J^T lambda, J^T lambda_t> cancel. Summed over t >= s, from V_s down to inf V >= inf lambda^T F:

        sum_t alpha_t E|J^T lambda_t|^2 <= E V_s - inf lambda^T F + 1/2 (L M_1 + M_2 / C) sum_t alpha_t^2 < inf.

    As sum alpha_t diverges, min_lambda |J(z_t)^T lambda| <= |J(z_t)^T lambda_t| has liminf 0, almost surely (Robbins &
    Siegmund 1971) and, squared and averaged with weights alpha_t, in expectation as O(T^(p-1)); p = 1: O(1 / log T).
    This holds for convex and non-convex objectives; the point found depends on the run. Any move that is no worse than
    this one in lambda^T F, up to summable errors, keeps the bound, which is what a guard needs.

    Limits of the proof: if alpha_0 is found on the first batch, alpha_0 and gamma_0 depend on its J_1. The sum then
    starts after that step (s = 1), given which both are constants. With a box, z moves along the feasible part of
    J_1^T lambda_t only, and the terms no longer cancel. We then take the feasible part of J_2^T lambda_t in the weight
    step as well, G_2 = (z_t - Proj_box(z_t - alpha_t J_2^T lambda_t)) / alpha_t, which is J_2^T lambda_t where no bound
    is hit. The terms cancel again, and without noise <J^T lambda_t, G_t> >= |G_t|^2 gives the bound for the projected
    gradient G_t in place of J^T lambda_t. With noise at an active bound it holds only up to sum alpha_t * variance,
    which gives a neighbourhood, not a limit.

    **Origin.** As far as summaries tell, only the name and the role as the convergent fallback come from the paper of
    ML2O (Yang, Tang, Yang 2023). The form above, C, the line search, the box and the bound are ours. MoDo (Chen,
    Fernando, Ying & Chen 2023) has the same double-sampled weight step, with constant steps, a ridge term and the whole
    J_2, and moves z by the new weights on a third batch (in code the mean of both).
    """

    def __init__(self, p: float = 0.55, c: float = 1.0, alpha_0: float | None = None) -> None:
        """Raises UserError for p outside (1/2, 1], or a `c` or `alpha_0` that is not positive and finite."""
        super().__init__(p, alpha_0)
        _check_positive("DSSMG", "c", c)
        self.c = c

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> DSSMGState:
        """Return step 0 with weights 1/m, on the CPU; the first step takes it to the device of its Jacobian."""
        weights = torch.full((instances, objectives), 1.0 / objectives, dtype=torch.float64)
        return DSSMGState(0, self._initial_alpha(instances), weights, torch.zeros(instances, dtype=torch.float64))

    @torch.no_grad()
    def propose(
        self, oracle: Oracle, parameters: Tensor, state: DSSMGState, seen: StepInfo
    ) -> tuple[Tensor, DSSMGState]:
        """Return the next point [P, n] and state; draws the second batch. The weights always move at z_t."""
        problem, jacobian, weights = oracle.problem, seen.jacobian, state.weights.to(seen.jacobian)
        direction = _combine(weights, jacobian)
        alpha_0, steepening = _settle(oracle, parameters, state, direction, weights, seen)
        lengths = torch.linalg.vector_norm(jacobian, dim=(1, 2), dtype=torch.float64) * steepening
        known = state.gamma_0.to(alpha_0)
        found = 1.0 / (self.c * lengths.square())
        gamma_0 = torch.where(known > 0, known, torch.where((alpha_0 > 0) & (lengths > 0), found, 0.0))

        alpha = alpha_0 * self.decay(state)
        candidate = _move(problem, parameters, alpha, direction)
        gradient, _ = oracle.gradient(parameters, oracle.draw(), weights)
        feasible = _feasible(problem, parameters, alpha, gradient)
        # Scaled like J, not like its square, which may overflow float32; gamma, in float64, compensates for the scale.
        size = lengths.where(lengths > 0, 1.0).log2().round().clamp(-120, 120).exp2()
        slopes = torch.einsum("pmn,pn->pm", jacobian, (feasible / size.to(feasible)[:, None]).to(jacobian))
        gamma = (gamma_0 * self.decay(state) * size)[:, None].to(slopes)
        following = DSSMGState(state.steps + 1, alpha_0, project_to_simplex(weights - gamma * slopes), gamma_0)
        return _diverge(candidate, jacobian.flatten(1), gradient), following


def _combine(weights: Tensor, jacobian: Tensor) -> Tensor:
    """Return J^T weights, [P, n]."""
    return torch.einsum("pm,pmn->pn", weights, jacobian)


def _settle(
    oracle: Oracle,
    parameters: Tensor,
    state: SMGState,
    direction: Tensor,
    weights: Tensor,
    seen: StepInfo,
) -> tuple[Tensor, Tensor]:
    """Return alpha_0 [P], searched where it is not known yet, and the search's steepening [P] (1 elsewhere)."""
    known = state.alpha_0.to(parameters.device)
    missing = known == 0
    if not missing.any():
        return known, torch.ones_like(known)
    # A zero direction is not searched, so that instances with a known alpha_0 cost no evaluation.
    wanted = torch.where(missing[:, None], direction, 0.0)
    found = first_step(oracle, parameters, wanted, weights, seen.losses, seen.batch)
    return torch.where(missing, found.alpha, known), found.steepening


def _move(problem: Problem, parameters: Tensor, alpha: Tensor, direction: Tensor) -> Tensor:
    """Return Proj_box(z - alpha direction), [P, n]."""
    return problem.project(parameters - alpha[:, None].to(parameters) * direction)


def _feasible(problem: Problem, parameters: Tensor, alpha: Tensor, gradient: Tensor) -> Tensor:
    """Return (z - Proj_box(z - alpha gradient)) / alpha, [P, n], free of its rounding; the gradient where alpha = 0."""
    if problem.bounds is None:
        return gradient
    size = alpha[:, None].to(parameters)
    lower, upper = problem.bounds
    clipped = torch.minimum(torch.maximum(gradient, (parameters - upper) / size), (parameters - lower) / size)
    return torch.where(size > 0, clipped, gradient)


def _diverge(candidate: Tensor, *seen: Tensor) -> Tensor:
    """Return `candidate` [P, n] with NaN for instances whose `seen` [P, ..] has a non-finite entry."""
    finite = torch.stack([part.isfinite().all(dim=1) for part in seen]).all(dim=0)
    return torch.where(finite[:, None], candidate, math.nan)


def _check_positive(rule: str, key: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{rule}: {key} is {value!r}; allowed are positive, finite numbers")

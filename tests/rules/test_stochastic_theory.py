"""What SMG and DSSMG claim: the constants of the bound, moves and weight steps without bias, convergence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ml2o_dist.problems import ProblemContext
from ml2o_dist.problems.quadratic import Quadratic
from ml2o_dist.rules.base import Oracle, look
from ml2o_dist.rules.min_norm import min_norm
from ml2o_dist.rules.stochastic import DSSMG, SMG, DecreasingSteps, DSSMGState, SMGState
from ml2o_dist.runtime.seeding import generator
from tests.rules.stochastic_reference import run, weights_of

pytestmark = pytest.mark.long

RULES = [SMG, DSSMG]


def expected_jacobian(problem: Quadratic, point: Tensor) -> Tensor:
    """Return E J = A (z - c), [P, m, n]."""
    return torch.einsum("pikn,pikl,pil->pin", problem.factors, problem.factors, point[:, None] - problem.centres)


def test_every_constant_of_the_bound() -> None:
    """Without noise M_1 and M_2 are the squares themselves: the inequality of the docstring, step by step; L = 1."""
    problem = Quadratic(ProblemContext(3, seed=5, dtype=torch.float64), m=3, n=6)
    rule = DSSMG(c=0.2)
    trace = run(rule, problem, 200)
    settled = trace[1][1]
    assert isinstance(settled, DSSMGState)
    constant = (settled.alpha_0 / settled.gamma_0)[:, None]
    fixed = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.5, 0.3]], dtype=torch.float64)

    def energy(point: Tensor, state: SMGState) -> Tensor:
        distance = (weights_of(state)[:, None] - fixed).square().sum(dim=2)
        return problem.losses(point, None) @ fixed.T + constant / 2 * distance

    for t in range(1, 200):
        point, state = trace[t]
        jacobian = problem.jacobian(point, None)[0]
        move = torch.einsum("pm,pmn->pn", weights_of(state), jacobian)
        square, slopes = move.square().sum(dim=1)[:, None], torch.einsum("pmn,pn->pm", jacobian, move)
        alpha = rule.alpha(state)[:, None]
        first = energy(point, state) - alpha * square
        second = alpha**2 / 2 * (square + slopes.square().sum(dim=1)[:, None] / constant)
        after = energy(*trace[t + 1])
        assert (after <= first + second + 1e-12).all()
        # Inside the simplex the weights' part is an equality, and A >= condition^-1 = 0.1 bounds the rest from below.
        if (weights_of(trace[t + 1][1]) > 0).all():
            normal = alpha**2 / (2 * constant) * slopes.mean(dim=1)[:, None] ** 2 * 3  # taken off by the projection
            lowest = alpha**2 / 2 * (0.1 * square + slopes.square().sum(dim=1)[:, None] / constant) - normal
            assert (after >= first + lowest - 1e-12).all()


def noisy() -> tuple[Quadratic, Tensor, Tensor, Tensor]:
    """Return a quadratic with strong noise, a point, weights [1, 3] and the expected Jacobian there."""
    problem = Quadratic(ProblemContext(1, seed=2, dtype=torch.float64), m=3, n=8, noise=2.0, batch=4)
    point = problem.initial_parameters([0])
    return problem, point, torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64), expected_jacobian(problem, point)


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    """Return how many standard errors the mean of `samples` [draws, k] is off `expected` [k]."""
    return (samples.mean(dim=0) - expected).abs() / (samples.std(dim=0) / math.sqrt(len(samples)))


@pytest.mark.parametrize("double", [True, False])
def test_the_weight_step_is_unbiased_with_two_batches_and_biased_with_one(double: bool) -> None:
    """E J_1 J_2^T lambda = J J^T lambda; with J_2 = J_1 the noise adds n noise^2 / B lambda_i. 4,000 draws, 4 sigma.

    gamma is so small that the step ends inside the simplex, where the projection only takes off the mean.
    """
    problem, point, weights, jacobian = noisy()
    one = torch.ones(1, dtype=torch.float64)
    state, rule, oracle = DSSMGState(0, one, weights, 1e-6 * one), DSSMG(), Oracle(problem, generator("increments"))
    steps = []
    for _ in range(4000):
        seen = look(oracle, point)
        source = Oracle(problem, generator("unused"))
        source.draw = oracle.draw if double else lambda batch=seen.batch: batch  # type: ignore[method-assign]
        _, following = rule.propose(source, point, state, seen)
        steps.append((weights - following.weights)[0] / 1e-6)
    unbiased = torch.einsum("pmn,pln,pl->pm", jacobian, jacobian, weights)[0]
    biased = unbiased + problem.dimension * problem.noise**2 / problem.batch * weights[0]
    right, wrong = (unbiased, biased) if double else (biased, unbiased)
    assert z_scores(torch.stack(steps), right - right.mean()).max() < 4.0
    assert z_scores(torch.stack(steps), wrong - wrong.mean()).max() > 8.0


@pytest.mark.parametrize("rule", RULES)
def test_dssmg_s_move_is_unbiased_and_smg_s_is_not(rule: type[DecreasingSteps]) -> None:
    """lambda_t is older than J_1, so E (z_t - z_{t+1}) / alpha_t = J^T lambda_t. 4,000 draws, 4 sigma."""
    problem, point, weights, jacobian = noisy()
    one = torch.ones(1, dtype=torch.float64)
    state = DSSMGState(0, one, weights, one) if rule is DSSMG else SMGState(0, one)
    used = weights if rule is DSSMG else min_norm(jacobian).weights
    oracle = Oracle(problem, generator("moves"))
    moves = torch.stack([(point - rule().step(oracle, point, state)[0])[0] for _ in range(4000)])
    off = z_scores(moves, torch.einsum("pm,pmn->pn", used, jacobian)[0]).max()
    assert off < 4.0 if rule is DSSMG else off > 8.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_it_converges_on_convex_quadratics(rule: type[DecreasingSteps], m: int) -> None:
    problem = Quadratic(ProblemContext(4, seed=m, dtype=torch.float64), m=m, n=8, condition=4.0)
    trace = run(rule(), problem, 1500)
    before, middle, end = (min_norm(problem.jacobian(trace[t][0], None)[0]).squared_norm.sqrt() for t in (0, 150, 1500))
    assert (middle < 0.1 * before).all()
    assert (end < 1e-3 * before).all()


class Constant(DSSMG):
    """DSSMG with steps that do not decrease."""

    def decay(self, state: SMGState) -> float:
        return 1.0


def test_dssmg_converges_through_noise_as_its_steps_decrease() -> None:
    problem = Quadratic(ProblemContext(8, seed=1, dtype=torch.float64), m=3, n=8, noise=2.0, batch=4)

    def criticality(rule: DSSMG, first: int, last: int) -> float:
        points = [point for point, _ in run(rule, problem, last)[first:]]
        return sum(min_norm(expected_jacobian(problem, z)).squared_norm.mean().item() for z in points) / len(points)

    start, early, late = (criticality(DSSMG(p=0.75), *steps) for steps in ((0, 0), (100, 200), (2500, 3000)))
    assert early < 0.1 * start
    assert late < 0.25 * early
    assert late < 0.1 * criticality(Constant(alpha_0=0.5), 1500, 2000)

"""What exact mode promises, whatever the learned rule does; and that without a guard the same rules do harm."""

from __future__ import annotations

import math

import pytest
import torch

from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.adversaries import ADVERSARIES, AdversaryRule
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from ml2o_dist.rules.guarded import GuardedRule
from ml2o_dist.rules.stochastic import DSSMG
from tests.crossed import crossed

DOUBLE = torch.float64
PROBLEMS = [
    "quadratic[m=2,n=6]",
    "quadratic[m=3,n=4,condition=100]",
    "quadratic[m=5,n=1]",
    "fonseca",
    "zdt1[n=5]",
    pytest.param("zdt2[n=5]", marks=pytest.mark.long),
    pytest.param("zdt3[n=5]", marks=pytest.mark.long),
    "cagrad_toy",
]


def build(text, instances=3, seed=0):
    problem = ProblemSpec.parse(text).build(ProblemContext(instances, seed, dtype=DOUBLE))
    return Oracle(problem, torch.Generator().manual_seed(seed)), problem.initial_parameters(range(instances))


def random_network(seed):
    settings = RuleSettings(features="log_sign", output="scaled", hidden=4, scale=1.0)
    source = torch.Generator().manual_seed(seed)
    shapes = ML2ORule.from_weights(settings, None).network.state_dict()
    weights = {name: torch.randn(t.shape, generator=source) for name, t in shapes.items()}
    return ML2ORule.from_weights(settings, weights, dtype=DOUBLE)


@crossed("text, name, eps", PROBLEMS, [*ADVERSARIES, "network"], [0.01, 0.0])
def test_no_step_is_worse_than_the_fallbacks_by_more_than_eps(text, name, eps):
    rule = random_network(5) if name == "network" else AdversaryRule(name)
    settings, fallback = GuardSettings(budget=0.0, eps=eps), DSSMG()
    guarded = GuardedRule(rule, fallback, settings)
    oracle, point = build(text)
    problem = oracle.problem
    state = guarded.initial_state(problem.instances, problem.objectives, problem.layout)
    for t in range(60):
        before, its = point, state.fallback
        point, state, seen = guarded.step(oracle, point, state)
        safe, _ = fallback.propose(Oracle(problem, torch.Generator()), before, its, seen)
        reached, promised = problem.losses(point, None), problem.losses(safe, None)
        allowed = promised + eps * (t + 1) ** (-2 * settings.p)
        assert bool((reached <= allowed).all()), (t, reached, promised)
        assert torch.equal(point, problem.project(point))


class Uphill(UpdateRule):
    """z + beta J^T lambda_t, with the weights that DSSMG has at the same point."""

    def __init__(self, fallback, beta):
        self.fallback, self.beta = fallback, beta

    def initial_state(self, instances, objectives, layout):
        return self.fallback.initial_state(instances, objectives, layout)

    def propose(self, oracle, parameters, state, seen):
        apart = Oracle(oracle.problem, torch.Generator())
        _, following = self.fallback.propose(apart, parameters, state, seen)
        direction = torch.einsum("pm,pmn->pn", state.weights.to(seen.jacobian), seen.jacobian)
        return parameters + self.beta * direction, following


@crossed("text, beta", ["quadratic[m=2,n=6]", "quadratic[m=3,n=4]", "quadratic[m=5,n=8]"], [1e-3, 0.1, 1.0, 1e3])
def test_ascent_along_the_weighted_gradient_is_always_rejected_so_the_run_is_dssmgs_own(text, beta):
    """alpha_0 <= 1 / L: the largest eigenvalue of these quadratics is 1."""
    fallback = DSSMG(alpha_0=0.9)
    oracle, first = build(text)
    shape = (3, oracle.problem.objectives, oracle.problem.layout)
    guarded, alone = GuardedRule(Uphill(fallback, beta), fallback, GuardSettings(budget=0.0)), fallback
    point, state = first, guarded.initial_state(*shape)
    other, its = first, alone.initial_state(*shape)
    for _ in range(100):
        point, state, info = guarded.step(oracle, point, state)
        other, its, _ = alone.step(build(text)[0], other, its)
        assert not info.accepted.any()
        assert torch.equal(point, other)
        assert torch.equal(state.fallback.weights, its.weights)


@crossed(
    "text, name, eps",
    ["quadratic[m=2,n=6]", "quadratic[m=3,n=4]", "quadratic[m=5,n=8]"],
    [*ADVERSARIES, "network"],
    [0.0, 0.1],
)
def test_the_telescoped_bound_holds_for_every_fixed_weighting(text, name, eps):
    """sum alpha_t |G_t|^2 <= V_0 - inf + 1/2 sum alpha_t^2 (L |G_t|^2 + |J G_t|^2 / C) + sum eps_t, G_t = J^T lambda_t.

    L = 1 and minima 0 by construction; C = alpha_t / gamma_t is read off the state.
    """
    rule = random_network(7) if name == "network" else AdversaryRule(name)
    settings, fallback = GuardSettings(budget=0.0, eps=eps), DSSMG(alpha_0=0.5)
    guarded = GuardedRule(rule, fallback, settings)
    oracle, point = build(text)
    problem = oracle.problem
    m = problem.objectives
    state = guarded.initial_state(problem.instances, m, problem.layout)
    start, uniform = problem.losses(point, None), torch.full((m,), 1 / m, dtype=DOUBLE)
    criticality, errors = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    for t in range(120):
        weights, alpha = state.fallback.weights, fallback.alpha(state.fallback)
        point, state, info = guarded.step(oracle, point, state)
        jacobian = info.jacobian
        scale = fallback.alpha(state.fallback) / (state.fallback.gamma_0 * fallback.decay(state.fallback))
        combined = torch.einsum("pm,pmn->pn", weights, jacobian)
        criticality += alpha * combined.square().sum(dim=1)
        slopes = torch.einsum("pmn,pn->pm", jacobian, combined).square().sum(dim=1)
        errors += 0.5 * alpha**2 * (combined.square().sum(dim=1) + slopes / scale)
        errors += eps * (t + 1) ** (-2 * settings.p)
    for fixed in [*torch.eye(m, dtype=DOUBLE), uniform]:
        potential = start @ fixed + 0.5 * scale * (uniform - fixed).square().sum()
        assert (criticality <= potential + errors).all()


@pytest.mark.parametrize("name", ["ascent", "huge"])
def test_unguarded_the_same_rules_diverge(name):
    rule = AdversaryRule(name)
    oracle, point = build("quadratic[m=2,n=6]")
    before, state = oracle.problem.losses(point, None).sum(), rule.initial_state(3, 2, ParameterLayout.vector(6))
    for _ in range(200):
        point, state, _ = rule.step(oracle, point, state)
    after = oracle.problem.losses(point, None).sum()
    assert not after < 1e6 * before


@pytest.mark.parametrize(
    "name", ["random", "nan", *(pytest.param(name, marks=pytest.mark.long) for name in ("ascent", "huge"))]
)
def test_guarded_they_end_where_dssmg_does(name):
    fallback = DSSMG()
    shape = (3, 2, ParameterLayout.vector(6))
    guarded = GuardedRule(AdversaryRule(name), fallback, GuardSettings(budget=0.0))
    oracle, point = build("quadratic[m=2,n=6]")
    other, state, its = point, guarded.initial_state(*shape), fallback.initial_state(*shape)
    apart = build("quadratic[m=2,n=6]")[0]
    for _ in range(300):
        point, state, _ = guarded.step(oracle, point, state)
        other, its, _ = fallback.step(apart, other, its)
    ours, theirs = (oracle.problem.losses(each, None).sum(dim=1) for each in (point, other))
    assert (ours <= 1.1 * theirs).all()


def excess(margin, steps):
    """By how much the accepted steps of a drift truly worsen an objective, on noisy quadratics, summed over steps."""
    guarded = GuardedRule(AdversaryRule("drift"), DSSMG(), GuardSettings(budget=0.0, margin=margin))
    oracle, point = build("quadratic[n=4,noise=1.0,batch=32]", 2)
    problem = oracle.problem
    state, total = guarded.initial_state(2, 2, ParameterLayout.vector(4)), 0.0
    for _ in range(steps):
        before = point
        point, state, info = guarded.step(oracle, point, state)
        for p in info.accepted.nonzero().flatten().tolist():
            lead = problem.losses(point, None)[p] - problem.losses(before, None)[p]
            total += max(0.0, lead.max().item())
    return total


@pytest.mark.parametrize("steps", [300, pytest.param(1000, marks=pytest.mark.long)])
def test_a_margin_of_three_standard_errors_lets_little_of_a_drift_pass(steps):
    with_margin, without = excess(3.0, steps), excess(0.0, steps)
    assert math.isfinite(without)
    assert with_margin < 0.1 * without

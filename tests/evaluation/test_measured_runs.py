"""Measured runs against runs by hand: points, losses in closed form, decisions, excess, charges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ml2o_dist.config import GuardSettings
from ml2o_dist.evaluation.criticality import criticality
from ml2o_dist.evaluation.measured_runs import Course, measured_run, walk
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.adversaries import AdversaryRule
from ml2o_dist.rules.aggregated import AggregatedRule
from ml2o_dist.rules.guarded import GuardedRule
from ml2o_dist.rules.stochastic import DSSMG

NOISY = ProblemSpec.parse("quadratic[m=3,n=4,noise=1.0,batch=16]")
SEEDS = (3, 8)


class Recorded(DSSMG):
    """DSSMG that keeps its candidates."""

    def __init__(self):
        super().__init__()
        self.candidates = []

    def propose(self, oracle, parameters, state, seen):
        point, following = super().propose(oracle, parameters, state, seen)
        self.candidates.append(point)
        return point, following


def course(spec=NOISY, dtype=torch.float64):
    return Course.build(spec, SEEDS, dtype)


def exact_losses(problem, points):
    """f_i(z) = 1/2 |R_i (z - c_i)|^2 in numpy, [P, m]."""
    factors, centres = problem.factors.numpy(), problem.centres.numpy()
    residuals = np.einsum("pikn,pin->pik", factors, points.numpy()[:, None] - centres)
    return 0.5 * (residuals**2).sum(axis=2)


def by_hand(rule, steps):
    """The points z_0 .. z_steps and infos of a plain loop."""
    made = course()
    oracle, point = made.oracle(), made.start
    state = rule.initial_state(2, 3, ParameterLayout.vector(4))
    points, infos = [point], []
    for _ in range(steps):
        point, state, info = rule.step(oracle, point, state)
        points.append(point)
        infos.append(info)
    return points, infos, oracle


def test_an_unguarded_run_is_measured_where_a_plain_loop_comes_by():
    made = course()
    run = measured_run(DSSMG(), made, 11, every=4)
    points, _, oracle = by_hand(DSSMG(), 11)
    assert run.at == (0, 4, 8, 11)
    for k, t in enumerate(run.at):
        np.testing.assert_allclose(run.losses[k].numpy(), exact_losses(made.problem, points[t]), rtol=1e-12)
        there = criticality(made.judge, points[t])
        assert torch.equal(run.absolute[k], there.absolute)
        assert torch.equal(run.relative[k], there.relative)
    assert run.accepted.shape == (11, 2)
    assert run.accepted.all()
    assert not run.checked.any()
    assert math.isnan(run.acceptance)
    assert (run.forwards, run.backwards) == (oracle.forwards, oracle.backwards)
    assert run.guard_seconds == 0 < run.seconds


@pytest.mark.parametrize("margin", [0.0, 3.0])
def test_a_guarded_run_counts_what_passed_and_what_it_truly_cost(margin):
    learned, settings = AggregatedRule("mean", "sgd", 0.6), GuardSettings(budget=0.0, margin=margin)
    made = course()
    run = measured_run(GuardedRule(learned, DSSMG(), settings), made, 60, every=60, excess=True)
    fallback = Recorded()
    points, infos, _ = by_hand(GuardedRule(learned, fallback, settings), 60)
    accepted = torch.stack([info.accepted for info in infos])
    assert torch.equal(run.accepted, accepted)
    assert run.checked.all()
    assert run.acceptance == accepted.double().mean()
    expected = [
        (exact_losses(made.problem, after) - exact_losses(made.problem, safe)).max(axis=1).clip(min=0)
        for after, safe in zip(points[1:], fallback.candidates, strict=True)
    ]
    np.testing.assert_allclose(run.excess.numpy(), np.stack(expected), rtol=1e-9, atol=1e-12)
    assert (run.excess[~accepted] == 0).all()
    if margin == 0.0:
        assert (run.excess > 0).any()
    assert 0 < run.guard_seconds < run.seconds


def test_acceptance_is_over_the_steps_that_were_checked():
    rule = GuardedRule(AdversaryRule("ascent"), DSSMG(), GuardSettings(budget=0.0, every=3))
    run = measured_run(rule, course(ProblemSpec.parse("quadratic[n=4]")), 9, every=9)
    assert run.checked.tolist() == [True, False, False] * 3
    assert run.acceptance == 0.0
    assert run.accepted.sum() == 12


def test_what_diverges_is_measured_as_not_a_number():
    run = measured_run(AdversaryRule("nan"), course(), 3, every=1)
    assert run.losses[0].isfinite().all()
    assert run.absolute[1:].isnan().all()


def test_every_rule_of_a_course_meets_the_same_batches():
    first, second = (
        next(walk(rule, course().oracle(), course().start, 1)) for rule in (DSSMG(), AdversaryRule("frozen"))
    )
    assert torch.equal(first.info.batch, second.info.batch)
    assert torch.equal(first.info.losses, second.info.losses)


def test_the_judge_is_the_same_quadratic_without_its_noise():
    made = course()
    assert made.judge.sample_batch(torch.Generator()) is None
    assert torch.equal(made.judge.centres, made.problem.centres)
    assert torch.equal(made.judge.factors, made.problem.factors)
    digits = course(ProblemSpec.parse("multidigits[hidden=4]"), torch.float32)
    assert digits.judge is digits.problem

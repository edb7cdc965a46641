"""The guard's decisions against their definition, recomputed apart; its state, its costs, its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.adversaries import AdversaryRule
from ml2o_dist.rules.aggregated import AggregatedRule
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from ml2o_dist.rules.guarded import GuardedRule
from ml2o_dist.runtime.errors import UserError

FALLBACK, BOLD = AggregatedRule("mean", "sgd", 0.1), AggregatedRule("mean", "sgd", 0.8)


def start(text, instances=1, dtype=torch.float64, seed=0):
    problem = ProblemSpec.parse(text).build(ProblemContext(instances, seed, dtype=dtype))
    return Oracle(problem, torch.Generator().manual_seed(seed)), problem.initial_parameters(range(instances))


def run(rule, oracle, parameters, steps):
    state = rule.initial_state(len(parameters), oracle.problem.objectives, oracle.problem.layout)
    points, infos = [parameters], []
    for _ in range(steps):
        parameters, state, info = rule.step(oracle, parameters, state)
        points.append(parameters)
        infos.append(info)
    return points, infos, state


@pytest.mark.parametrize("objectives", [2, 3, 5])
@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_exact_losses_decide_by_every_objective(objectives, eps):
    oracle, first = start(f"quadratic[m={objectives},n=6]", 4)
    settings = GuardSettings(budget=0.0, eps=eps, p=0.75)
    points, infos, _ = run(GuardedRule(BOLD, FALLBACK, settings), oracle, first, 40)
    verdicts = set()
    for t, (before, after, info) in enumerate(zip(points, points[1:], infos, strict=False)):
        losses = oracle.problem.losses
        learned = before - 0.8 * info.jacobian.mean(dim=1)
        safe = before - 0.1 * info.jacobian.mean(dim=1)
        for p in range(4):
            each = losses(learned, None)[p], losses(safe, None)[p]
            passes = all(a <= b + eps / (t + 1) ** 1.5 for a, b in zip(*(x.tolist() for x in each), strict=True))
            assert bool(info.accepted[p]) == passes
            torch.testing.assert_close(after[p], (learned if passes else safe)[p], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(info.learned_losses[p], each[0])
            torch.testing.assert_close(info.fallback_losses[p], each[1])
            verdicts.add(passes)
    assert verdicts == {True, False}


def test_a_margin_of_standard_errors_decides_on_noisy_losses():
    oracle, first = start("quadratic[n=5,noise=0.5,batch=16]", 3)
    drawn = []
    draw = oracle.draw
    oracle.draw = lambda: drawn.append(draw()) or drawn[-1]
    rule = GuardedRule(BOLD, FALLBACK, GuardSettings(budget=0.0, margin=2.0, batches=2, eps=0.05, p=1.0))
    points, infos, _ = run(rule, oracle, first, 30)
    verdicts = set()
    for t, (before, info) in enumerate(zip(points, infos, strict=False)):
        seen, *guard = drawn[3 * t : 3 * t + 3]
        assert seen is info.batch
        learned, safe = (before - rate * info.jacobian.mean(dim=1) for rate in (0.8, 0.1))
        each = [[oracle.problem.sample_losses(x, b).numpy() for b in guard] for x in (learned, safe)]
        differences = np.concatenate(each[0], axis=1) - np.concatenate(each[1], axis=1)
        assert differences.shape == (3, 32, 2)
        upper = differences.mean(axis=1) + 2.0 * differences.std(axis=1, ddof=1) / math.sqrt(32)
        passes = (upper <= 0.05 / (t + 1) ** 2).all(axis=1)
        assert info.accepted.tolist() == passes.tolist()
        verdicts |= set(passes.tolist())
    assert verdicts == {True, False}


def test_a_step_is_charged_one_jacobian_the_fallback_and_two_forwards_for_each_guard_batch():
    oracle, first = start("quadratic[m=3,n=4,noise=0.1]")
    settings = GuardSettings(budget=0.0, batches=2, growth=0.5)
    _, infos, _ = run(GuardedRule(AdversaryRule("frozen"), FALLBACK, settings), oracle, first, 10)
    guard = [math.ceil(2 * math.sqrt(t + 1)) for t in range(10)]
    assert [(info.forwards, info.backwards) for info in infos] == [(1 + 2 * count, 3) for count in guard]
    assert (oracle.forwards, oracle.backwards) == (sum(i.forwards for i in infos), 30)
    assert oracle.batches == 10 + sum(guard)


@pytest.mark.parametrize("text", ["quadratic[n=4]", "quadratic[n=4,noise=0.1]", "multidigits[hidden=4,batch=8]"])
def test_what_is_not_finite_is_never_accepted(text):
    oracle, first = start(text, 2, torch.float32)
    points, infos, _ = run(GuardedRule(AdversaryRule("nan"), FALLBACK), oracle, first, 6)
    alone, _, _ = run(FALLBACK, *start(text, 2, torch.float32), 6)
    assert not torch.stack([info.accepted for info in infos]).any()
    assert torch.stack(points).isfinite().all()
    if oracle.draw() is None:
        assert torch.equal(points[-1], alone[-1])


class Overflowing(Problem):
    """(|z|^2, |z - 1|^2) up to |z| = 10; beyond, the second is infinite or not a number."""

    def __init__(self, beyond):
        self.instances, self.objectives, self.dimension = 1, 2, 2
        self.device, self.dtype, self.beyond = torch.device("cpu"), torch.float64, beyond

    def initial_parameters(self, seeds):
        return torch.full((1, 2), 3.0, dtype=torch.float64)

    def sample_batch(self, generator):
        return None

    def sample_losses(self, parameters, batch):
        first, second = parameters.square().sum(dim=1), (parameters - 1).square().sum(dim=1)
        outside = parameters.norm(dim=1) > 10
        second = torch.where(outside, second * 0 + self.beyond, second)
        return torch.stack((torch.where(outside, first * 0, first), second), dim=1)[:, None]


@pytest.mark.parametrize("beyond", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("criterion", ["each", "sum"])
def test_a_loss_that_is_not_finite_is_never_accepted(beyond, criterion):
    problem = Overflowing(beyond)
    oracle = Oracle(problem, torch.Generator())
    rule = GuardedRule(AdversaryRule("huge"), FALLBACK, GuardSettings(budget=0.0, criterion=criterion, eps=100))
    _, (info,), _ = run(rule, oracle, problem.initial_parameters([0]), 1)
    assert not info.accepted.any()


def test_a_fallback_that_is_not_finite_gives_way_to_a_learned_step_that_is():
    oracle, first = start("quadratic[n=4]", 2)
    points, infos, _ = run(GuardedRule(FALLBACK, AdversaryRule("nan")), oracle, first, 5)
    alone, _, _ = run(FALLBACK, *start("quadratic[n=4]", 2), 5)
    assert torch.stack([info.accepted for info in infos]).all()
    assert torch.equal(points[-1], alone[-1])


@pytest.mark.parametrize("name", ["random", "drift", "turncoat"])
def test_instances_decide_for_themselves(name):
    text, rule = "quadratic[m=3,n=5]", GuardedRule(AdversaryRule(name), FALLBACK)
    oracle, first = start(text, 3)
    points, infos, _ = run(rule, oracle, first, 25)
    problem = oracle.problem
    for p in range(3):
        factors, centres = problem.factors[p : p + 1], problem.centres[p : p + 1]
        one, _ = start(text)
        one.problem.factors, one.problem.centres = factors, centres
        alone, decided, _ = run(rule, one, first[p : p + 1], 25)
        assert [bool(info.accepted[p]) for info in infos] == [bool(info.accepted) for info in decided]
        torch.testing.assert_close(points[-1][p : p + 1], alone[-1], rtol=1e-12, atol=1e-12)


LEARNED = RuleSettings(features="alignment", output="controlled", hidden=4)


def test_a_learned_rule_that_always_passes_moves_as_if_unguarded():
    learned = ML2ORule.from_weights(LEARNED, None, dtype=torch.float64)
    guarded, infos, _ = run(GuardedRule(learned, AdversaryRule("huge")), *start("quadratic[n=6]", 2), 30)
    alone, _, _ = run(learned, *start("quadratic[n=6]", 2), 30)
    assert torch.stack([info.accepted for info in infos]).all()
    assert torch.equal(guarded[-1], alone[-1])


def test_after_a_rejected_step_the_alignment_judges_the_step_that_was_taken():
    learned = ML2ORule.from_weights(LEARNED.model_copy(update={"lr": 5.0}), None, dtype=torch.float64)
    oracle, first = start("quadratic[n=6]", 2)
    points, infos, state = run(GuardedRule(learned, FALLBACK, GuardSettings(budget=0.0)), oracle, first, 3)
    assert not infos[-1].accepted.any()
    alignment, moved = state.learned.alignment, points[-1] - points[-2]
    gradient = infos[-1].jacobian.sum(dim=1)
    lengths = gradient.norm(dim=1) * moved.norm(dim=1)
    torch.testing.assert_close(alignment.update, moved / lengths[:, None])
    torch.testing.assert_close(alignment.promise, (gradient * moved).sum(dim=1) / lengths)
    # the LSTMs and the averages keep what they saw: as after the same Jacobians without a guard
    unguarded = learned.initial_state(2, 2, ParameterLayout.vector(6))
    for info in infos:
        _, unguarded = learned.update(info.jacobian, unguarded)
    for ours, theirs in zip(state.learned.blocks, unguarded.blocks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.memory, theirs.memory, strict=True))


def test_between_checks_nothing_is_compared_and_only_what_is_not_finite_is_refused():
    seldom = GuardSettings(budget=0.0, every=3)
    oracle, first = start("quadratic[n=4]")
    _, infos, state = run(GuardedRule(AdversaryRule("ascent"), FALLBACK, seldom), oracle, first, 9)
    assert [info.checked for info in infos] == [True, False, False] * 3
    assert [bool(info.accepted) for info in infos] == [False, True, True] * 3
    assert [info.forwards for info in infos] == [3, 1, 1] * 3
    assert state.fallback.steps == 3
    points, _, _ = run(GuardedRule(AdversaryRule("nan"), FALLBACK, seldom), *start("quadratic[n=4]"), 9)
    assert points[-1].isfinite().all()


def test_the_sum_may_trade_one_objective_for_another():
    def rates(criterion):
        oracle, first = start("quadratic[n=4,m=3]", 8)
        settings = GuardSettings(budget=0.0, criterion=criterion)
        _, infos, _ = run(GuardedRule(BOLD, FALLBACK, settings), oracle, first, 10)
        return torch.stack([info.accepted for info in infos]).double().mean()

    assert rates("sum") > rates("each") + 0.2


@pytest.mark.parametrize(("budget", "least"), [(0.0, 2), (5.0, 4)])
def test_one_sample_is_too_few_for_a_margin(budget, least):
    oracle, first = start("quadratic[n=4,noise=0.1,batch=1]")
    for batches in (1, least - 1):
        guard = GuardSettings(budget=budget, batches=batches)
        with pytest.raises(UserError, match=rf"guard.* {least} samples or more.*rule\.guard\.batches"):
            run(GuardedRule(AdversaryRule("frozen"), FALLBACK, guard), oracle, first, 1)
    enough = GuardSettings(budget=budget, batches=least)
    run(GuardedRule(AdversaryRule("frozen"), FALLBACK, enough), oracle, first, 1)


def test_an_unknown_adversary_ends_with_the_nearest_name():
    with pytest.raises(UserError, match=r"adversary 'accent'.*'ascent'"):
        AdversaryRule("accent")

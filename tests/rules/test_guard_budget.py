"""The guard's budget: decisions against their definition, what it bounds in truth, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ml2o_dist.config import GuardSettings
from ml2o_dist.problems import ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.adversaries import AdversaryRule
from ml2o_dist.rules.aggregated import AggregatedRule
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.guarded import Debt, GuardedRule, Verdict
from ml2o_dist.rules.stochastic import DSSMG
from ml2o_dist.runtime.errors import UserError
from tests.crossed import crossed

FALLBACK, BOLD = AggregatedRule("mean", "sgd", 0.1), AggregatedRule("mean", "sgd", 0.8)


def start(text, instances=1, seed=0):
    problem = ProblemSpec.parse(text).build(ProblemContext(instances, seed, dtype=torch.float64))
    return Oracle(problem, torch.Generator().manual_seed(seed)), problem.initial_parameters(range(instances))


def walk(rule, oracle, point, steps):
    """Yield (z_t, x_D, z_{t+1}, what the step saw)."""
    state = rule.initial_state(len(point), oracle.problem.objectives, oracle.problem.layout)
    for _ in range(steps):
        fallback = state.fallback
        following, state, info = rule.step(oracle, point, state)
        safe, _ = rule.fallback.propose(Oracle(oracle.problem, torch.Generator()), point, fallback, info)
        yield point, safe, following, info
        point = following


class Fallen:
    """By how much the objective that fell furthest had fallen, from all losses seen; written out."""

    def __init__(self):
        self.seen, self.depth = [], 0.0

    def after(self, losses):
        self.seen.append(losses.double().numpy())
        ages = np.arange(len(self.seen))[::-1]
        first, recent = np.mean(self.seen[:5], axis=0), np.average(self.seen, axis=0, weights=0.8**ages)
        self.depth = np.maximum(self.depth, (first - recent).max(axis=1))
        return torch.from_numpy(self.depth)[:, None]


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
@pytest.mark.parametrize("criterion", ["each", "sum"])
def test_exact_differences_add_up_to_the_budget_and_no_further(objectives, criterion):
    oracle, first = start(f"quadratic[m={objectives},n=6]", 4)
    settings = GuardSettings(budget=0.1, criterion=criterion)
    rate = 2.5 if objectives == 1 else 3.0
    wild = AggregatedRule("mean", "sgd", rate)
    losses = oracle.problem.losses
    owed = torch.zeros_like(losses(first, None))
    if criterion == "sum":
        owed = owed[:, :1]
    verdicts, fallen = set(), Fallen()
    for before, _, after, info in walk(GuardedRule(wild, FALLBACK, settings), oracle, first, 40):
        learned, safe = (before - step * info.jacobian.mean(dim=1) for step in (rate, 0.1))
        limit = 0.1 * fallen.after(info.losses if criterion == "each" else info.losses.sum(dim=1, keepdim=True))
        for p in range(4):
            worse = losses(learned, None)[p] - losses(safe, None)[p]
            if criterion == "sum":
                worse = worse.sum(dim=0, keepdim=True)
            by_itself = bool((worse <= 0).all())
            within = bool((owed[p] + worse <= limit[p]).all())
            assert bool(info.accepted[p]) == (by_itself or within)
            torch.testing.assert_close(after[p], (learned if by_itself or within else safe)[p])
            if by_itself or within:
                owed[p] = (owed[p] + worse).clamp(min=0)
                verdicts.add(("by itself", by_itself))
            else:
                verdicts.add("refused")
    assert len(verdicts) == 3, verdicts


@crossed(
    "name, text",
    ["ascent", "random", "huge", "nan", "drift", "turncoat", "frozen"],
    ["quadratic[m=3,n=6]", "zdt1[n=5]", "quadratic[n=6]", "fonseca", "cagrad_toy"],
)
def test_in_no_stretch_of_a_run_is_it_worse_than_its_fallbacks_steps_by_more(name, text):
    oracle, point = start(text, 3)
    begun = oracle.problem.losses(point, None)
    owed, fallen = torch.zeros_like(begun), Fallen()
    rule = GuardedRule(AdversaryRule(name), DSSMG(), GuardSettings(budget=0.3))
    for _, safe, after, info in walk(rule, oracle, point, 100):
        assert after.isfinite().all()
        limit = 0.3 * fallen.after(info.losses)
        assert (limit <= 0.3 * (begun - oracle.problem.minima).amax(dim=1, keepdim=True)).all()
        owed = (owed + oracle.problem.losses(after, None) - oracle.problem.losses(safe, None)).clamp(min=0)
        assert (owed <= limit * (1 + 1e-9) + 1e-12).all()


def test_the_deciding_half_of_a_noisy_batch_is_not_the_paying_one():
    oracle, first = start("quadratic[n=5,noise=0.5,batch=16]", 3)
    drawn, draw = [], oracle.draw
    oracle.draw = lambda: drawn.append(draw()) or drawn[-1]
    rule = GuardedRule(BOLD, FALLBACK, GuardSettings(margin=1.0, batches=2, budget=0.05))
    verdicts, owed, variance, point, fallen = set(), np.zeros((3, 2)), np.zeros((3, 2)), first, Fallen()
    state = rule.initial_state(3, 2, ParameterLayout.vector(5))
    for t in range(40):
        before = point
        point, state, info = rule.step(oracle, point, state)
        limit = 0.05 * fallen.after(info.losses).numpy()
        guard = drawn[3 * t + 1 : 3 * t + 3]
        learned, safe = (before - rate * info.jacobian.mean(dim=1) for rate in (0.8, 0.1))
        each = [[oracle.problem.sample_losses(x, b).numpy() for b in guard] for x in (learned, safe)]
        differences = np.concatenate(each[0], axis=1) - np.concatenate(each[1], axis=1)
        decides, pays = differences[:, 0::2], differences[:, 1::2]
        alone = decides.mean(axis=1) + decides.std(axis=1, ddof=1) / math.sqrt(16) <= 0
        total = owed + decides.mean(axis=1)
        error = np.sqrt(variance + decides.var(axis=1, ddof=1) / 16)
        within = np.where(total <= 0, 0, total + error) <= limit
        taken = alone.all(axis=1) | within.all(axis=1)
        assert info.accepted.tolist() == taken.tolist()
        paid = owed + pays.mean(axis=1)
        now = np.where(paid <= 0, 0, variance + pays.var(axis=1, ddof=1) / 16)
        owed = np.where(taken[:, None], np.maximum(paid, 0), owed)
        variance = np.where(taken[:, None], now, variance)
        np.testing.assert_allclose(state.debt.owed.numpy(), owed, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.debt.variance.numpy(), variance, rtol=1e-9, atol=1e-12)
        verdicts |= set(taken.tolist())
    assert verdicts == {True, False}


class PaidByWhatDecided(GuardedRule):
    """The same samples decide and are added: of the steps that pass, those that look better than they are."""

    def _compare(self, oracle: Oracle, candidate: torch.Tensor, safe: torch.Tensor, step: int, debt: Debt) -> Verdict:
        problem, batch = oracle.problem, oracle.draw()
        worse = (problem.sample_losses(candidate, batch) - problem.sample_losses(safe, batch)).double()
        after = debt.after(worse.mean(dim=1), worse.var(dim=1) / worse.shape[1])
        means = problem.losses(candidate, batch), problem.losses(safe, batch)
        return Verdict(after.within(self.settings.margin), *means, after)


@pytest.mark.parametrize(
    ("guard", "kept"),
    [(GuardedRule, True), pytest.param(PaidByWhatDecided, False, id="paid by what decided", marks=pytest.mark.long)],
)
def test_what_a_noisy_run_loses_in_truth_is_within_the_budget_because_other_samples_pay(guard, kept):
    text = "quadratic[n=5,noise=1.0,batch=32]"
    oracle, point = start(text, 16)
    point = 4 * point  # so that what the losses fall by stands out from their noise
    truth = ProblemSpec.parse("quadratic[n=5]").build(ProblemContext(16, 0, dtype=torch.float64))
    rule, fallen = guard(AdversaryRule("ascent"), DSSMG(), GuardSettings(budget=0.02, margin=3.0)), Fallen()
    total = torch.zeros_like(truth.losses(point, None))
    for _, safe, after, info in walk(rule, oracle, point, 400):
        worse = truth.losses(after, None) - truth.losses(safe, None)
        total += worse.where(info.accepted[:, None], 0)
        limit = 0.02 * fallen.after(info.losses)
    spent = (total / limit).amax(dim=1)
    assert (float(spent.mean()) < 1) == kept, spent
    assert (float(spent.max()) < 1.5) == kept, spent


def test_a_rule_that_turns_hostile_finds_no_credit():
    debt = Debt(torch.tensor([[0.5]]), torch.tensor([[0.2]]), torch.tensor([[1.0]]))
    better = debt.after(torch.tensor([[-7.0]]), torch.tensor([[0.1]]))
    assert (better.owed.item(), better.variance.item()) == (0, 0)
    worse = debt.after(torch.tensor([[0.25]]), torch.tensor([[0.05]]))
    assert (worse.owed.item(), worse.variance.item()) == (0.75, 0.25)
    assert [bool(worse.within(margin)) for margin in (0.0, 0.4, 0.6)] == [True, True, False]


def test_half_of_a_batch_must_have_a_spread():
    oracle, first = start("quadratic[n=5,noise=0.5,batch=2]")
    rule = GuardedRule(BOLD, FALLBACK, GuardSettings(budget=1.0))
    with pytest.raises(UserError, match="needs 4 samples or more"):
        rule.step(oracle, first, rule.initial_state(1, 2, ParameterLayout.vector(5)))


def shifted_run(shift, factor=1.0, adversary="ascent", seed=3):
    """Losses at the end of 200 guarded steps of a quadratic, without the constant and the factor put on its losses."""
    oracle, point = start("quadratic[n=6,noise=0.3,batch=16]", 2, seed)
    problem = oracle.problem

    class Moved(Rescaled):
        def sample_losses(self, parameters, batch):
            return factor * problem.sample_losses(parameters, batch) + shift

        def jacobian(self, parameters, batch):
            jacobian, losses = problem.jacobian(parameters, batch)
            return factor * jacobian, factor * losses + shift

    moved = Oracle(Moved(problem), torch.Generator().manual_seed(seed))
    rule = GuardedRule(AdversaryRule(adversary), DSSMG(), GuardSettings())
    state, taken = rule.initial_state(2, 2, ParameterLayout.vector(6)), []
    for _ in range(200):
        point, state, info = rule.step(moved, point, state)
        taken.append(info.accepted)
    return problem.losses(point, problem.sample_batch(torch.Generator().manual_seed(0))), torch.stack(taken)


@pytest.mark.parametrize("adversary", [pytest.param("ascent", marks=pytest.mark.long), "turncoat"])
def test_where_losses_have_their_zero_changes_nothing(adversary):
    plain, taken = shifted_run(0.0, adversary=adversary)
    for shift in (64.0, -3.0):
        there, as_well = shifted_run(shift, adversary=adversary)
        assert torch.equal(taken, as_well)
        torch.testing.assert_close(there, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("exponent", [-100, *(pytest.param(e, marks=pytest.mark.long) for e in (-60, 60)), 80])
def test_the_unit_of_the_losses_changes_nothing(exponent):
    plain, taken = shifted_run(0.0, adversary="drift")
    there, as_well = shifted_run(0.0, 2.0**exponent, adversary="drift")
    assert torch.equal(taken, as_well)
    torch.testing.assert_close(there, plain, rtol=1e-9, atol=0)


def test_a_state_of_an_older_version_goes_on_with_the_budget_that_it_had():
    oracle, point = start("quadratic[n=6]", 2)
    rule = GuardedRule(BOLD, FALLBACK, GuardSettings(budget=5.0))
    _, state, _ = rule.step(oracle, point, rule.initial_state(2, 2, ParameterLayout.vector(6)))
    old = replace(
        state, debt=replace(state.debt, limit=torch.tensor([[10.0, 20.0], [5.0, 1.0]]).double()), descent=None
    )
    _, state, _ = rule.step(oracle, point, old)
    assert state.debt.limit.tolist() == [[20.0, 20.0], [5.0, 5.0]]

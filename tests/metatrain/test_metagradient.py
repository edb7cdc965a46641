"""The meta-gradient against autograd, the written-out sum, finite differences and its own mean."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ml2o_dist.config import EstimatorSettings, GuardSettings, RuleSettings
from ml2o_dist.metatrain.estimators import exact as exact_module
from ml2o_dist.metatrain.estimators import replay as replay_module
from ml2o_dist.metatrain.estimators.base import roll_out
from ml2o_dist.metatrain.estimators.replay import choose
from ml2o_dist.metatrain.meta_loss import meta_loss_kind, step_weights
from ml2o_dist.metatrain.recorder import TrajectoryRecorder
from ml2o_dist.problems import ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.rules.aggregated import AggregatedRule
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.guarded import GuardedRule
from ml2o_dist.runtime.errors import UserError
from tests.crossed import crossed
from tests.metatrain.oracles import DOUBLE, WrittenOut, first_order, problem_for, random_rule

HORIZON = 7
NETWORK = "multidigits[net=mlp,hidden=3,activation=tanh,size=6,batch=4]"


def rolled(rule, problem, horizon=HORIZON, chosen="all", seed=11):
    """A rollout with every coordinate kept, its starting point and its batches."""
    start = problem.initial_parameters(list(range(problem.instances)))
    source = torch.Generator().manual_seed(seed)
    batches = [problem.sample_batch(source) for _ in range(horizon + 1)]
    if isinstance(chosen, str):
        chosen = torch.arange(problem.dimension).expand(problem.instances, -1)
    rollout = roll_out(rule, Oracle(problem, torch.Generator().manual_seed(seed)), start, horizon, chosen)
    return rollout, start, batches


def replay(rule, *words):
    """L, and its gradient in the order of the network's parameters."""
    loss, gradient = replay_module.replay(rule, *words)
    assert list(gradient) == [name for name, _ in rule.network.named_parameters()]
    return loss, list(gradient.values())


def exact(*words):
    loss, gradient, losses = exact_module.exact(*words)
    return loss, list(gradient.values()), losses


def assert_close(ours, theirs, tolerance=1e-10):
    scale = max(t.abs().max().item() for t in theirs)
    assert scale > 0
    for left, right in zip(ours, theirs, strict=True):
        assert (left - right).abs().max().item() <= tolerance * scale


@crossed(
    "form, objectives, instances",
    itertools.product(
        ["tied", "per_objective"], ["residual", "controlled", "scaled"], ["adam", "alignment", "log_sign"]
    ),
    [1, 2, 3],
    [1, 4],
)
def test_replay_is_first_order_backpropagation(objectives, instances, form):
    tied, output, features = form
    settings = RuleSettings(
        objectives=tied,
        output=output,
        features=features,
        count=objectives,
        hidden=4,
        lr=0.1,
        scale=0.1,
        warmup=1.5 if output == "controlled" else 0.0,
    )
    rule, problem = random_rule(settings), problem_for(objectives, instances)
    rollout, start, batches = rolled(rule, problem)
    estimator = EstimatorSettings(gamma=1.0)
    kind = meta_loss_kind(estimator, problem)
    loss, gradient = replay(rule, rollout, estimator, kind, HORIZON, problem.minima)
    weights = step_weights("linear", HORIZON, start)
    expected_loss, expected = first_order(rule.network, problem, start, batches, weights)
    assert abs(loss.item() - expected_loss.item()) < 1e-10
    assert_close(gradient, expected)


class Deaf(Rescaled):
    """Every other coordinate changes nothing."""

    def sample_losses(self, parameters, batch):
        return super().sample_losses(self._heard(parameters), batch)

    def jacobian(self, parameters, batch):
        jacobian, losses = super().jacobian(self._heard(parameters), batch)
        return self._heard(jacobian), losses

    def _heard(self, values):
        return values * (torch.arange(values.shape[-1]) % 2)


@pytest.mark.parametrize("output", ["residual", "controlled", "scaled"])
@pytest.mark.parametrize("features", ["adam", "log_sign"])
def test_so_it_is_where_coordinates_have_no_gradient(output, features):
    problem = Deaf(problem_for(2, 3, dimension=8))
    rule = random_rule(RuleSettings(output=output, features=features, hidden=4, lr=0.1, scale=0.1))
    rollout, start, batches = rolled(rule, problem)
    assert (rollout.gradients == 0).all(dim=2).double().mean() == 0.5
    _, gradient = replay(rule, rollout, EstimatorSettings(gamma=1.0), "normalised", HORIZON, None)
    _, expected = first_order(rule.network, problem, start, batches, step_weights("linear", HORIZON, start))
    assert_close(gradient, expected)
    _, whole, losses = exact(rule, problem, start, batches, EstimatorSettings(meta_loss="normalised"))
    torch.testing.assert_close(losses, rollout.losses)
    assert all(bool(each.isfinite().all()) for each in whole)


@pytest.mark.parametrize("features", ["adam", "alignment", "log_sign"])
def test_gradients_of_any_unit_have_the_same_meta_gradient(features):
    """Powers of two beyond what is taken as it is: what the network saw is what it is differentiated by."""
    settings = RuleSettings(features=features, output="controlled", hidden=4, lr=0.1)
    found = []
    for exponent in (30, 60):  # so large that the meta-loss's own floor does not count
        rule, problem = random_rule(settings), Rescaled(problem_for(2, 3), loss_scale=2.0**exponent)
        rollout, start, batches = rolled(rule, problem)
        assert rollout.record["unit"][-1].gt(0).all()
        assert rollout.record["unit"][-1].lt(2.0**-20).all()
        _, replayed = replay(rule, rollout, EstimatorSettings(gamma=1.0), "normalised", HORIZON, None)
        _, whole, losses = exact(rule, problem, start, batches, EstimatorSettings(meta_loss="normalised"))
        torch.testing.assert_close(losses, rollout.losses, rtol=1e-12, atol=0)
        found.append([*replayed, *whole])
    assert_close(*found, tolerance=1e-8)


@pytest.mark.parametrize("form", ["adam", "alignment"])
@pytest.mark.parametrize("objectives", [2, 3])
def test_replay_of_a_guarded_rollout_is_first_order_backpropagation_through_its_accepted_steps(form, objectives):
    settings = RuleSettings(features=form, output="controlled", hidden=4, lr=0.5)
    rule, problem = random_rule(settings), problem_for(objectives, 6)
    fallback = AggregatedRule("mean", "sgd", 0.1)
    guard = GuardedRule(rule, fallback, GuardSettings(budget=0.0, margin=0, eps=0.5))
    oracle, drawn = Oracle(problem, torch.Generator().manual_seed(11)), []
    draw = oracle.draw
    oracle.draw = lambda: drawn.append(draw()) or drawn[-1]
    start = problem.initial_parameters(list(range(6)))
    every = torch.arange(problem.dimension).expand(6, -1)
    rollout = roll_out(guard, oracle, start, HORIZON, every)
    assert 0.1 < rollout.accepted.mean() < 0.9
    _, gradient = replay(rule, rollout, EstimatorSettings(gamma=1.0), "normalised", 0, problem.minima)
    written, point, total = WrittenOut(rule.network), start, 0.0
    initial = problem.losses(start, drawn[0]).detach()
    for step, weight in enumerate(step_weights("linear", HORIZON, start)):
        jacobian, _ = problem.jacobian(point.detach(), drawn[2 * step])
        safe = -0.1 * jacobian.mean(dim=1)
        update = torch.where(rollout.accepted[step][:, None] > 0, written.update(jacobian), safe)
        written.last = (jacobian.sum(dim=1), update.detach())
        point = point + update
        losses = problem.losses(point, drawn[2 * step + 2])
        torch.testing.assert_close(losses.detach(), rollout.losses[step + 1])
        total = total + weight * (losses / (initial.abs() + 1e-8)).mean()
    assert_close(gradient, torch.autograd.grad(total, list(rule.network.parameters())))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["uniform", "linear", "quadratic"])
def test_discounted_replay_is_the_written_out_sum(gamma, kind):
    rule, problem = random_rule(RuleSettings(hidden=4, lr=0.1)), problem_for(2, 3)
    rollout, _, _ = rolled(rule, problem)
    estimator = EstimatorSettings(gamma=gamma, step_weights=kind, meta_loss="normalised")
    _, gradient = replay(rule, rollout, estimator, "normalised", 0, None)
    raw = torch.arange(1, HORIZON + 1, dtype=DOUBLE) ** {"uniform": 0, "linear": 1, "quadratic": 2}[kind]
    weights = raw / raw.sum()
    written, total = WrittenOut(rule.network), 0.0
    for s in range(HORIZON):
        update = written.update(rollout.gradients[s])
        answer = torch.zeros_like(update)
        for t in range(s + 1, HORIZON + 1):
            slope = 1 / (2 * (rollout.losses[0].abs() + 1e-8))
            loss_gradient = (rollout.gradients[t] * slope[:, :, None]).sum(dim=1) / problem.instances
            answer = answer + gamma ** (t - s - 1) * weights[t - 1] * loss_gradient
        total = total + (answer * update).sum()
    assert_close(gradient, torch.autograd.grad(total, list(rule.network.parameters())))


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("unroll", [2, 3, 7, 20])
def test_chunks_cut_the_lstm_and_truncation_cuts_the_answers(unroll, truncated):
    rule, problem = random_rule(RuleSettings(hidden=4, lr=0.1)), problem_for(2, 2)
    rollout, _, _ = rolled(rule, problem)
    estimator = EstimatorSettings(gamma=0.9, truncated=truncated, meta_loss="normalised")
    _, gradient = replay(rule, rollout, estimator, "normalised", unroll, None)
    weights = torch.arange(1, HORIZON + 1, dtype=DOUBLE) / 28
    written, total = WrittenOut(rule.network), 0.0
    for s in range(HORIZON):
        if s % unroll == 0:
            written.detach()
        update = written.update(rollout.gradients[s])
        last = min(HORIZON, (s // unroll + 1) * unroll) if truncated else HORIZON
        for t in range(s + 1, last + 1):
            slope = 1 / (2 * (rollout.losses[0].abs() + 1e-8))
            answer = (rollout.gradients[t] * slope[:, :, None]).sum(dim=1) / problem.instances
            total = total + 0.9 ** (t - s - 1) * weights[t - 1] * (answer * update).sum()
    assert_close(gradient, torch.autograd.grad(total, list(rule.network.parameters())))


def test_replay_does_not_depend_on_its_block_size(monkeypatch):
    rule, problem = random_rule(RuleSettings(hidden=4, lr=0.1)), problem_for(3, 4)
    rollout, _, _ = rolled(rule, problem)
    _, whole = replay(rule, rollout, EstimatorSettings(), "normalised", 0, None)
    monkeypatch.setattr("ml2o_dist.rules.coordinatewise.replay.REPLAY_BLOCK", 6 * 4)
    _, blocked = replay(rule, rollout, EstimatorSettings(), "normalised", 0, None)
    assert_close(blocked, whole, 1e-12)


def test_subsampled_replay_is_unbiased():
    """|mean over N draws - full|^2 has expectation tr(Cov) / N; at most twice that, before any clipping."""
    rule = random_rule(RuleSettings(features="alignment", hidden=4, lr=0.1))
    problem = problem_for(2, 2, dimension=10)
    rollout, _, _ = rolled(rule, problem)
    estimator = EstimatorSettings(gamma=0.95, meta_loss="normalised")

    def flat(part):
        return torch.cat([g.flatten() for g in replay(rule, part, estimator, "normalised", 0, None)[1]])

    full, draws, count = flat(rollout), [], 400
    for seed in range(count):
        index = choose(problem, 0.3, seed)
        assert index.shape == (2, 3)
        kept = rollout.gradients.gather(3, index[None, :, None].expand(HORIZON + 1, -1, 2, -1))
        draws.append(flat(replace(rollout, gradients=kept, scale=10 / 3)))
    stacked = torch.stack(draws)
    variance = stacked.var(dim=0).sum()
    assert variance > 0
    assert (stacked.mean(dim=0) - full).square().sum() <= 2 * variance / count


def test_roll_out_keeps_the_chosen_coordinates_in_their_order():
    rule, problem = random_rule(RuleSettings(hidden=4)), problem_for(2, 2)
    everything, _, _ = rolled(rule, problem)
    chosen = torch.tensor([[0, 3], [1, 4]])
    some, _, _ = rolled(rule, problem, chosen=chosen)
    assert torch.equal(some.losses, everything.losses)
    for p in range(2):
        assert torch.equal(some.gradients[:, p], everything.gradients[:, p][:, :, chosen[p]])
    assert some.scale == 2.5


RULES = [(output, features) for output in ("residual", "scaled", "controlled") for features in ("adam", "alignment")]


@pytest.mark.parametrize(
    ("output", "features", "problem"),
    [
        *[(*rule, "quadratic[m=2,n=4,noise=0.3,batch=3]") for rule in RULES],
        *[
            pytest.param(*rule, problem, marks=pytest.mark.long)
            for rule in RULES[:-1]
            for problem in ("fonseca[n=3]", NETWORK)
        ],
        *[(*RULES[-1], problem) for problem in ("fonseca[n=3]", NETWORK)],
    ],
)
def test_exact_agrees_with_finite_differences(output, features, problem):
    built = ProblemSpec.parse(problem).build(ProblemContext(2, 1, dtype=DOUBLE))
    settings = RuleSettings(output=output, features=features, hidden=3, lr=0.05, scale=0.05)
    rule = random_rule(settings)
    _, start, batches = rolled(rule, built)
    estimator = EstimatorSettings(kind="exact")
    loss, gradient, losses = exact(rule, built, start, batches, estimator)
    assert losses.shape == (HORIZON + 1, 2, 2)
    step = 1e-5
    for index, parameter in enumerate(rule.network.parameters()):  # along a direction that has all of its entries
        before, tensor = parameter.detach().clone(), parameter.detach()
        direction = torch.randn(before.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(index))
        ends = []
        for sign in (1, -1):
            tensor.copy_(before + sign * step * direction)
            ends.append(exact(rule, built, start, batches, estimator)[0].item())
        tensor.copy_(before)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (gradient[index] * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-8)
    assert loss.item() == pytest.approx(exact(rule, built, start, batches, estimator)[0].item(), abs=1e-14)


@crossed(
    "meta_loss, form, steps",
    ["log_sum", "normalised"],
    [("controlled", "alignment"), ("residual", "adam"), ("scaled", "log_sign")],
    [1, 2, 3, 5],
)
def test_exact_does_not_depend_on_its_stretches(monkeypatch, form, meta_loss, steps):
    output, features = form
    rule, problem = random_rule(RuleSettings(output=output, features=features, hidden=3, lr=0.1)), problem_for(3, 2)
    _, start, batches = rolled(rule, problem)
    estimator, recorders = EstimatorSettings(meta_loss=meta_loss), [TrajectoryRecorder(), TrajectoryRecorder()]
    loss, whole, losses = exact(rule, problem, start, batches, estimator, recorders[0])
    monkeypatch.setattr("ml2o_dist.metatrain.estimators.exact.STEPS", steps)
    again, stretched, same = exact(rule, problem, start, batches, estimator, recorders[1])
    assert torch.equal(same, losses)
    assert again.item() == pytest.approx(loss.item(), rel=1e-14)
    assert_close(stretched, whole, 1e-12)
    for left, right in zip(*(vars(each.trajectory()).values() for each in recorders), strict=True):
        assert np.array_equal(left, right)


def test_exact_differs_from_first_order_where_curvature_counts():
    rule, problem = random_rule(RuleSettings(hidden=3, lr=0.1)), problem_for(2, 1)
    rollout, start, batches = rolled(rule, problem)
    estimator = EstimatorSettings(gamma=1.0)
    _, second, losses = exact(rule, problem, start, batches, estimator)
    kind = meta_loss_kind(estimator, problem)
    _, first = replay(rule, rollout, estimator, kind, 0, problem.minima)
    assert torch.allclose(losses, rollout.losses, rtol=1e-12, atol=1e-12)
    gap = max((a - b).abs().max().item() for a, b in zip(second, first, strict=True))
    assert gap > 1e-4 * max(a.abs().max().item() for a in second)


def test_log_gap_needs_minima():
    problem = ProblemSpec.parse("zdt3").build(ProblemContext())
    if problem.minima is not None:
        problem.minima = None
    with pytest.raises(UserError, match="log_gap needs known minima"):
        meta_loss_kind(EstimatorSettings(meta_loss="log_gap"), problem)

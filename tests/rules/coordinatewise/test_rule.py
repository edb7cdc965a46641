"""The ML2O rule against torch's Adam and a written-out network; shapes, scales, purity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ml2o_dist.config import RuleSettings
from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
from ml2o_dist.runtime.errors import UserError
from tests.crossed import crossed
from tests.metatrain.oracles import DOUBLE, WrittenOut, problem_for, random_rule

FORMS = list(
    itertools.product(
        ["tied", "per_objective"], ["residual", "controlled", "scaled"], ["adam", "alignment", "log_sign"]
    )
)


@crossed("form, shape", FORMS, [(1, 1, 1), (1, 2, 7), (4, 3, 5), (2, 5, 1)])
def test_the_blockwise_rule_equals_the_written_out_network(form, shape, monkeypatch):
    instances, objectives, dimension = shape
    monkeypatch.setattr("ml2o_dist.rules.coordinatewise.rule.BLOCK", 3 * 4)
    tied, output, features = form
    warmup = 1.5 if output == "controlled" else 0.0
    rule = random_rule(
        RuleSettings(objectives=tied, output=output, features=features, count=objectives, hidden=4, warmup=warmup)
    )
    written, state = (
        WrittenOut(rule.network),
        rule.initial_state(instances, objectives, ParameterLayout.vector(dimension)),
    )
    draws = torch.Generator().manual_seed(1)
    for step in range(5):
        jacobian = torch.randn(instances, objectives, dimension, dtype=DOUBLE, generator=draws)
        jacobian *= 10.0 ** (-6 * step)
        jacobian[..., 1::4] *= step > 1  # whose gradient comes late
        jacobian[..., 2::4] *= step < 2  # whose gradient ends
        update, state = rule.update(jacobian, state)
        expected = written.update(jacobian).detach()
        assert update.shape == (instances, dimension)
        assert torch.allclose(update, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("objectives", [1, 2, 5])
@pytest.mark.parametrize("output", ["residual", "controlled"])
def test_untrained_and_uncontrolled_these_forms_are_adam_on_the_sum(output, objectives):
    problem = problem_for(objectives, 2)
    settings = RuleSettings(output=output, lr=0.03)
    weights = ML2ONetwork(settings).state_dict() | ({"control": torch.zeros(2)} if output == "controlled" else {})
    rule = ML2ORule.from_weights(settings, weights, dtype=DOUBLE)
    point = problem.initial_parameters([1, 2])
    theirs = point.clone().requires_grad_(True)
    adam = torch.optim.Adam([theirs], lr=0.03, eps=1e-300)  # ours has none
    oracle, source = Oracle(problem, torch.Generator().manual_seed(3)), torch.Generator().manual_seed(3)
    state = rule.initial_state(2, objectives, problem.layout)
    for _ in range(20):
        point, state, _ = rule.step(oracle, point, state)
        adam.zero_grad()
        problem.losses(theirs, problem.sample_batch(source)).sum().backward()
        adam.step()
    assert torch.allclose(point, theirs.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_the_untrained_controller_mends_a_wrong_step_size(factor):
    problem, right = problem_for(2, 2), 0.05
    ends = {}
    for output in ("residual", "controlled"):
        rule = ML2ORule.from_weights(RuleSettings(output=output, lr=factor * right), None, dtype=DOUBLE)
        point, state = problem.initial_parameters([1, 2]), rule.initial_state(2, 2, problem.layout)
        oracle = Oracle(problem, torch.Generator().manual_seed(3))
        losses = []
        for _ in range(150):
            point, state, info = rule.step(oracle, point, state)
            losses.append(info.losses.sum())
        ends[output] = float(torch.stack(losses[-15:]).mean())
    assert ends["controlled"] < ends["residual"]


@pytest.mark.parametrize("warmup", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("instances", "objectives", "dimension"), [(1, 1, 1), (3, 2, 5)])
def test_a_warm_up_shortens_the_steps_by_a_known_factor_that_it_forgets(warmup, instances, objectives, dimension):
    updates: dict[float, list[torch.Tensor]] = {}
    for own in (0.0, warmup):
        settings = RuleSettings(output="controlled", hidden=4, warmup=own)
        weights = random_rule(settings).network.state_dict() | {"control": torch.zeros(2, dtype=DOUBLE)}
        rule = ML2ORule.from_weights(settings, weights, dtype=DOUBLE)
        draws, state = (
            torch.Generator().manual_seed(1),
            rule.initial_state(instances, objectives, ParameterLayout.vector(dimension)),
        )
        updates[own] = []
        for _ in range(60):
            jacobian = torch.randn(instances, objectives, dimension, dtype=DOUBLE, generator=draws)
            update, state = rule.update(jacobian, state)
            updates[own].append(update)
    shares = [float((a / b).mean()) for a, b in zip(updates[warmup], updates[0.0], strict=True)]
    assert shares == pytest.approx([math.exp(-warmup * 0.9**step) for step in range(60)], rel=1e-9)
    assert shares[-1] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("scale", [1e-5, 1e5])
@pytest.mark.parametrize("features", ["adam", "alignment"])
def test_these_features_do_not_see_the_scale_of_the_gradients(features, scale):
    rule = random_rule(RuleSettings(features=features, hidden=4))
    jacobian = torch.randn(1, 2, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(4))
    plain, _ = rule.update(jacobian, rule.initial_state(1, 2, ParameterLayout.vector(6)))
    scaled, _ = rule.update(scale * jacobian, rule.initial_state(1, 2, ParameterLayout.vector(6)))
    assert torch.allclose(plain, scaled, rtol=1e-2)


def test_a_tied_network_ignores_the_order_of_the_objectives_and_a_per_objective_one_does_not():
    jacobian = torch.randn(2, 3, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    for kind, same in (("tied", True), ("per_objective", False)):
        rule = random_rule(RuleSettings(objectives=kind, count=3, hidden=4))
        one, _ = rule.update(jacobian, rule.initial_state(2, 3, ParameterLayout.vector(6)))
        other, _ = rule.update(jacobian.flip(1), rule.initial_state(2, 3, ParameterLayout.vector(6)))
        assert torch.allclose(one, other, rtol=1e-9) is same


def test_a_step_changes_no_argument_and_repeats_exactly():
    problem, rule = problem_for(2, 2), random_rule(RuleSettings(hidden=4))
    start = problem.initial_parameters([1, 2])
    kept, state = start.clone(), rule.initial_state(2, 2, problem.layout)
    one, after, _ = rule.step(Oracle(problem, torch.Generator().manual_seed(0)), start, state)
    again, _, _ = rule.step(Oracle(problem, torch.Generator().manual_seed(0)), start, state)
    assert torch.equal(one, again)
    assert torch.equal(start, kept)
    assert state.step == 0
    assert all(float(h.abs().sum() + c.abs().sum()) == 0 for block in state.blocks for h, c in block.cells)
    assert after.step == 1


def test_the_oracle_charges_a_step_one_forward_and_m_backwards():
    problem, rule = problem_for(3, 2), random_rule(RuleSettings(hidden=4))
    oracle = Oracle(problem, torch.Generator().manual_seed(0))
    rule.step(oracle, problem.initial_parameters([1, 2]), rule.initial_state(2, 3, problem.layout))
    assert (oracle.batches, oracle.forwards, oracle.backwards) == (1, 1, 3)


def test_steps_stay_in_the_box_of_a_bounded_problem():
    problem = ProblemSpec.parse("zdt1[n=5]").build(ProblemContext(3, dtype=DOUBLE))
    rule = random_rule(RuleSettings(hidden=4, lr=5.0))
    oracle, point = Oracle(problem, torch.Generator()), problem.initial_parameters([1, 2, 3])
    state = rule.initial_state(3, 2, ParameterLayout.vector(5))
    for _ in range(5):
        point, state, _ = rule.step(oracle, point, state)
        assert bool(((point >= 0) & (point <= 1)).all())
    assert bool(((point == 0) | (point == 1)).any())


@pytest.mark.parametrize("form", FORMS)
def test_a_coordinate_without_gradient_does_not_move(form):
    tied, output, features = form
    settings = RuleSettings(objectives=tied, output=output, features=features, count=2, hidden=4)
    rule, draws = random_rule(settings), torch.Generator().manual_seed(1)
    state, updates = rule.initial_state(3, 2, ParameterLayout.vector(4)), []
    for step in range(20):
        jacobian = torch.randn(3, 2, 4, dtype=DOUBLE, generator=draws)
        jacobian[..., 0] = 0
        jacobian[..., 1] *= step >= 10
        jacobian[0, 0] = 0  # the other objective has some
        update, state = rule.update(jacobian, state)
        updates.append(update)
    moved = torch.stack(updates).abs()
    assert moved[..., 0].max() == 0
    assert moved[:10, :, 1].max() == 0
    assert moved[10:, :, 1].min() > 0
    assert moved[..., 2:].min() > 0


def test_initial_weights_are_a_function_of_the_shape_and_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    one, two = ML2ONetwork(RuleSettings()).state_dict(), ML2ONetwork(RuleSettings()).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = ML2ONetwork(RuleSettings(lr=0.02)).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["specific.0.weight_ih_l0"].abs().sum() > 0


def test_per_objective_refuses_another_number_of_objectives():
    rule = random_rule(RuleSettings(objectives="per_objective", count=2, hidden=4))
    with pytest.raises(UserError, match=r"rule\.num_objectives=2.*problem has 3"):
        rule.initial_state(1, 3, ParameterLayout.vector(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    rule = random_rule(RuleSettings(hidden=4))
    jacobian = torch.randn(2, 3, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    there = ML2ORule.from_weights(rule.network.settings, rule.network.state_dict(), "cuda", DOUBLE)
    here, _ = rule.update(jacobian, rule.initial_state(2, 3, ParameterLayout.vector(6)))
    far, _ = there.update(jacobian.to("cuda"), there.initial_state(2, 3, ParameterLayout.vector(6)))
    assert torch.allclose(here, far.cpu(), rtol=1e-9, atol=1e-12)


def test_alignment_tells_short_steps_from_overshooting_ones():
    """f = |z|^2 / 2: a step of length t along -z keeps 1 - t of the promise, whatever the scale."""
    problem = ProblemSpec.parse("quadratic[m=1,n=1,condition=1]").build(ProblemContext(1, dtype=DOUBLE))
    for length in (0.1, 0.5, 1.0, 1.5):
        from ml2o_dist.rules.coordinatewise.features import initial_alignment, judge, remember

        point = problem.initial_parameters([3])
        before, _ = problem.jacobian(point, None)
        update = -length * before[:, 0] / problem.jacobian(point + 1, None)[0].sub(before)[:, 0]
        after, _ = problem.jacobian(point + update, None)
        alignment = judge(remember(initial_alignment(point), before[:, 0], update), after[:, 0])
        assert alignment.value.item() == pytest.approx(1 - length, abs=1e-9)
        upwards = judge(remember(initial_alignment(point), before[:, 0], -update), after[:, 0])
        assert upwards.value.item() == 0.0

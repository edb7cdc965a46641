"""The controller of the step's size: it recovers from any state of its memory; the gradients' scale does not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ml2o_dist import ML2O, load_artifact
from ml2o_dist.config import RuleSettings
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.coordinatewise.features import initial_alignment, judge, remember
from ml2o_dist.rules.coordinatewise.rule import LARGEST, SMALLEST, ML2ORule, ML2OState

SHIPPED = load_artifact("pretrained")
LENGTHS = torch.linspace(1.0, 30.0, 10)  # curvatures of a quadratic


def shipped(dtype: torch.dtype = torch.float32) -> ML2ORule:
    return ML2ORule.from_weights(SHIPPED.rule, SHIPPED.weights, dtype=dtype)


def descend(
    rule: ML2ORule, point: Tensor, state: ML2OState, steps: int, factor: float = 1.0
) -> tuple[Tensor, ML2OState, list[float]]:
    """Take noise-free steps on f(z) = sum_i c_i z_i^2 / 2 in two equal parts, times `factor`."""
    losses = []
    for _ in range(steps):
        gradient = factor * LENGTHS.to(point) * point / 2
        losses.append(float((LENGTHS.to(point) * point.square()).sum() / 2))
        update, state = rule.update(torch.stack([gradient, gradient])[None], state)
        point = point + update[0]
    return point, state, losses


def begun(dtype: torch.dtype = torch.float32) -> tuple[ML2ORule, Tensor, ML2OState]:
    rule = shipped(dtype)
    point = torch.ones(10, dtype=dtype)
    return rule, point, rule.initial_state(1, 2, ParameterLayout.vector(10))


def shift(rule: ML2ORule, state: ML2OState) -> float:
    return float(rule.network.shift(state.alignment.total, state.step).detach())


def test_full_batches_never_bring_it_to_a_standstill() -> None:
    rule, point, state = begun()
    for _ in range(20):
        before = point
        point, state, losses = descend(rule, point, state, 50)
        assert float((point - before).norm()) > 0
        assert SMALLEST <= shift(rule, state) <= LARGEST
    assert sum(losses) / 50 < 1e-2 * float(LENGTHS.sum() / 2)


@pytest.mark.parametrize(
    "memory",
    [
        {"total": -2743.0},  # log size -543, as old steps had brought it to
        pytest.param({"total": 2743.0}, marks=pytest.mark.long),
        {"kept": 1e30, "promised": -1e30},
        pytest.param({"kept": -1e30, "promised": -1e30}, marks=pytest.mark.long),
        pytest.param({"kept": 1e-45, "promised": -1e-45, "total": -2743.0, "promise": 0.0}, marks=pytest.mark.long),
        pytest.param({"promised": 1e30}, marks=pytest.mark.long),
        {"total": -1e30, "kept": 1e30, "promised": -1e-30},
    ],
)
def test_it_recovers_from_any_memory(memory: dict[str, float]) -> None:
    rule, point, state = begun()
    _, state, _ = descend(rule, point, state, 20)
    changed = {name: torch.full((1,), value) for name, value in memory.items()}
    state = replace(state, alignment=state.alignment._replace(**changed))
    point, state, losses = descend(rule, point, state, 700)
    assert SMALLEST < shift(rule, state) < LARGEST
    assert sum(losses[-50:]) / 50 < 0.1 * float(LENGTHS.sum() / 2)


def test_one_gradient_that_was_far_too_large_does_not_rule_for_long() -> None:
    rule, point, state = begun()
    point, state, _ = descend(rule, point, state, 30)
    before = shift(rule, state)
    _, state, _ = descend(rule, point, state, 1, factor=-1e6)
    point, state, _ = descend(rule, point, state, 30)
    assert abs(shift(rule, state) - before) < 4


def test_the_memory_is_of_directions_and_fades_with_the_steps_size() -> None:
    """Old steps, 1e6 times as long, and overshooting, are outweighed by five short ones that keep their promise."""
    draws = torch.Generator().manual_seed(0)
    alignment = initial_alignment(torch.zeros(1, 5))
    gradient = torch.randn(1, 5, generator=draws)
    for _ in range(50):
        alignment = judge(remember(alignment, gradient, -1e6 * gradient), -2 * gradient, 0.2)
    assert alignment.value.item() == -1
    for _ in range(5):
        alignment = judge(remember(alignment, gradient, -gradient), gradient, 0.2)
    assert alignment.value.item() > 0


def test_where_nothing_moves_nothing_is_learned() -> None:
    rule, point, state = begun()
    point, state, _ = descend(rule, point, state, 30)
    total = state.alignment.total.clone()
    still = torch.zeros(1, 10)
    gradient = (LENGTHS * point / 2).expand(1, 2, 10)
    for _ in range(200):
        _, state = rule.update(gradient, state)
        alignment = remember(state.alignment, gradient.sum(dim=1), still)
        state = replace(state, alignment=alignment)
    assert state.alignment.value.item() == 0
    assert float((state.alignment.total - total).abs()) <= 1  # of the step before the first that did not move


@pytest.mark.parametrize("exponent", [-100, -90, -40, -26, -13, 13, 26, 40, 80])
@pytest.mark.parametrize("features", ["adam", "alignment"])
@pytest.mark.parametrize("output", ["residual", "controlled"])
def test_a_power_of_two_on_all_gradients_changes_no_bit(exponent: int, features: str, output: str) -> None:
    settings = RuleSettings(features=features, output=output, hidden=4)
    draws = torch.Generator().manual_seed(2)
    rule = ML2ORule.from_weights(settings, None)
    rules = []
    for factor in (1.0, 2.0**exponent):
        draws.manual_seed(2)
        state, updates = rule.initial_state(3, 2, ParameterLayout.vector(7)), []
        for step in range(12):
            jacobian = torch.randn(3, 2, 7, generator=draws)
            jacobian[:, :, 0] *= 1e-6
            jacobian[0] *= step > 2  # an instance whose first gradients are 0
            update, state = rule.update(factor * jacobian, state)
            updates.append(update)
        rules.append(torch.stack(updates))
    assert torch.equal(*rules)
    assert rules[0][1:].abs().amin(dim=(0, 2))[1:].gt(0).all()


def test_gradients_that_grow_by_many_orders_are_taken_in_another_unit() -> None:
    rule, point, state = begun()
    point, state, _ = descend(rule, point, state, 3, factor=1e-30)
    before = float((LENGTHS * point.square()).sum() / 2)
    point, state, losses = descend(rule, point, state, 400, factor=1.0)
    assert losses[-1] < 0.1 * before
    point, state, losses = descend(rule, point, state, 400, factor=1e25)
    assert torch.isfinite(point).all()
    assert state.unit.item() < 2.0**-70


@pytest.mark.parametrize("factors", [(1e-30, 1e10), (1e-38, 10.0), (1.0, 1e-40), (1.0, 1e-45), (1e-20, 1e-38, 1e20)])
def test_gradients_that_jump_by_any_factor_leave_the_parameters_finite(factors: tuple[float, ...]) -> None:
    rule, point, state = begun()
    for factor in (*factors, 0.0, *factors, 1.0):
        point, state, _ = descend(rule, point, state, 3, factor=factor)
        assert torch.isfinite(point).all()
        assert all(bool(torch.isfinite(each).all()) for each in state.alignment)


@pytest.mark.parametrize(
    "factor", [1e-30, *(pytest.param(factor, marks=pytest.mark.long) for factor in (1e-14, 1e-8, 1.0, 1e12)), 1e25]
)
def test_a_factor_on_all_losses_changes_nothing_in_a_users_loop(factor: float) -> None:
    def end(factor: float) -> float:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        inputs = torch.randn(128, 6)
        targets = torch.stack([inputs.sum(dim=1), inputs[:, 0] * inputs[:, 1]], dim=1)
        optimizer = ML2O(model.parameters())
        for step in range(60):
            part = slice(32 * (step % 4), 32 * (step % 4) + 32)
            optimizer.step(
                lambda part=part: [factor * f for f in ((model(inputs[part]) - targets[part]) ** 2).unbind(1)]
            )
        return float(((model(inputs) - targets) ** 2).mean(dim=0).sum().detach())

    assert end(factor) == pytest.approx(end(1.0), rel=1e-3)

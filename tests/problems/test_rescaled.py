"""A rescaled problem is the same problem in other units."""

from __future__ import annotations

import pytest
import torch

from ml2o_dist.config import RuleSettings
from ml2o_dist.problems import ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from tests.problems.contract import check_problem

DOUBLE = torch.float64


def built(text, instances=2):
    return ProblemSpec.parse(text).build(ProblemContext(instances, dtype=DOUBLE))


@pytest.mark.parametrize("scales", [(0.3,), (4.0,), (1.0, 1000.0), (0.5, 0.01)])
@pytest.mark.parametrize("text", ["quadratic[m=3,n=4,noise=0.2]", "zdt1[n=5]", "fonseca"])
def test_it_keeps_the_contract(text, scales):
    check_problem(Rescaled(built(text), *scales))


@pytest.mark.parametrize(
    ("text", "units"),
    [("quadratic[m=3,n=4,noise=0.2]", [0.1, 1.0, 30.0]), ("zdt1[n=5]", [0.1, 3.0]), ("fonseca", [5.0, 0.01])],
)
def test_so_it_does_with_units_for_each_objective(text, units):
    check_problem(Rescaled(built(text), 2.0, units))


def test_losses_agree_and_gradients_are_scaled():
    plain, other = built("quadratic[noise=0.2]"), Rescaled(built("quadratic[noise=0.2]"), 4.0)
    start = other.initial_parameters([1, 2])
    batch = other.sample_batch(torch.Generator().manual_seed(0))
    ours, losses = other.jacobian(start, batch)
    theirs, expected = plain.jacobian(4 * start, batch)
    assert torch.equal(4 * start, plain.initial_parameters([1, 2]))
    assert torch.equal(losses, expected)
    assert torch.allclose(ours, 4 * theirs)


def test_losses_in_other_units_are_a_multiple():
    plain, other = built("quadratic[noise=0.2]"), Rescaled(built("quadratic[noise=0.2]"), 4.0, 1000.0)
    start, batch = other.initial_parameters([1, 2]), other.sample_batch(torch.Generator().manual_seed(0))
    ours, losses = other.jacobian(start, batch)
    theirs, expected = plain.jacobian(4 * start, batch)
    torch.testing.assert_close(losses, 1000 * expected)
    torch.testing.assert_close(other.sample_losses(start, batch), 1000 * plain.sample_losses(4 * start, batch))
    torch.testing.assert_close(ours, 4000 * theirs)


def test_each_objective_has_units_of_its_own():
    text, units = "quadratic[m=3,noise=0.2]", torch.tensor([0.01, 1.0, 50.0], dtype=DOUBLE)
    plain, other = built(text), Rescaled(built(text), 4.0, units.tolist())
    start, batch = other.initial_parameters([1, 2]), other.sample_batch(torch.Generator().manual_seed(0))
    ours, losses = other.jacobian(start, batch)
    theirs, expected = plain.jacobian(4 * start, batch)
    torch.testing.assert_close(losses, units * expected)
    torch.testing.assert_close(ours, 4 * units[:, None] * theirs)
    torch.testing.assert_close(other.pareto_front(5), units * plain.pareto_front(5))


def test_for_a_rule_that_ignores_the_gradients_scale_it_multiplies_the_step():
    """Adam-like steps with lr on F(cz) are steps with c lr on F."""
    ends = []
    for problem, lr, back in ((built("quadratic"), 0.04, 1.0), (Rescaled(built("quadratic"), 4.0), 0.01, 4.0)):
        rule = ML2ORule.from_weights(RuleSettings(lr=lr), None, dtype=DOUBLE)
        oracle, point = Oracle(problem, torch.Generator()), problem.initial_parameters([1, 2])
        state = rule.initial_state(2, 2, problem.layout)
        for _ in range(10):
            point, state, _ = rule.step(oracle, point, state)
        ends.append(back * point)
    assert torch.allclose(ends[0], ends[1], rtol=1e-6)

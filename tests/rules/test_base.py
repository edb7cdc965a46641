"""The oracle: what it returns and what it charges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.rules.base import Oracle
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.rules.bowls import Bowls


@pytest.mark.parametrize("text", ["quadratic[m=3,n=5,noise=1.0]", "fonseca", "zdt1", "multidigits[batch=8]"])
def test_a_gradient_is_the_weighted_jacobian_in_one_backward_pass(text: str) -> None:
    problem = ProblemSpec.parse(text).build(ProblemContext(2, dtype=torch.float64))
    oracle = Oracle(problem, generator("batch"))
    point, batch = problem.initial_parameters([0, 1]), oracle.draw()
    weights = torch.rand(2, problem.objectives, generator=generator("w"), dtype=torch.float64)
    gradient, losses = oracle.gradient(point, batch, weights)
    assert (oracle.batches, oracle.forwards, oracle.backwards) == (1, 1, 1)
    jacobian, _ = oracle.jacobian(point, batch)
    assert (oracle.forwards, oracle.backwards) == (2, 1 + problem.objectives)
    torch.testing.assert_close(gradient, torch.einsum("pm,pmn->pn", weights, jacobian), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses, problem.losses(point, batch).detach())
    assert not gradient.requires_grad
    assert not losses.requires_grad


def test_a_gradient_can_be_taken_where_autograd_is_off() -> None:
    problem = Bowls()
    oracle = Oracle(problem, generator("batch"))
    point, batch = problem.initial_parameters([0]), oracle.draw()
    with torch.no_grad():
        gradient, _ = oracle.gradient(point, batch, torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(gradient, problem.expected_jacobian(point).mean(dim=1))


class Deaf(Bowls):
    """Its losses do not depend on the parameters: not at all, or only by a leaf of their own."""

    leaf = False

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        return torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=self.leaf)


@pytest.mark.parametrize("leaf", [False, True])
def test_losses_that_ignore_the_parameters_are_refused(leaf: bool) -> None:
    problem = Deaf()
    problem.leaf = leaf
    oracle = Oracle(problem, generator("batch"))
    with pytest.raises(UserError, match="no gradient"):
        oracle.gradient(problem.initial_parameters([0]), oracle.draw(), torch.ones(1, 2, dtype=torch.float64))

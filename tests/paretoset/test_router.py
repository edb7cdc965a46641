"""Routers: their size, their first answer, and each against a network of torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ml2o_dist.paretoset.router import ALIVE, Routers
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator


@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize("modules", [1, 5])
def test_a_router_has_4tt_and_3t_parameters(tasks: int, modules: int) -> None:
    routers = Routers(modules, tasks, scale=0.3, seed=0)
    assert sum(p.numel() for p in routers.parameters()) == modules * (4 * tasks**2 + 3 * tasks)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_routers_are_what_separate_networks_would_be(tasks: int) -> None:
    routers = Routers(4, tasks, scale=0.3, seed=1)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator("noise", *parameter.shape)))
    preference = torch.softmax(torch.randn(tasks, generator=generator("r")), dim=0)
    answers = routers(preference)
    assert answers.shape == (4, tasks)
    for g in range(4):
        net = nn.Sequential(nn.Linear(tasks, 2 * tasks), nn.ReLU(), nn.Linear(2 * tasks, tasks))
        tensors = (routers.hidden_weight, routers.hidden_bias, routers.weight, routers.bias)
        for parameter, tensor in zip(net.parameters(), tensors, strict=True):
            parameter.data = tensor[g].detach().clone()
        torch.testing.assert_close(answers[g], net(preference))


def test_the_first_weights_are_small_and_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    routers, twin, other = (Routers(200, 3, 0.3, seed, "arithmetic") for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    for (name, one), (_, same) in zip(routers.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one, same), name
    assert not torch.equal(routers.weight, other.weight)
    for weight in (routers.hidden_weight, routers.weight):
        assert float(weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert abs(float(weight.detach().mean())) < 0.001
    assert (routers.hidden_bias == ALIVE).all()
    assert (routers.bias == torch.tensor(0.3)).all()
    assert (
        routers(torch.tensor([0.2, 0.3, 0.5])) - 0.3
    ).abs().max() < 0.05  # so it begins as task arithmetic: 4 deviations


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_a_router_that_begins_as_the_soup_returns_the_preference(tasks: int) -> None:
    routers = Routers(4, tasks, scale=0.3, seed=3)
    corner = torch.eye(tasks)[0]
    for preference in (corner, torch.full((tasks,), 1 / tasks), torch.softmax(torch.arange(tasks) / 2, dim=0)):
        assert torch.equal(routers(preference), preference.expand(4, tasks))


def test_what_begins_as_the_soup_can_learn_with_all_its_units() -> None:
    routers = Routers(2, 2, scale=0.3, seed=3)
    optimizer = torch.optim.SGD(routers.parameters(), lr=0.1)
    first = [parameter.detach().clone() for parameter in routers.parameters()]
    for preference in torch.tensor([[0.3, 0.7], [0.8, 0.2]]):
        optimizer.zero_grad()
        (routers(preference) - 1).square().sum().backward()
        optimizer.step()
    for before, parameter in zip(first, routers.parameters(), strict=True):
        assert (parameter != before).any(dim=-1).all()


def test_an_unknown_beginning_is_refused() -> None:
    with pytest.raises(UserError, match=r"'soop'.*soup"):
        Routers(1, 2, 0.3, 0, "soop")

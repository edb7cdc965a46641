"""Routers: their size, their first answer, and each against a network of torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ml2o_dist.paretoset.router import ALIVE, Routers
from ml2o_dist.seeding import generator


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
    routers, twin, other = Routers(200, 3, 0.3, seed=5), Routers(200, 3, 0.3, seed=5), Routers(200, 3, 0.3, seed=6)
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

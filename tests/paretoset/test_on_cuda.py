"""Routers trained on a GPU go the CPU's way, to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ml2o_dist.paretoset.conditioned import Fused
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import build_multi_head
from ml2o_dist.paretoset.preference_problem import PreferenceProblem
from ml2o_dist.paretoset.scalarization import SCALARIZATIONS, Scalarization
from ml2o_dist.rules.aggregated import AggregatedRule
from ml2o_dist.rules.base import Oracle
from ml2o_dist.runtime.seeding import generator
from tests.paretoset.small import separate_noise, start_and_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def trained(device: str, loss: str) -> tuple[Tensor, Tensor]:
    """Return the routers after some steps, and the losses of one preference."""
    tasks = separate_noise(3, side=12)
    network = build_multi_head("cnn", side=tasks.side, classes=tasks.classes, seed=0, channels="2-3")
    model = Fused(Fusion(network, *start_and_experts(network, 3), heads=network.head_names))
    problem = PreferenceProblem(model, tasks, Scalarization(loss), batch=8, device=torch.device(device))
    rule = AggregatedRule("mean", "adam", 0.01)
    point = problem.initial_parameters([0])
    state = rule.initial_state(1, problem.objectives, problem.layout)
    for step in range(6):
        point, state, _ = rule.step(Oracle(problem, generator("cuda", step)), point, state)
    measured, _ = problem.measure(point, torch.tensor([0.2, 0.3, 0.5]), "test")
    return point.cpu(), measured


@pytest.mark.parametrize("loss", SCALARIZATIONS)
def test_routers_go_the_way_of_the_cpu(loss: str) -> None:
    here, there = trained("cpu", loss), trained("cuda", loss)
    torch.testing.assert_close(there[0], here[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(there[1], here[1], rtol=1e-3, atol=1e-3)

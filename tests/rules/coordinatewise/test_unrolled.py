"""The network over many steps by hand against single steps and autograd, over edge shapes."""

from __future__ import annotations

import pytest
import torch

from ml2o_dist.config import RuleSettings
from ml2o_dist.rules.coordinatewise import features
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.rules.coordinatewise.unrolled import Unrolled

DOUBLE = torch.float64


def network_of(objectives, output, hidden, kind="adam"):
    settings = RuleSettings(objectives=objectives[0], count=objectives[1], output=output, hidden=hidden, features=kind)
    network, draws = ML2ONetwork(settings).double(), torch.Generator().manual_seed(hidden)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=DOUBLE, generator=draws)
    return network


def stepped(network, weights, inputs):
    """Outputs [T, o, R] one differentiable step after the other, from zero states."""
    cells, outputs = network.initial_block(inputs.shape[2], inputs.shape[3]).cells, []
    for each in inputs:
        out, cells = network.step(each, cells, weights)
        outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.parametrize("objectives", [("tied", 1), ("tied", 2), ("tied", 5), ("per_objective", 1),
                                        ("per_objective", 3)])  # fmt: skip
@pytest.mark.parametrize(("steps", "rows", "hidden"), [(1, 1, 1), (6, 1, 3), (1, 7, 4), (5, 10, 2)])
@pytest.mark.parametrize("output", ["residual", "scaled"])
def test_outputs_and_gradients_equal_autograd_through_the_steps(objectives, steps, rows, hidden, output):
    network = network_of(objectives, output, hidden)
    draws = torch.Generator().manual_seed(7)
    inputs = torch.randn(steps, 3, objectives[1], rows, dtype=DOUBLE, generator=draws)
    weights = network.stacked_weights()
    expected = stepped(network, weights, inputs)
    weighting = torch.randn(expected.shape, dtype=DOUBLE, generator=draws)
    by_weights = torch.autograd.grad((expected * weighting).sum(), weights.tensors())

    unrolled = Unrolled(weights.detach(), network.settings, objectives[1], steps, rows)
    assert torch.allclose(unrolled.forward(inputs, restart=True), expected, rtol=1e-12, atol=1e-14)
    unrolled.backward(weighting)
    for ours, theirs in zip(unrolled.gradients.tensors(), by_weights, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)


def test_buffers_that_were_used_before_leave_no_trace():
    """Other coordinates, and fewer of them, then the first ones again: values and gradients as from fresh buffers."""
    network = network_of(("tied", 2), "residual", 3)
    weights, draws = network.stacked_weights().detach(), torch.Generator().manual_seed(8)
    first, second = (torch.randn(4, 3, 2, rows, dtype=DOUBLE, generator=draws) for rows in (9, 5))
    by = [torch.randn(4, 2, rows, dtype=DOUBLE, generator=draws) for rows in (9, 5)]

    def gradients(*passes):
        unrolled = Unrolled(weights, network.settings, 2, 4, 9)
        outputs = []
        for inputs, by_outputs in passes:
            outputs.append(unrolled.forward(inputs, restart=True).clone())
            unrolled.backward(by_outputs)
        return outputs, unrolled.gradients.tensors()

    outputs, summed = gradients((first, by[0]), (second, by[1]), (first, by[0]))
    (alone,), one = gradients((first, by[0]))
    _, two = gradients((second, by[1]))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[0], alone)
    for all_of_it, left, right in zip(summed, one, two, strict=True):
        assert torch.allclose(all_of_it, 2 * left + right, rtol=1e-12, atol=1e-13)


def test_chunks_carry_the_states_on():
    network = network_of(("per_objective", 2), "controlled", 3)
    weights = network.stacked_weights().detach()
    inputs = torch.randn(7, 3, 2, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(9))
    whole = stepped(network, weights, inputs)
    unrolled = Unrolled(weights, network.settings, 2, 3, 4)
    parts = [unrolled.forward(inputs[s : s + 3], restart=s == 0).clone() for s in (0, 3, 6)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["adam", "alignment", "log_sign"])
@pytest.mark.parametrize("output", ["residual", "scaled"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
def test_features_of_a_whole_sequence_equal_those_step_by_step(kind, output, scale):
    settings, draws = RuleSettings(features=kind, output=output), torch.Generator().manual_seed(10)
    gradients = scale * torch.randn(9, 2, 6, dtype=DOUBLE, generator=draws)
    alignment = torch.randn(9, 6, dtype=DOUBLE, generator=draws)
    inputs, directions = features.sequence(settings, gradients, alignment)
    memory = features.initial_memory(settings, gradients[0])
    for step in range(9):
        seen, direction, memory = features.advance(settings, gradients[step], memory, step, alignment[step])
        assert torch.allclose(inputs[step], seen, rtol=1e-10, atol=1e-13)
        assert torch.allclose(directions[step], direction, rtol=1e-10, atol=1e-13)

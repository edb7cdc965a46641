"""The hand-written LSTM step against torch's nn.LSTM and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ml2o_dist.rules.coordinatewise.lstm_cell import lstm_cell, stacked_weights

DOUBLE = torch.float64


@pytest.mark.parametrize(("channels", "hidden", "rows"), [(1, 1, 1), (3, 4, 7), (5, 2, 1)])
def test_values_and_gradients_equal_torchs_lstm_over_several_steps(channels, hidden, rows):
    torch.manual_seed(0)
    lstm = nn.LSTM(channels, hidden, dtype=DOUBLE)
    inputs = torch.randn(5, rows, channels, dtype=DOUBLE, requires_grad=True)
    out, (last, memory) = lstm(inputs)
    weighting = torch.randn_like(out)
    expected = torch.autograd.grad((out * weighting).sum() + memory.square().sum(), [inputs, *lstm.parameters()])
    cell = (torch.zeros(hidden, rows, dtype=DOUBLE),) * 2
    weights, total = stacked_weights(lstm, halved_inputs=False), 0.0
    for step in range(5):
        cell = lstm_cell(inputs[step].T, cell, weights)
        total = total + (2 * cell[0].T * weighting[step]).sum()
    hidden, kept = 2 * cell[0].T, cell[1].T / 2
    assert torch.allclose(hidden, last[0], rtol=1e-12, atol=1e-14)
    assert torch.allclose(kept, memory[0], rtol=1e-12, atol=1e-14)
    ours = torch.autograd.grad(total + kept.square().sum(), [inputs, *lstm.parameters()])
    for left, right in zip(ours, expected, strict=True):
        assert torch.allclose(left, right, rtol=1e-10, atol=1e-13)


def test_gradients_equal_finite_differences():
    torch.manual_seed(1)
    arguments = [torch.randn(*shape, dtype=DOUBLE, requires_grad=True) for shape in ((3, 5), (2, 5), (2, 5), (8, 6))]
    assert torch.autograd.gradcheck(lambda x, h, c, w: lstm_cell(x, (h, c), w), arguments)


def test_without_autograd_the_values_are_the_same_bit_for_bit():
    torch.manual_seed(3)
    inputs, hidden, memory, weights = (torch.randn(*shape) for shape in ((3, 5), (2, 5), (2, 5), (8, 6)))
    with torch.no_grad():
        plain = lstm_cell(inputs, (hidden, memory), weights)
    recorded = lstm_cell(inputs, (hidden, memory), weights.requires_grad_(True))
    assert all(torch.equal(left, right) for left, right in zip(plain, recorded, strict=True))


@pytest.mark.parametrize("size", [1e-30, 1e3, 1e30])
def test_extreme_inputs_saturate_and_stay_finite(size):
    torch.manual_seed(2)
    lstm = nn.LSTM(2, 3)
    inputs = size * torch.randn(2, 4)
    hidden, memory = lstm_cell(inputs, (torch.zeros(3, 4),) * 2, stacked_weights(lstm, halved_inputs=False))
    out, (_, expected) = lstm(inputs.T[None])
    assert torch.allclose(2 * hidden.T, out[0], atol=1e-6)
    assert torch.allclose(memory.T / 2, expected[0], atol=1e-6)

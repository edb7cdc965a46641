"""Routers: for each upscaled module a small network that turns a preference into weights of the task vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ml2o_dist.seeding import generator

DEVIATION = 0.01
"""Of the initial weights, as in the paper: so small that every router begins as task arithmetic."""


class Routers(nn.Module):
    """G routers r -> w: Linear(T, 2T), ReLU, Linear(2T, T), all at once; the output is not constrained.

    Each has 4 T^2 + 3 T parameters, 22 for two tasks. Weights begin as N(0, 0.01^2), first biases as 0, last biases
    as `scale`: w is about (scale, ..., scale), task arithmetic (arXiv 2406.09770, section 4).

    Attributes:
        hidden_weight [G, 2T, T], hidden_bias [G, 2T], weight [G, T, 2T], bias [G, T].
    """

    def __init__(self, modules: int, tasks: int, scale: float, seed: int) -> None:
        """Draw the weights of `modules` routers from `seed`."""
        super().__init__()
        hidden = 2 * tasks
        draws = generator("routers", seed)
        self.hidden_weight = nn.Parameter(DEVIATION * torch.randn(modules, hidden, tasks, generator=draws))
        self.hidden_bias = nn.Parameter(torch.zeros(modules, hidden))
        self.weight = nn.Parameter(DEVIATION * torch.randn(modules, tasks, hidden, generator=draws))
        self.bias = nn.Parameter(torch.full((modules, tasks), float(scale)))

    def forward(self, preference: Tensor) -> Tensor:
        """Return the weights w [G, T] for one `preference` [T]."""
        hidden = torch.relu(self.hidden_weight @ preference + self.hidden_bias)
        return torch.einsum("gth,gh->gt", self.weight, hidden) + self.bias

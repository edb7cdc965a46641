"""Routers: for each upscaled module a small network that turns a preference into weights of the task vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ml2o_dist.runtime.errors import unknown
from ml2o_dist.runtime.seeding import generator

BEGINNINGS = ("soup", "arithmetic")
"""The routers' initial output: the preference itself (ours), or lambda_0 for every task (the paper's)."""

DEVIATION = 0.01
"""Standard deviation of the initial weights, as in the paper: so small that routers begin as task arithmetic."""

ALIVE = 0.5
"""First biases. At 0 Adam's first steps, as long as the weights are large, can push all ReLUs of a router below zero
for good; the router then ignores the preference. This happened in 5 of 16 trainings of one router of two tasks (MLP on
MultiDigits, learning rates 0.01 and 0.03), in 4 at 0.1, 1 at 0.5, and 1 of 32 at 1, with slower learning."""


class Routers(nn.Module):
    """G routers r -> w: Linear(T, 2T), ReLU, Linear(2T, T), all at once; the output is not constrained.

    Each has 4 T^2 + 3 T parameters, 22 for two tasks. They begin as `BEGINNINGS` says:

    arithmetic  weights as N(0, 0.01^2), last biases as `scale`: w is about (scale, ..., scale), task arithmetic (arXiv
                2406.09770, section 4). First biases as `ALIVE` (ours).
    soup        the first T hidden units pass r on, the other T begin as above but with last weights 0: w = r exactly,
                the rewarded soup, at its corners the experts. Training starts from the best that is known without
                any, instead of having to find the corners first (ours).

    Attributes:
        hidden_weight [G, 2T, T], hidden_bias [G, 2T], weight [G, T, 2T], bias [G, T].
    """

    def __init__(self, modules: int, tasks: int, scale: float, seed: int, begin: str = "soup") -> None:
        """Draw the weights of `modules` routers from `seed`; raises UserError for an unknown `begin`."""
        super().__init__()
        if begin not in BEGINNINGS:
            raise unknown("beginning of routers", begin, BEGINNINGS)
        hidden = 2 * tasks
        draws = generator("routers", seed)
        self.hidden_weight = nn.Parameter(DEVIATION * torch.randn(modules, hidden, tasks, generator=draws))
        self.hidden_bias = nn.Parameter(torch.full((modules, hidden), ALIVE))
        self.weight = nn.Parameter(DEVIATION * torch.randn(modules, tasks, hidden, generator=draws))
        self.bias = nn.Parameter(torch.full((modules, tasks), float(scale)))
        if begin == "soup":
            with torch.no_grad():
                self.hidden_weight[:, :tasks] = self.weight[:, :, :tasks] = torch.eye(tasks)
                self.hidden_bias[:, :tasks] = self.weight[:, :, tasks:] = 0
                self.bias.zero_()

    def forward(self, preference: Tensor) -> Tensor:
        """Return the weights w [G, T] for one `preference` [T]."""
        hidden = torch.relu(self.hidden_weight @ preference + self.hidden_bias)
        return torch.einsum("gth,gh->gt", self.weight, hidden) + self.bias

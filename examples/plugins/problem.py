"""A problem of one's own: a torch module, the losses of its two tasks, and tensors.

ml2o evaluate --plugin examples/plugins/problem.py --problem 'two-moons[hidden=8]' --optimizer pretrained
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml2o_dist import ModuleProblem, Problem, ProblemContext, register_problem

LIBRARIES = ("scikit-learn",)
"""The figures depend on its version: finished cells are not taken for those of another one."""


class Net(nn.Module):
    """One trunk, two heads: which moon, and how far along it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, hidden)
        self.moon = nn.Linear(hidden, 2)
        self.place = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(self.trunk(x))
        return self.moon(features), self.place(features).squeeze(-1)


def losses(model: Net, x: Tensor, moon: Tensor, place: Tensor) -> list[Tensor]:
    """Both losses of every sample, [B] each."""
    logits, guess = model(x)
    return [F.cross_entropy(logits, moon, reduction="none"), (guess - place).square()]


def accuracy(model: Net, x: Tensor, moon: Tensor, place: Tensor) -> dict[str, list[float]]:
    """The share of right answers, where there is one."""
    logits, _ = model(x)
    return {"test_accuracy": [float((logits.argmax(dim=1) == moon).double().mean()), float("nan")]}


def samples(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [N, 2], their moons and their places along them."""
    from sklearn.datasets import make_moons

    points, moons = make_moons(count, noise=0.1, random_state=seed)
    x, moon = torch.tensor(points), torch.tensor(moons)
    return x, moon, x[:, 0].sin()


@register_problem("two-moons")
def two_moons(context: ProblemContext, *, hidden: int = 8, batch: int = 16) -> Problem:
    """Two interleaved half circles: which one a point is on, and where.

    hidden: width of the trunk.  batch: points in a batch, for each instance.
    """
    train, test = samples(400, 0), samples(200, 1)
    return ModuleProblem(
        context, lambda: Net(hidden), losses, train, test=test, batch=batch, positive=True, metrics=accuracy
    )

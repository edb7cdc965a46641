"""Two tasks on scikit-learn's digits, which digit and whether it is even, with a learned optimizer in a plain loop.

python examples/plain_loop.py                           # the weights that come with the package
python examples/plain_loop.py runs/first                # after `ml2o meta-train --run-dir runs/first`
python examples/plain_loop.py models:/ml2o@champion     # a registered version
python examples/plain_loop.py initial                   # before any meta-training: Adam on the sum of the losses
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ml2o_dist import GML2O

Batch = tuple[Tensor, Tensor]


class Network(nn.Module):
    """A trunk, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Dropout(0.2), nn.Linear(100, 50), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(50, 10), nn.Linear(50, 2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the logits of both tasks for images x [B, 64]."""
        features = self.trunk(x)
        return [head(features) for head in self.heads]


def task_losses(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the losses of both tasks, each [B]: one for every sample, so that the guard can tell noise from worse."""
    x, digit = batch
    pairs = zip(model(x), (digit, digit % 2), strict=True)
    return [F.cross_entropy(answer, label, reduction="none") for answer, label in pairs]


def data() -> tuple[Batch, Batch]:
    """Return (training, test) pixels and digits."""
    pixels, digits = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32) / 16
    y = torch.tensor(digits)
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def batches(whole: Batch, size: int, steps: int) -> Iterator[tuple[Batch, Batch]]:
    """Yield batches in pairs: one to learn from, another one for the guard."""
    x, y = whole
    for _ in range(steps):
        rows, others = torch.randint(len(x), (2, size))
        yield (x[rows], y[rows]), (x[others], y[others])


def main(weights: str = "pretrained", steps: int = 300) -> list[float]:
    """Train; return the test accuracy of each task."""
    torch.manual_seed(0)
    train, (test_x, test_y) = data()
    model = Network()
    optimizer = GML2O(model.parameters(), weights)
    for step, (batch, guard_batch) in enumerate(batches(train, 64, steps)):
        losses = optimizer.step(lambda: task_losses(model, batch), lambda: task_losses(model, guard_batch))  # noqa: B023
        if step % 50 == 0:
            print(f"step {step:4d}  losses {losses[0]:.3f} {losses[1]:.3f}")
    model.eval()
    with torch.no_grad():
        digit, even = (answer.argmax(dim=1) for answer in model(test_x))
    accuracies = [float((digit == test_y).float().mean()), float((even == test_y % 2).float().mean())]
    print(f"learned steps {optimizer.accepted_steps} of {optimizer.steps}, test accuracy {accuracies}")
    return accuracies


if __name__ == "__main__":
    main(*sys.argv[1:])

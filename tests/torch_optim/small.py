"""A small network of two tasks with its data, learned weights drawn at random, and every kind of optimizer for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml2o_dist import GML2O, ML2O
from ml2o_dist.artifact import save_artifact
from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.runtime.seeding import generator

Batch = tuple[Tensor, Tensor, Tensor]
Make = Callable[[nn.Module], ML2O]


class TwoTasks(nn.Module):
    """A trunk and two heads."""

    def __init__(self, seed: int = 0, hidden: int = 6) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, hidden)
        self.heads = nn.ModuleList([nn.Linear(hidden, 3), nn.Linear(hidden, 2)])
        draws = generator("two tasks", seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draws))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = torch.tanh(self.trunk(x))
        return [head(features) for head in self.heads]


def drawn(step: object, size: int = 16) -> Batch:
    """Draw the batch of a step."""
    draws = generator("batch", str(step))
    return (
        torch.randn(size, 5, generator=draws),
        torch.randint(3, (size,), generator=draws),
        torch.randint(2, (size,), generator=draws),
    )


def losses(model: nn.Module, batch: Batch, reduction: str = "mean") -> list[Tensor]:
    """Return both tasks' cross-entropies, of the batch or of each sample."""
    x, *labels = batch
    return [F.cross_entropy(a, y, reduction=reduction) for a, y in zip(model(x), labels, strict=True)]


def flat(model: nn.Module) -> Tensor:
    """Return all parameters [1, n]."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).unsqueeze(0)


def jacobian(model: nn.Module, batch: Batch) -> Tensor:
    """Return J [1, m, n] of the mean losses."""
    rows = []
    for loss in losses(model, batch):
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), parts, strict=True)]
        rows.append(torch.cat([each.flatten() for each in filled]))
    return torch.stack(rows).unsqueeze(0)


def weights_file(folder: Path, **settings: object) -> Path:
    """Write learned weights that were drawn at random, and move as such weights do; return the folder."""
    rule = RuleSettings.model_validate({"hidden": 4, **settings})
    network = ML2ONetwork(rule)
    draws = generator("learned", str(settings))
    state = {name: 0.3 * torch.randn(t.shape, generator=draws) for name, t in network.state_dict().items()}
    save_artifact(folder, state, rule, {})
    return folder


def makers(place: Path) -> dict[str, Make]:
    """Return how each kind of optimizer is made with the weights at `place`."""
    return {
        "ml2o": lambda model: ML2O(model.parameters(), place, weight_decay=0.01),
        "gml2o": lambda model: GML2O(model.parameters(), place, guard=GuardSettings(budget=1.0)),
        "gml2o over mgda": lambda model: GML2O(
            model.parameters(), place, guard=GuardSettings(fallback="mgda+adam@0.01", margin=0.5)
        ),
    }


KINDS = list(makers(Path()))


def take(optimizer: ML2O, model: nn.Module, step: int) -> Tensor:
    """Take a step on the batch of that number, guarded by another one."""
    batch, other = drawn(step), drawn(f"guard {step}")
    closure = lambda: losses(model, batch, "none")  # noqa: E731
    if isinstance(optimizer, GML2O):
        return optimizer.step(closure, lambda: losses(model, other, "none"))
    return optimizer.step(closure)

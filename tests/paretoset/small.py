"""Small networks, a start and experts for them, and a task set of noise: what the tests of this folder are done on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ml2o_dist.paretoset.networks import MultiHead
from ml2o_dist.paretoset.tasks import Group, TaskSet
from ml2o_dist.runtime.seeding import generator

State = dict[str, Tensor]


class Heads(nn.Module):
    """A trunk with an MLP in it, and a head for each task."""

    def __init__(self, tasks: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.mlp = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.mlp(torch.tanh(self.first(x)))
        return [head(features) for head in self.heads]


class RootParameters(nn.Module):
    """Parameters of its own, one of them a scalar, beside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(3))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x) + self.shift


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.two(torch.tanh(self.one(x)))
        return answer


class Normed(nn.Module):
    """BatchNorm, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.register_buffer("offset", torch.tensor([1.0, 2.0, 3.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(self.layer(x)) + self.offset
        return answer


def built(kind: type[nn.Module], seed: int = 0, **settings: int) -> nn.Module:
    """Build a network whose first values are drawn from `seed`, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**settings).eval()


def start_and_experts(network: nn.Module, count: int, size: float = 0.3) -> tuple[State, list[State]]:
    """Return the network's own state and `count` others, each tensor of which is moved by noise of its own.

    Tied tensors are moved alike, variances stay positive, and counters differ.
    """
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    names = {tensor.data_ptr(): name for name, tensor in network.state_dict(keep_vars=True).items()}
    experts = []
    for t in range(count):
        expert = {}
        for name, tensor in network.state_dict(keep_vars=True).items():
            noise = torch.randn(tensor.shape, generator=generator("expert", t, names[tensor.data_ptr()]))
            if not tensor.is_floating_point():
                expert[name] = tensor + 10 * (t + 1)
            elif name.endswith("running_var"):
                expert[name] = tensor.detach() * (0.2 + noise.abs())
            else:
                expert[name] = tensor.detach() + size * noise.to(tensor.dtype)
        experts.append(expert)
    return start, experts


def separate_noise(tasks: int = 2, side: int = 4, classes: Sequence[int] = (), count: int = 24) -> TaskSet:
    """Return a task set with images of noise, a group for each task."""
    draws = generator("images of noise")
    classes = tuple(classes) or (3,) * tasks

    def group(t: int) -> Group:
        images = torch.randint(0, 256, (count + t, side, side), generator=draws, dtype=torch.uint8)
        return Group((t,), images, torch.randint(0, classes[t], (count + t, 1), generator=draws))

    splits = {split: tuple(group(t) for t in range(tasks)) for split in ("train", "validation", "test")}
    names = tuple(f"noise {t}" for t in range(tasks))
    return TaskSet(names, tuple(classes), side, splits, (127.0,) * tasks, (73.0,) * tasks, {"noise": "0"})


def shared_noise(tasks: int = 2, side: int = 4, classes: int = 3, count: int = 30) -> TaskSet:
    """Return a task set with images of noise that all tasks share."""
    draws = generator("shared images of noise", tasks)

    def group() -> Group:
        images = torch.randint(0, 256, (count, side, side), generator=draws, dtype=torch.uint8)
        return Group(tuple(range(tasks)), images, torch.randint(0, classes, (count, tasks), generator=draws))

    splits = {split: (group(),) for split in ("train", "validation", "test")}
    names = tuple(f"noise {t}" for t in range(tasks))
    return TaskSet(names, (classes,) * tasks, side, splits, (127.0,), (73.0,), {"noise": "0"})


def small_multi_head(tasks: int = 2, side: int = 4, classes: int = 3, width: int = 5, seed: int = 0) -> MultiHead:
    """Return a dense network for images [B, 1, side, side]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(side * side, width), nn.Tanh())
        return MultiHead(trunk, width, (classes,) * tasks)

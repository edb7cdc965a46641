"""Use any `torch.optim.Optimizer` to step along an aggregated direction, on the model's own tensors.

A rule's state is a value: between steps an optimizer is stored as its `state_dict`, which every step copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ml2o_dist.rules.names import OPTIMIZERS

Build = Callable[..., torch.optim.Optimizer]
"""(parameters, lr=...) -> optimizer."""


@dataclass(frozen=True)
class TorchOptimizer:
    """An optimizer by name.

    Attributes:
        build: a function of the parameters, and of `lr` if it `takes_lr`.
    """

    build: Build
    takes_lr: bool

    def made(self, parameters: list[torch.nn.Parameter], lr: float | None) -> torch.optim.Optimizer:
        """Return a fresh optimizer; without an `lr` it uses its own default."""
        return self.build(parameters) if lr is None else self.build(parameters, lr=lr)


def register_optimizer(name: str) -> Callable[[Build], Build]:
    """Register a function `(parameters, lr=0.01) -> torch.optim.Optimizer` (a decorator).

    Comparisons can then use it as `NAME@0.01`, `AGGREGATOR+NAME@0.01`, or `NAME` alone. The learning rate of `NAME` is
    tuned if the function has a parameter `lr`.
    """

    def register(build: Build) -> Build:
        takes_lr = "lr" in inspect.signature(build).parameters
        OPTIMIZERS.register(name, build)(TorchOptimizer(build, takes_lr))
        return build

    return register


def torch_step(
    optimizer: TorchOptimizer,
    lr: float | None,
    shapes: tuple[tuple[int, ...], ...],
    point: Tensor,
    direction: Tensor,
    memory: Mapping[str, Any] | None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return one instance's parameters [n] after a step with `direction` [n] as their gradient, and the new memory.

    Args:
        shapes: of the tensors behind the n parameters, in order.
        memory: the optimizer's state dict after the step before; None before the first.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = zip(torch.split(point, sizes), torch.split(direction, sizes), shapes, strict=True)
    parameters = []
    for values, gradient, shape in parts:
        parameter = torch.nn.Parameter(values.detach().clone().view(shape))
        parameter.grad = gradient.detach().clone().view(shape)
        parameters.append(parameter)
    made = optimizer.made(parameters, lr)
    if memory is not None:
        made.load_state_dict(tree_map_only(Tensor, Tensor.clone, dict(memory)))
    with torch.enable_grad():
        made.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters]), made.state_dict()

"""Hand-designed rules: torchjd turns the Jacobian into one direction, and a classical optimizer steps along it.

`mean+adam` is Adam on the sum of the objectives: Adam does not see a constant factor (up to eps), so the mean serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.aggregators import (
    DWA_EPOCH,
    after_step,
    aggregate,
    build_aggregator,
    check_aggregator,
    learned_parameters,
)
from ml2o_dist.rules.base import Oracle, StepInfo, UpdateRule
from ml2o_dist.rules.names import AGGREGATORS, OPTIMIZERS, split_optimizer_name
from ml2o_dist.rules.torch_optimizers import torch_step
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.seeding import derive_seed

MOMENTUM = 0.9
BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class AggregatedState:
    """A hand-designed rule's state: the number of steps, running moments of its direction, torchjd's memory.

    `first` is the velocity of `momentum` or the first moment of `adam`; `second` is the second moment of `adam`. Both
    stay zero if the optimizer does not use them. They are [P, n + k]: the optimizer also trains k parameters of the
    aggregator. `modules` has torchjd's object for each instance; a step replaces it and never changes it. For a torch
    optimizer, `memories` has the state dict for each instance, on tensors of these `shapes`.
    """

    steps: int
    first: Tensor
    second: Tensor
    modules: tuple[nn.Module, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    memories: tuple[dict[str, Any] | None, ...] = ()


class AggregatedRule(UpdateRule):
    """z_{k+1} = z_k - lr * optimizer(aggregator(J_k, f_k)), instance by instance, projected onto the problem's box.

    `aggregators.AGGREGATORS` has the names. torchjd's random numbers (the order of `pcgrad` and `gradvac`, the masks of
    `graddrop`, `randomweights`) are a function of the step number alone, so that a run repeats, an instance does not
    depend on the others, and the global random stream is unchanged. Log-variances of `uw` and scales of
    `imtll` are trained by the same optimizer at the same learning rate, jointly with z, as their papers do.
    `sgd`, `momentum` (0.9) and `adam` (0.9, 0.999, eps 1e-8, bias-corrected) step as their namesakes in torch.optim.

    A step of `mean` and `sum` costs one backward pass. Any other step costs a Jacobian, m passes, although one would be
    enough for methods that use only the losses. `famo` costs one more forward.
    An instance whose Jacobian has a non-finite entry gets NaN parameters: it has diverged, which is a result.
    """

    def __init__(self, aggregator: str, optimizer: str = "adam", lr: float | None = 0.01) -> None:
        """`lr`: None for an optimizer that takes no learning rate or has its own.

        Raises:
            UserError: an unknown name, a missing solver, or an `lr` that is not positive and finite.
        """
        _check_names(aggregator, optimizer)
        if lr is None and optimizer in _OPTIMIZERS:
            raise UserError(f"{aggregator}+{optimizer} needs a learning rate")
        if lr is not None and not (math.isfinite(lr) and lr > 0):
            raise UserError(f"learning rate {lr!r} of {aggregator}+{optimizer} must be a positive, finite number")
        self.aggregator = aggregator
        self.optimizer = optimizer
        self.lr = lr

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> AggregatedState:
        """Return zero moments and fresh modules; the first step takes them to the device and precision of its Jacobian.

        Raises:
            UserError: the aggregator needs more objectives.
        """
        modules = tuple(build_aggregator(self.aggregator, objectives) for _ in range(instances))
        own = sum(parameter.numel() for parameter in learned_parameters(self.aggregator, modules[0]))
        zeros = torch.zeros(instances, layout.dimension + own)
        if self.optimizer in _OPTIMIZERS:
            return AggregatedState(0, zeros, zeros, modules)
        if own:
            raise UserError(f"{self.aggregator} trains parameters of its own: by sgd, momentum or adam")
        shapes = tuple(tensor.shape for tensor in layout.tensors)
        return AggregatedState(0, zeros[:, :0], zeros[:, :0], modules, shapes, (None,) * instances)

    def step(
        self, oracle: Oracle, parameters: Tensor, state: AggregatedState
    ) -> tuple[Tensor, AggregatedState, StepInfo]:
        """Take one step from `parameters` [P, n]; `mean` and `sum` differentiate only their own objective."""
        objectives = oracle.problem.objectives
        share = {"mean": 1 / objectives, "sum": 1.0}.get(self.aggregator)
        if share is None:
            return super().step(oracle, parameters, state)
        batch = oracle.draw()
        gradient, losses = oracle.gradient(parameters, batch, parameters.new_full((len(parameters), objectives), share))
        seen = StepInfo(losses, gradient.unsqueeze(1), batch)  # mean and sum of one row are that row
        point, state = self.propose(oracle, parameters, state, seen)
        return point, state, seen

    def propose(
        self, oracle: Oracle, parameters: Tensor, state: AggregatedState, seen: StepInfo
    ) -> tuple[Tensor, AggregatedState]:
        """Aggregate the Jacobian and step; nothing else is evaluated (`famo`: the losses after the step).

        Raises:
            UserError: the aggregator needs losses that are positive by construction.
        """
        method = AGGREGATORS[self.aggregator]
        if method.positive and not oracle.problem.positive:
            raise UserError(
                f"aggregator {self.aggregator!r} needs losses that are positive by construction, "
                f"which those of {type(oracle.problem).__name__} are not"
            )
        seed = derive_seed("aggregator", state.steps)
        pairs = [
            aggregate(self.aggregator, module, matrix, values, seed)
            for module, matrix, values in zip(state.modules, seen.jacobian, seen.losses, strict=True)
        ]
        direction = torch.stack([each for each, _ in pairs])
        modules = tuple(module for _, module in pairs)
        first, second, memories = state.first, state.second, state.memories
        if self.optimizer in _OPTIMIZERS:
            move, first, second = _OPTIMIZERS[self.optimizer](direction, state)
            assert self.lr is not None
            move = self.lr * move
            moved = oracle.problem.project(parameters - move[:, : parameters.shape[1]])
        else:
            optimizer, move = OPTIMIZERS[self.optimizer], direction
            steps = [
                torch_step(optimizer, self.lr, state.shapes, *each)
                for each in zip(parameters, direction, memories, strict=True)
            ]
            moved = oracle.problem.project(torch.stack([point for point, _ in steps]))
            memories = tuple(memory for _, memory in steps)
        after = oracle.losses(moved, seen.batch) if method.looks_back else seen.losses
        for p, finite in enumerate(direction.isfinite().all(dim=1).tolist()):
            if finite:
                own_move = move[p, parameters.shape[1] :]
                after_step(self.aggregator, modules[p], own_move, after[p], (state.steps + 1) % DWA_EPOCH == 0)
        return moved, AggregatedState(state.steps + 1, first, second, modules, state.shapes, memories)

    def grown(self, state: AggregatedState, more: ParameterLayout) -> AggregatedState:
        """Raise UserError: the moments of all parameters are corrected by one count of steps."""
        raise UserError(f"{self.aggregator}+{self.optimizer} takes no more parameters after its first step")


def parse_optimizer_name(text: str) -> tuple[str, str, float | None]:
    """Read a name as `names.split_optimizer_name` does, and build the aggregator once; raises UserError."""
    aggregator, optimizer, lr = split_optimizer_name(text)
    _check_names(aggregator, optimizer)
    return aggregator, optimizer, lr


def _check_names(aggregator: str, optimizer: str) -> None:
    check_aggregator(aggregator)
    if optimizer not in _OPTIMIZERS and optimizer not in OPTIMIZERS:
        raise unknown(f"optimizer of {aggregator!r}:", optimizer, [*_OPTIMIZERS, *OPTIMIZERS], extensible=True)


def takes_learning_rate(optimizer: str) -> bool:
    """Tell whether an optimizer by name has a learning rate to tune."""
    return optimizer in _OPTIMIZERS or OPTIMIZERS[optimizer].takes_lr


def _sgd(direction: Tensor, state: AggregatedState) -> tuple[Tensor, Tensor, Tensor]:
    return direction, state.first, state.second


def _momentum(direction: Tensor, state: AggregatedState) -> tuple[Tensor, Tensor, Tensor]:
    velocity = MOMENTUM * state.first.to(direction) + direction
    return velocity, velocity, state.second


def _adam(direction: Tensor, state: AggregatedState) -> tuple[Tensor, Tensor, Tensor]:
    steps = state.steps + 1
    first = BETAS[0] * state.first.to(direction) + (1 - BETAS[0]) * direction
    second = BETAS[1] * state.second.to(direction) + (1 - BETAS[1]) * direction.square()
    unbiased = first / (1 - BETAS[0] ** steps)
    scale = (second / (1 - BETAS[1] ** steps)).sqrt()
    return unbiased / (scale + EPSILON), first, second


_OPTIMIZERS: dict[str, Callable[[Tensor, AggregatedState], tuple[Tensor, Tensor, Tensor]]] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adam": _adam,
}
"""Name -> (direction, state) -> the vector that the learning rate multiplies, and both moments for the next step."""

"""Hand-designed rules: a torchjd aggregator turns the Jacobian into one direction, a classical optimizer steps on it.

`mean+adam` is Adam on the sum of the objectives: Adam does not see a constant factor (up to eps), so the mean serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchjd.aggregation import MGDA, Mean, PCGrad

from ml2o_dist.errors import UserError, unknown
from ml2o_dist.rules.base import Oracle, StepInfo, UpdateRule
from ml2o_dist.seeding import derive_seed

Aggregator = Callable[[Tensor], Tensor]
"""A map from a Jacobian [m, n] to a direction [n]."""

AGGREGATORS: dict[str, Callable[[], Aggregator]] = {"mean": Mean, "mgda": MGDA, "pcgrad": PCGrad}
"""Name -> constructor. A fresh one serves every call, so that nothing is remembered outside the state."""

MOMENTUM = 0.9
BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class AggregatedState:
    """What a hand-designed rule remembers: the steps taken, and running moments [P, n] of its direction.

    `first` is the velocity of `momentum` or the first moment of `adam`; `second` the second moment of `adam`; both
    stay zero where the optimizer has no use for them.
    """

    steps: int
    first: Tensor
    second: Tensor


class AggregatedRule(UpdateRule):
    """z_{k+1} = z_k - lr * optimizer(aggregator(J_k)), instance by instance, projected onto the problem's box.

    Aggregators are torchjd's, unchanged: its `mgda` solves the min-norm problem by Frank-Wolfe (Sener & Koltun 2018,
    Algorithm 2; at most 100 iterations, tolerance 1e-3), so it is only nearly min-norm. `pcgrad` projects in random
    order (Yu et al. 2020): here the order is a function of the step number alone, so that a run repeats, an instance
    moves alike in any company, and the global random stream stays as it was.
    `sgd`, `momentum` (0.9) and `adam` (0.9, 0.999, eps 1e-8, bias-corrected) step as their namesakes in torch.optim.

    An instance whose Jacobian has an entry that is not finite gets NaN parameters: it has diverged, which is a result.
    """

    def __init__(self, aggregator: str, optimizer: str = "adam", lr: float = 0.01) -> None:
        """Raises UserError for an unknown name or an `lr` that is not positive and finite."""
        _check_names(aggregator, optimizer)
        if not (math.isfinite(lr) and lr > 0):
            raise UserError(f"learning rate {lr!r} of {aggregator}+{optimizer} must be a positive, finite number")
        self.aggregator = aggregator
        self.optimizer = optimizer
        self.lr = lr

    def initial_state(self, instances: int, objectives: int, dimension: int) -> AggregatedState:
        """Return zero moments [P, n]; the first step takes them to the device and precision of its Jacobian."""
        zeros = torch.zeros(instances, dimension)
        return AggregatedState(0, zeros, zeros)

    def propose(
        self, oracle: Oracle, parameters: Tensor, state: AggregatedState, seen: StepInfo
    ) -> tuple[Tensor, AggregatedState]:
        """Aggregate the Jacobian and step; nothing else is evaluated."""
        direction = aggregate(self.aggregator, seen.jacobian, order=state.steps)
        move, following = _OPTIMIZERS[self.optimizer](direction, state)
        return oracle.problem.project(parameters - self.lr * move), following


def aggregate(name: str, jacobian: Tensor, order: int = 0) -> Tensor:
    """Aggregate J [P, m, n] to directions [P, n], each instance by itself; a non-finite one becomes NaN.

    `order` names the random order in which `pcgrad` projects. The global random stream is left as it was.
    """
    finite = jacobian.isfinite().flatten(1).all(dim=1).tolist()
    seed = derive_seed("aggregator", order)
    return torch.stack(
        [
            _seeded(AGGREGATORS[name](), matrix, seed) if usable else torch.full_like(matrix[0], math.nan)
            for matrix, usable in zip(jacobian, finite, strict=True)
        ]
    )


def parse_optimizer_name(text: str) -> tuple[str, str, float | None]:
    """Read `AGGREGATOR[+sgd|+momentum|+adam][@LR]` as (aggregator, optimizer, learning rate).

    The optimizer is `adam` where none is named; the learning rate is None where it is left to be tuned.

    Raises:
        UserError: an unknown aggregator or optimizer (the nearest name is given), or a learning rate that is no
            positive, finite number.
    """
    names, at, rate = text.strip().partition("@")
    aggregator, plus, optimizer = names.partition("+")
    if not plus:
        optimizer = "adam"
    _check_names(aggregator, optimizer)
    if not at:
        return aggregator, optimizer, None
    try:
        lr = float(rate)
    except ValueError:
        lr = math.nan
    if not (math.isfinite(lr) and lr > 0):
        raise UserError(f"optimizer {text!r}: learning rate {rate!r} must be a positive, finite number")
    return aggregator, optimizer, lr


def _check_names(aggregator: str, optimizer: str) -> None:
    if aggregator not in AGGREGATORS:
        raise unknown("aggregator", aggregator, AGGREGATORS)
    if optimizer not in _OPTIMIZERS:
        raise unknown(f"optimizer after {aggregator!r}+", optimizer, _OPTIMIZERS)


def _seeded(aggregator: Aggregator, matrix: Tensor, seed: int) -> Tensor:
    # torchjd draws from torch's global CPU generator; torch.manual_seed would reach the GPUs' streams as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return aggregator(matrix)


def _sgd(direction: Tensor, state: AggregatedState) -> tuple[Tensor, AggregatedState]:
    return direction, AggregatedState(state.steps + 1, state.first, state.second)


def _momentum(direction: Tensor, state: AggregatedState) -> tuple[Tensor, AggregatedState]:
    velocity = MOMENTUM * state.first.to(direction) + direction
    return velocity, AggregatedState(state.steps + 1, velocity, state.second)


def _adam(direction: Tensor, state: AggregatedState) -> tuple[Tensor, AggregatedState]:
    steps = state.steps + 1
    first = BETAS[0] * state.first.to(direction) + (1 - BETAS[0]) * direction
    second = BETAS[1] * state.second.to(direction) + (1 - BETAS[1]) * direction.square()
    unbiased = first / (1 - BETAS[0] ** steps)
    scale = (second / (1 - BETAS[1] ** steps)).sqrt()
    return unbiased / (scale + EPSILON), AggregatedState(steps, first, second)


_OPTIMIZERS: dict[str, Callable[[Tensor, AggregatedState], tuple[Tensor, AggregatedState]]] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adam": _adam,
}

"""Adversarial rules: the worst that a learned rule may do, which a guard must survive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle, StepInfo, UpdateRule
from ml2o_dist.runtime.errors import unknown
from ml2o_dist.runtime.seeding import generator

RATE = 0.05
"""Step size of the adversaries along gradients, and length of a drift's step; both resemble usual learned steps."""

HUGE = 1e6
TURNS_AT = 100
"""How many good steps a turncoat takes first."""


class _Seen(NamedTuple):
    """The inputs of an adversary: mean gradient [P, n], step number, and a random stream of the step."""

    gradient: Tensor
    step: int

    def noise(self) -> Tensor:
        """Standard normal numbers [P, n] that depend on the step alone, so that a run repeats."""
        shape, stream = self.gradient.shape, generator("adversary", self.step)
        return torch.randn(shape[1:], generator=stream).to(self.gradient).expand(shape)


class Adversary(NamedTuple):
    """An adversary: a line about it, and its update [P, n]."""

    about: str
    update: Callable[[_Seen], Tensor]


ADVERSARIES: dict[str, Adversary] = {
    "random": Adversary(
        "normal steps of size 1 a coordinate, whatever the gradient",
        lambda seen: seen.noise(),
    ),
    "ascent": Adversary(
        "up the mean gradient",
        lambda seen: RATE * seen.gradient,
    ),
    "huge": Adversary(
        "down it, a million times too far",
        lambda seen: -HUGE * RATE * seen.gradient,
    ),
    "nan": Adversary(
        "not a number or infinite, in turn",
        lambda seen: torch.full_like(seen.gradient, math.nan if seen.step % 2 else math.inf),
    ),
    "frozen": Adversary(
        "nowhere",
        lambda seen: torch.zeros_like(seen.gradient),
    ),
    "drift": Adversary(
        "0.05 along the all-ones diagonal at every step",
        lambda seen: torch.full_like(seen.gradient, RATE / math.sqrt(seen.gradient.shape[1])),
    ),
    "turncoat": Adversary(
        "descent for 100 steps, then ascent",
        lambda seen: seen.gradient * (-RATE if seen.step < TURNS_AT else RATE),
    ),
}
"""The adversaries by name."""


class AdversaryRule(UpdateRule):
    """z_{k+1} = z_k + the update of the adversary `name`, projected onto the problem's box; its state counts steps."""

    def __init__(self, name: str) -> None:
        """Raises UserError for an unknown name."""
        if name not in ADVERSARIES:
            raise unknown("adversary", name, ADVERSARIES)
        self.name = name

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> int:
        """Return 0 steps."""
        return 0

    def propose(self, oracle: Oracle, parameters: Tensor, state: int, seen: StepInfo) -> tuple[Tensor, int]:
        """Return the point after the adversary's update, and the next step number."""
        update = ADVERSARIES[self.name].update(_Seen(seen.jacobian.mean(dim=1), state))
        return oracle.problem.project(parameters + update), state + 1

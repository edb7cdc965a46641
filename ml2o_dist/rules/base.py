"""How a step is taken: the `UpdateRule` contract and the `Oracle`, the only way to a gradient or a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ml2o_dist.problems.base import Batch, Problem
from ml2o_dist.problems.layout import ParameterLayout

State = Any
"""A rule's state for P instances; a value, never changed in place by `step`."""


class Oracle:
    """Draws batches of one problem and counts every evaluation, so that each method is charged what it uses.

    Attributes:
        problem: what is optimized.
        batches, forwards, backwards: how many were drawn or computed so far, for each instance. A Jacobian of m
            objectives is one forward and m backwards, a gradient of their weighted sum one of each.
    """

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.problem = problem
        self.batches = self.forwards = self.backwards = 0
        self._generator = generator

    def draw(self) -> Batch:
        """Draw the next batch (one per instance)."""
        self.batches += 1
        return self.problem.sample_batch(self._generator)

    def jacobian(self, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (J [P, m, n], losses [P, m]) at `parameters` [P, n] on `batch`, detached."""
        self.forwards += 1
        self.backwards += self.problem.objectives
        return self.problem.jacobian(parameters, batch)

    def gradient(self, parameters: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (J^T weights [P, n], losses [P, m]) at `parameters` [P, n] on `batch`, detached; `weights` [P, m].

        Raises:
            UserError: no objective depends on the parameters.
        """
        self.forwards += 1
        self.backwards += 1
        return self.problem.gradient(parameters, batch, weights)

    def losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the losses [P, m] at `parameters` [P, n] on `batch`, detached."""
        self.forwards += 1
        with torch.no_grad():
            return self.problem.losses(parameters, batch)

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the losses of every sample [P, B, m] at `parameters` [P, n] on `batch`, detached."""
        self.forwards += 1
        with torch.no_grad():
            return self.problem.sample_losses(parameters, batch)


@dataclass(frozen=True)
class StepInfo:
    """What a step saw at the point it left: its first batch, and losses [P, m] and Jacobian [P, m, n] on it.

    The Jacobian is [P, 1, n] of a rule that looks at one weighted sum of the objectives only.
    """

    losses: Tensor
    jacobian: Tensor
    batch: Batch


class UpdateRule(ABC):
    """A rule z_{k+1} = step(z_k): no hidden state, no globals; everything it remembers is in the state value."""

    @abstractmethod
    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> State:
        """Return the state before the first step for P instances, m objectives, and n parameters laid out so."""

    @abstractmethod
    def propose(self, oracle: Oracle, parameters: Tensor, state: State, seen: StepInfo) -> tuple[Tensor, State]:
        """Return the next point [P, n] and the next state, from what was `seen` at `parameters` [P, n].

        The point is feasible: projected onto the problem's box, if it has one. What else the rule needs to know, it
        asks the oracle, on batches of its own.
        """

    def overruled(self, state: State, seen: StepInfo, update: Tensor, where: Tensor) -> State:
        """Return the state that `propose` gave, told that the instances `where` [P] moved by `update` [P, n] instead.

        Unchanged unless a rule remembers its own updates.
        """
        return state

    def grown(self, state: State, more: ParameterLayout) -> State:
        """Return the state of one instance after `more` tensors came in behind the others: theirs is as at first.

        Unchanged unless a rule remembers something of every parameter.
        """
        return state

    def step(self, oracle: Oracle, parameters: Tensor, state: State) -> tuple[Tensor, State, StepInfo]:
        """Take one step from `parameters` [P, n]: draw a batch, compute its Jacobian, go where the rule proposes."""
        seen = look(oracle, parameters)
        point, state = self.propose(oracle, parameters, state, seen)
        return point, state, seen


def look(oracle: Oracle, parameters: Tensor) -> StepInfo:
    """Draw a batch and see what there is at `parameters` [P, n]: one forward, m backwards."""
    batch = oracle.draw()
    jacobian, losses = oracle.jacobian(parameters, batch)
    return StepInfo(losses, jacobian, batch)

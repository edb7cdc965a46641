"""The `UpdateRule` contract, and the `Oracle`, through which a rule gets every gradient and loss."""

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
    """Draws batches of one problem and counts every evaluation, so that each method is charged for what it uses.

    Attributes:
        problem: the problem that is optimized.
        batches, forwards, backwards: how many were drawn or computed so far, for each instance. A Jacobian of m
            objectives counts as one forward and m backwards, a gradient of their weighted sum as one of each.
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
    """What a step saw at its starting point: its first batch, and the losses [P, m] and Jacobian [P, m, n] on it.

    A rule that uses only one weighted sum of the objectives has a Jacobian [P, 1, n].
    """

    losses: Tensor
    jacobian: Tensor
    batch: Batch


class UpdateRule(ABC):
    """A rule z_{k+1} = step(z_k), without hidden state or globals: all that it remembers is in the state value."""

    @abstractmethod
    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> State:
        """Return the state before the first step for P instances, m objectives, and n parameters with this layout."""

    @abstractmethod
    def propose(self, oracle: Oracle, parameters: Tensor, state: State, seen: StepInfo) -> tuple[Tensor, State]:
        """Return the next point [P, n] and the next state, from what was `seen` at `parameters` [P, n].

        The point is feasible: projected onto the problem's box, if it has one. If the rule needs more evaluations, it
        draws its own batches from the oracle.
        """

    def overruled(self, state: State, seen: StepInfo, update: Tensor, where: Tensor) -> State:
        """Return the state from `propose`, corrected where instances `where` [P] moved by `update` [P, n] instead.

        The state is unchanged unless a rule remembers its own updates.
        """
        return state

    def grown(self, state: State, more: ParameterLayout) -> State:
        """Return the state of one instance after the tensors `more` were appended, which start from an initial state.

        The state is unchanged unless a rule remembers something for every parameter.
        """
        return state

    def step(self, oracle: Oracle, parameters: Tensor, state: State) -> tuple[Tensor, State, StepInfo]:
        """Take one step from `parameters` [P, n]: draw a batch, compute its Jacobian, move to the proposed point."""
        seen = look(oracle, parameters)
        point, state = self.propose(oracle, parameters, state, seen)
        return point, state, seen


def look(oracle: Oracle, parameters: Tensor) -> StepInfo:
    """Draw a batch and return its losses and Jacobian at `parameters` [P, n]: one forward, m backwards."""
    batch = oracle.draw()
    jacobian, losses = oracle.jacobian(parameters, batch)
    return StepInfo(losses, jacobian, batch)

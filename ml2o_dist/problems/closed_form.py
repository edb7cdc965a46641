"""Problems given by a formula: what they share, and the checks of their settings."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ml2o_dist.problems.base import Batch, Problem, ProblemContext
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator


class ClosedForm(Problem):
    """A noise-free problem whose P instances are one and the same formula, started from different points.

    A subclass defines `name`, `objective_values`, `start` and, if the Pareto set is known, `pareto_set`, whose image is
    the front. The name is the registered one; it appears in error messages and seeds the random streams of the starts.
    """

    name: ClassVar[str]

    def __init__(self, context: ProblemContext, *, objectives: int, dimension: int) -> None:
        self.instances = context.instances
        self.objectives = objectives
        self.dimension = dimension
        self.device = context.device
        self.dtype = context.dtype

    @abstractmethod
    def objective_values(self, points: Tensor) -> Tensor:
        """Return the objectives [k, m] at `points` [k, n]."""

    @abstractmethod
    def start(self, stream: torch.Generator) -> Tensor:
        """Draw one starting point [n], float64, on the CPU."""

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return starting points [P, n]; drawn in float64, so that every dtype starts at the same place."""
        if len(seeds) != self.instances:
            raise ValueError(f"{len(seeds)} seeds for {self.instances} instances")
        rows = [self.start(generator("start", self.name, seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.dtype)

    def sample_batch(self, generator: torch.Generator) -> Batch:
        """Return None: there is no noise."""
        return None

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the objectives as the only sample, [P, 1, m]."""
        return self.objective_values(parameters).unsqueeze(1)

    def pareto_front(self, points: int) -> Tensor:
        """Return the image [k, m] of `pareto_set(points)`."""
        with torch.no_grad():
            return self.objective_values(self.pareto_set(points))

    def tensor(self, values: Sequence[float] | Tensor) -> Tensor:
        """Return `values` on the problem's device, in its precision."""
        return torch.as_tensor(values, dtype=torch.float64).to(self.device, self.dtype)


class UnitBox(ClosedForm):
    """A closed form on the box [0, 1]^n, started uniformly inside it.

    Outside the box the losses are those of the nearest point inside it (gradient 0 across the violated bounds), so
    that a step which was not projected finds neither NaN nor a value below the true front.
    """

    def __init__(self, context: ProblemContext, *, objectives: int, dimension: int) -> None:
        super().__init__(context, objectives=objectives, dimension=dimension)
        self.bounds = (self.tensor(torch.zeros(dimension)), self.tensor(torch.ones(dimension)))

    @abstractmethod
    def box_values(self, points: Tensor) -> Tensor:
        """Return the objectives [k, m] at `points` [k, n] inside the box."""

    def objective_values(self, points: Tensor) -> Tensor:
        """Return the objectives [k, m] at the points of the box nearest to `points` [k, n]."""
        return self.box_values(points.clamp(0.0, 1.0))

    def start(self, stream: torch.Generator) -> Tensor:
        """Draw a point uniformly from the box."""
        return torch.rand(self.dimension, generator=stream, dtype=torch.float64)


def simplex_points(points: int, objectives: int) -> Tensor:
    """Return convex weights [k, m], float64: the m vertices and others between them, the same ones at every call.

    m = 1: the only one (k = 1); m = 2: `points` equidistant ones; m > 2: the vertices, then draws from Dirichlet(1).

    Raises:
        UserError: `points` is less than 1.
    """
    at_least("simplex", "points", points, 1)
    if objectives == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if objectives == 2:
        first = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
        return torch.stack([1.0 - first, first], dim=1)
    inside = torch.rand(max(points - objectives, 0), objectives, generator=generator("simplex"), dtype=torch.float64)
    spacings = -torch.log1p(-inside)  # exponential; normalised they are uniform on the simplex
    return torch.cat([torch.eye(objectives, dtype=torch.float64), spacings / spacings.sum(dim=1, keepdim=True)])


LARGEST = 1_000_000
"""Default upper limit of a count: parameters, points, rows of a batch."""


def at_least(owner: str, key: str, value: object, least: int, most: int = LARGEST) -> int:
    """Return `value` if it is an integer from `least` to `most`; else raise UserError with `owner` and `key`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{owner}: {key} is {value!r}; allowed are integers >= {least} (and <= {most})")
    return value


def at_least_real(owner: str, key: str, value: object, least: float) -> float:
    """Return `value` if it is a finite number >= `least`; raise UserError that names `owner` and `key` if not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise UserError(f"{owner}: {key} is {value!r}; allowed are finite numbers >= {least:g}")
    return float(value)

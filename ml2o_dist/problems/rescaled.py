"""A wrapper that turns a problem into another: its parameters and losses in other units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ml2o_dist.problems.base import Batch, Problem
from ml2o_dist.problems.layout import ParameterLayout


class Rescaled(Problem):
    """The problem F'(z) = s F(c z), c > 0, s > 0 for each objective: gradients c s times as large, steps c times.

    A rule whose features ignore the gradients' scale sees the same inputs whatever c is, but its steps act c times as
    strongly; trained over many c it must learn from the trajectory whether its steps are too long (ours; the same
    purpose as random scaling of Lv et al. 2017). Front, reference point and minima are multiplied by s; set and bounds
    are divided by c; what is measured on unseen data stays.
    """

    def __init__(self, problem: Problem, scale: float = 1.0, loss_scale: float | Sequence[float] = 1.0) -> None:
        """`scale` is c, `loss_scale` is s: one number, or one for each objective."""
        self.problem, self.scale = problem, scale
        self.loss_scale = torch.as_tensor(loss_scale, device=problem.device, dtype=problem.dtype)  # [] or [m]
        self.instances, self.objectives, self.dimension = problem.instances, problem.objectives, problem.dimension
        self.positive = problem.positive
        self.minima = None if problem.minima is None else self.loss_scale * problem.minima
        self.reference_point = None if problem.reference_point is None else self.loss_scale * problem.reference_point
        self.bounds = None if problem.bounds is None else (problem.bounds[0] / scale, problem.bounds[1] / scale)
        self.device, self.dtype = problem.device, problem.dtype

    @property
    def layout(self) -> ParameterLayout:
        """The wrapped problem's."""
        return self.problem.layout

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return z_0 / c, [P, n]."""
        return self.problem.initial_parameters(seeds) / self.scale

    def sample_batch(self, generator: torch.Generator) -> Batch:
        """Draw as the wrapped problem does."""
        return self.problem.sample_batch(generator)

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the wrapped problem's losses at c z, times s, [P, B, m]."""
        return self.loss_scale * self.problem.sample_losses(self.scale * parameters, batch)

    def jacobian(self, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (c s J(c z), s F(c z)) by the wrapped problem's own way."""
        jacobian, losses = self.problem.jacobian(self.scale * parameters, batch)
        return self.scale * self.loss_scale.unsqueeze(-1) * jacobian, self.loss_scale * losses

    def test_metrics(self, parameters: Tensor) -> dict[str, Tensor]:
        """Return the wrapped problem's figures at c z."""
        return self.problem.test_metrics(self.scale * parameters)

    def data_hashes(self, *, test: bool) -> dict[str, str]:
        """Return the wrapped problem's."""
        return self.problem.data_hashes(test=test)

    def pareto_front(self, points: int) -> Tensor:
        """Return the wrapped problem's front, times s."""
        return self.loss_scale * self.problem.pareto_front(points)

    def pareto_set(self, points: int) -> Tensor:
        """Return the wrapped problem's set, divided by c."""
        return self.problem.pareto_set(points) / self.scale

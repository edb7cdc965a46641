"""The contract check itself: it passes a good problem and finds each kind of broken one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ml2o_dist.problems.base import Problem, ProblemContext
from ml2o_dist.problems.quadratic import Quadratic
from ml2o_dist.runtime.seeding import generator
from tests.problems.contract import check_problem


class WrongJacobian(Quadratic):
    def jacobian(self, parameters: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        jacobian, losses = super().jacobian(parameters, batch)
        return 1.01 * jacobian, losses


class LossesAreNoMean(Quadratic):
    def losses(self, parameters: Tensor, batch: Any) -> Tensor:
        return self.sample_losses(parameters, batch).sum(dim=1)


class Swapped(Quadratic):
    def sample_losses(self, parameters: Tensor, batch: Any) -> Tensor:
        return super().sample_losses(parameters, batch).transpose(1, 2)


class WrongBackward(Quadratic):
    """Differentiates to 1.1 times the gradient: only finite differences can tell."""

    jacobian = Problem.jacobian

    def sample_losses(self, parameters: Tensor, batch: Any) -> Tensor:
        samples = super().sample_losses(parameters, batch)
        return samples + 0.1 * (samples - samples.detach())


class InstancesInteract(Quadratic):
    jacobian = Problem.jacobian

    def sample_losses(self, parameters: Tensor, batch: Any) -> Tensor:
        return super().sample_losses(parameters + 1e-3 * parameters.mean(dim=0), batch)


class MovesItsInput(Quadratic):
    def jacobian(self, parameters: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        jacobian, losses = super().jacobian(parameters, batch)
        parameters.add_(1.0)
        return jacobian, losses


class StartsDependOnNeighbours(Quadratic):
    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        stream = generator("start", *seeds)
        return torch.randn(len(seeds), self.dimension, generator=stream, dtype=self.dtype)


class StartsAreTheSame(Quadratic):
    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        return torch.ones(len(seeds), self.dimension, dtype=self.dtype)


class GlobalRandomness(Quadratic):
    def sample_batch(self, generator: torch.Generator) -> Any:
        torch.rand(1)
        return super().sample_batch(generator)


class BatchesRepeat(Quadratic):
    def sample_batch(self, generator: torch.Generator) -> Any:
        return super().sample_batch(torch.Generator().manual_seed(0))


class FalselyPositive(Quadratic):
    def __init__(self, context: ProblemContext, **settings: Any) -> None:
        super().__init__(context, **settings)
        self.positive = True


class WrongMinima(Quadratic):
    def __init__(self, context: ProblemContext, **settings: Any) -> None:
        super().__init__(context, **settings)
        self.minima = torch.full((self.instances, self.objectives), 1e6, dtype=self.dtype)


class FrontIsDominated(Quadratic):
    def pareto_front(self, points: int) -> Tensor:
        front = super().pareto_front(points)
        return torch.cat([front, front[:1] + 1.0])


class FrontIsNotTheImageOfTheSet(Quadratic):
    def pareto_front(self, points: int) -> Tensor:
        return 0.5 * super().pareto_front(points)


class StartsOutsideItsBox(Quadratic):
    def __init__(self, context: ProblemContext, **settings: Any) -> None:
        super().__init__(context, **settings)
        ones = torch.ones(self.dimension, dtype=self.dtype)
        self.bounds = (0.1 * ones, ones)


@pytest.mark.parametrize("settings", [{}, {"noise": 1.0}])
def test_a_good_problem_passes(settings: dict[str, Any]) -> None:
    check_problem(Quadratic(ProblemContext(instances=3, dtype=torch.float64), **settings))


@pytest.mark.parametrize(
    ("broken", "settings", "complaint"),
    [
        (WrongJacobian, {}, "not close"),
        (WrongBackward, {}, "not close"),
        (LossesAreNoMean, {"noise": 1.0}, "not close"),
        (Swapped, {}, "a noise-free problem has B = 1"),
        (InstancesInteract, {}, "instance 0 depends on another's parameters"),
        (MovesItsInput, {}, "parameters after the call"),
        (StartsDependOnNeighbours, {}, "start 0 when other seeds change"),
        (StartsAreTheSame, {}, "different seeds give the same start"),
        (StartsOutsideItsBox, {}, "starts are feasible"),
        (GlobalRandomness, {"noise": 1.0}, "global generator"),
        (BatchesRepeat, {"noise": 1.0}, "two batches of one generator are equal"),
        (FalselyPositive, {"noise": 1000.0}, "positive is claimed"),
        (WrongMinima, {}, "below the claimed minimum"),
        (FrontIsDominated, {}, "another of its points dominates"),
        (FrontIsNotTheImageOfTheSet, {}, "not close"),
    ],
)
def test_a_broken_problem_is_found(broken: type[Quadratic], settings: dict[str, Any], complaint: str) -> None:
    problem = broken(ProblemContext(instances=3, seed=7, dtype=torch.float64), **settings)
    with pytest.raises(AssertionError, match=complaint):
        check_problem(problem)

"""Problems whose Jacobians are drawn at random, so that a rule meets every kind of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ml2o_dist.problems import Problem
from ml2o_dist.rules.aggregated import AggregatedRule
from ml2o_dist.rules.base import Oracle
from ml2o_dist.runtime.seeding import generator


class Linear(Problem):
    """f_i(z) = <batch_i, z> with a fresh batch [P, m, n] each draw: the Jacobian is the batch, whatever z is."""

    def __init__(self, instances: int, objectives: int, dimension: int, dtype: torch.dtype = torch.float64) -> None:
        self.instances, self.objectives, self.dimension = instances, objectives, dimension
        self.device, self.dtype = torch.device("cpu"), dtype

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(self.dimension, generator=generator(s)).to(self.dtype) for s in seeds])

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        shape = (self.instances, self.objectives, self.dimension)
        return torch.randn(shape, generator=generator, dtype=self.dtype)

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        return torch.einsum("pmn,pn->pm", batch, parameters)[:, None]


class Positive(Linear):
    """f_i(z) = 2 exp(<batch_i, z> / 4): positive, with gradients that point anywhere."""

    positive = True

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        return 2.0 * (super().sample_losses(parameters, batch) / 4.0).exp()


class Broken(Positive):
    """`Positive`, but one entry of instance 1's Jacobian, and with it its first loss, is `value`."""

    value = float("nan")

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        batch = super().sample_batch(generator)
        batch[1, 0, 0] = self.value
        return batch


def run(rule: AggregatedRule, problem: Problem, steps: int) -> list[Tensor]:
    """Return the points z_0 .. z_steps, each [P, n], of a run on batches that are the same at every call."""
    oracle = Oracle(problem, generator("test"))
    parameters = problem.initial_parameters(range(problem.instances))
    state = rule.initial_state(problem.instances, problem.objectives, problem.layout)
    points = [parameters]
    for _ in range(steps):
        parameters, state, _ = rule.step(oracle, parameters, state)
        points.append(parameters)
    return points

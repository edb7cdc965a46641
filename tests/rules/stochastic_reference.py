"""A run of SMG or DSSMG, and the same for one instance of `Bowls` in plain Python, as the formulas are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from torch import Tensor

from ml2o_dist.problems import Problem
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.stochastic import DecreasingSteps, DSSMGState, SMGState
from ml2o_dist.runtime.seeding import generator

Vector = list[float]
Rows = list[Vector]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def nearest_weights(values: Vector) -> Vector:
    """Project onto the simplex by bisection on the threshold."""
    low, high = min(values) - 1.0, max(values)
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(max(v - middle, 0.0) for v in values) > 1.0:
            low = middle
        else:
            high = middle
    return [max(v - high, 0.0) for v in values]


def closest_of_two(rows: Rows) -> Vector:
    """Return the min-norm weights of one or two gradients."""
    if len(rows) == 1:
        return [1.0]
    first, second = rows
    gap = [b - a for a, b in zip(first, second, strict=True)]
    share = min(max(dot(gap, second) / dot(gap, gap), 0.0), 1.0)
    return [share, 1.0 - share]


@dataclass
class Bowl:
    """One instance: curvatures a, centres c [m][n], the loss scale, and a box or none."""

    a: Rows
    c: Rows
    scale: float = 1.0
    box: tuple[float, float] | None = None

    def losses(self, z: Vector, xi: Rows) -> Vector:
        return [
            self.scale * math.fsum(0.5 * a * (x - c) ** 2 + e * x for a, c, e, x in zip(*row, z, strict=True))
            for row in zip(self.a, self.c, xi, strict=True)
        ]

    def gradients(self, z: Vector, xi: Rows) -> Rows:
        return [
            [self.scale * (a * (x - c) + e) for a, c, e, x in zip(*row, z, strict=True)]
            for row in zip(self.a, self.c, xi, strict=True)
        ]

    def project(self, z: Vector) -> Vector:
        return z if self.box is None else [min(max(x, self.box[0]), self.box[1]) for x in z]

    def moved(self, z: Vector, step: float, direction: Vector) -> Vector:
        return self.project([x - step * d for x, d in zip(z, direction, strict=True)])


def search(bowl: Bowl, z: Vector, direction: Vector, weights: Vector, xi: Rows) -> tuple[float, float]:
    """Return (alpha_0, steepening)."""
    alpha = math.sqrt(dot(z, z)) / math.sqrt(dot(direction, direction))
    value = dot(weights, bowl.losses(z, xi))
    while True:
        trial = bowl.moved(z, alpha, direction)
        promised = dot(direction, [x - y for x, y in zip(z, trial, strict=True)])
        achieved = value - dot(weights, bowl.losses(trial, xi))
        if achieved >= promised / 2:
            steepening = max(achieved / promised, 1.0)
            return alpha / steepening, steepening
        alpha /= 2


def combined(weights: Vector, rows: Rows) -> Vector:
    return [dot(weights, list(column)) for column in zip(*rows, strict=True)]


def smg(bowl: Bowl, z: Vector, p: float, draw: Callable[[], Rows]) -> Iterator[Vector]:
    """Yield z_1, z_2, .. ; m <= 2."""
    alpha_0, t = 0.0, 0
    while True:
        xi = draw()
        rows = bowl.gradients(z, xi)
        weights = closest_of_two(rows)
        direction = combined(weights, rows)
        if t == 0:
            alpha_0, _ = search(bowl, z, direction, weights, xi)
        z = bowl.moved(z, alpha_0 / (t + 1) ** p, direction)
        t += 1
        yield z


def dssmg(
    bowl: Bowl, z: Vector, p: float, c: float, draw: Callable[[], Rows], given: float | None = None
) -> Generator[tuple[Vector, Vector], Vector | None, None]:
    """Yield (z_1, lambda_1), (z_2, lambda_2), ..; a point that is sent is where the next step starts instead.

    alpha_0 is searched unless it is `given`.
    """
    weights = [1.0 / len(bowl.a)] * len(bowl.a)
    alpha_0 = gamma_0 = 0.0
    t = 0
    while True:
        first = draw()
        rows = bowl.gradients(z, first)
        direction = combined(weights, rows)
        if t == 0:
            alpha_0, steepening = (given, 1.0) if given else search(bowl, z, direction, weights, first)
            gamma_0 = 1.0 / (c * math.fsum(dot(row, row) for row in rows) * steepening**2)
        alpha, gamma = alpha_0 / (t + 1) ** p, gamma_0 / (t + 1) ** p
        second = combined(weights, bowl.gradients(z, draw()))
        feasible = [(x - y) / alpha for x, y in zip(z, bowl.moved(z, alpha, second), strict=True)]
        z = bowl.moved(z, alpha, direction)
        weights = nearest_weights([w - gamma * dot(row, feasible) for w, row in zip(weights, rows, strict=True)])
        t += 1
        z = (yield z, weights) or z


Trace = list[tuple[Tensor, SMGState]]


def run(rule: DecreasingSteps, problem: Problem, steps: int, start: Tensor | None = None) -> Trace:
    """Return (z_t, state_t) for t = 0 .. steps."""
    oracle = Oracle(problem, generator("test"))
    point = problem.initial_parameters(range(problem.instances)) if start is None else start
    state = rule.initial_state(problem.instances, problem.objectives, problem.layout)
    seen = [(point, state)]
    for _ in range(steps):
        point, state, _ = rule.step(oracle, point, state)
        seen.append((point, state))
    return seen


def weights_of(state: SMGState) -> Tensor:
    assert isinstance(state, DSSMGState)
    return state.weights

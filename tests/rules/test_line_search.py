"""The first step's size: against its own inequality, in any units, and where losses misbehave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.line_search import FirstStep, first_step
from ml2o_dist.runtime.seeding import generator
from tests.rules.bowls import Bowls


class Curve(Bowls):
    """One objective of one parameter (n = 1, m = 1, every instance the same), given as a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64, rows: int = 1) -> None:
        super().__init__(range(rows), m=1, n=1, dtype=dtype)
        self.function = function

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        return self.function(parameters)[:, None]


def search(problem: Problem, point: Tensor, weights: Tensor | None = None) -> tuple[FirstStep, Oracle]:
    oracle = Oracle(problem, generator("search"))
    batch = oracle.draw()
    jacobian, losses = problem.jacobian(point, batch)
    if weights is None:
        weights = torch.full_like(losses, 1.0 / problem.objectives)
    return first_step(oracle, point, torch.einsum("pm,pmn->pn", weights, jacobian), weights, losses, batch), oracle


def on(problem: Curve, start: float, count: int = 1) -> tuple[FirstStep, Oracle]:
    return search(problem, torch.full((count, 1), start, dtype=problem.dtype))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_on_quadratics_it_is_the_first_of_the_ladder_below_the_minimiser(noise: float) -> None:
    problem = Bowls(range(4), m=3, n=6, noise=noise)
    point = problem.initial_parameters(range(4))
    found, oracle = search(problem, point)
    batch = problem.sample_batch(generator("search"))
    direction = problem.jacobian(point, batch)[0].mean(dim=1)
    curvature = (problem.curvatures.mean(dim=1) * direction**2).sum(dim=1)
    minimiser = direction.square().sum(dim=1) / curvature
    start = point.norm(dim=1) / direction.norm(dim=1)
    rungs = torch.log2(start / minimiser).ceil().clamp(min=0)
    torch.testing.assert_close(found.alpha, start / 2**rungs, rtol=1e-12, atol=0)
    assert torch.equal(found.steepening, torch.ones(4, dtype=torch.float64))
    assert (rungs > 0).any()
    assert (oracle.forwards, oracle.backwards, oracle.batches) == (1 + rungs.max(), 0, 1)


def test_the_weights_choose_the_function_that_has_to_fall() -> None:
    problem = Bowls(m=2, n=6)
    point = problem.initial_parameters([3])
    first, second = (search(problem, point, w)[0].alpha for w in torch.eye(2, dtype=torch.float64)[:, None])
    lonely = Bowls(m=2, n=6)
    lonely.curvatures, lonely.centres = (x[:, [1, 1]] for x in (problem.curvatures, problem.centres))
    torch.testing.assert_close(search(lonely, point)[0].alpha, second, rtol=1e-12, atol=0)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 30.0, 1e3])
def test_losses_in_other_units_give_the_same_step(scale: float, dtype: torch.dtype) -> None:
    point = Bowls(range(4)).initial_parameters(range(4)).to(dtype)
    reference, count = search(Bowls(range(4), dtype=dtype), point)
    found, again = search(Bowls(range(4), scale=scale, dtype=dtype), point)
    torch.testing.assert_close(found.alpha * scale, reference.alpha, rtol=1e-5, atol=0)
    assert again.forwards == count.forwards
    assert found.alpha.dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_parameters_in_other_units_give_the_same_step(scale: float) -> None:
    problem, other = Bowls(range(4)), Bowls(range(4))
    other.curvatures, other.centres = problem.curvatures * scale**2, problem.centres / scale
    point = problem.initial_parameters(range(4))
    expected = search(problem, point)[0].alpha / scale**2
    torch.testing.assert_close(search(other, point / scale)[0].alpha, expected, rtol=1e-9, atol=0)


def test_from_zero_the_longest_step_is_one() -> None:
    found, _ = on(Curve(lambda z: 1e-3 * (z - 50.0) ** 2), 0.0)
    torch.testing.assert_close(found.alpha, torch.tensor([10.0], dtype=torch.float64))  # |gradient| is 0.1


@pytest.mark.parametrize("wall", [float("nan"), float("inf")])
def test_trials_that_are_not_finite_are_halved(wall: float) -> None:
    # From 4 the gradient is 8: trials at 0 and 2 meet the wall, 3 does not, and falls by more than half the promise.
    problem = Curve(lambda z: torch.where(z > 2.5, z**2, wall))
    found, oracle = on(problem, 4.0)
    assert found.alpha.item() == 4.0 / 8.0 / 4.0
    assert oracle.forwards == 3


def test_where_every_trial_fails_none_is_found() -> None:
    found, oracle = on(Curve(lambda z: torch.where(z >= 4.0, z**2, float("nan"))), 4.0)
    assert found.alpha.item() == 0.0
    assert oracle.forwards <= 60


@pytest.mark.parametrize("function", [lambda z: 0.0 * z + 1.0, lambda z: z * float("inf"), lambda z: z / 0.0 * 0.0])
def test_without_a_finite_slope_nothing_is_tried(function: Callable[[Tensor], Tensor]) -> None:
    found, oracle = on(Curve(function), 4.0)
    assert found.alpha.item() == 0.0
    assert oracle.forwards == 0


def test_a_promise_below_rounding_is_none() -> None:
    """At a numerically critical point any step would pass by luck; the same slope is seen in float64."""
    single, double = (
        on(Curve(lambda z: 1.0 + 0.5 * (z - 3e-4) ** 2, dtype), 1e-4) for dtype in (torch.float32, torch.float64)
    )
    assert single[0].alpha.item() == 0.0
    assert single[1].forwards == 0
    torch.testing.assert_close(double[0].alpha, torch.tensor([0.5], dtype=torch.float64))  # |z| / |gradient|


def test_a_step_off_a_plateau_is_shortened_by_what_it_found() -> None:
    problem = Curve(lambda z: -torch.exp(-(z**2)))
    point = 2.5
    found, _ = on(problem, point)
    slope = 2 * point * torch.tensor(-(point**2), dtype=torch.float64).exp()
    achieved = 1.0 - torch.tensor(-(point**2), dtype=torch.float64).exp()  # the first trial lands in the well, at 0
    steepening = achieved / (slope * point)
    assert steepening > 10
    torch.testing.assert_close(found.steepening, steepening[None])
    torch.testing.assert_close(found.alpha, (point / slope / steepening)[None])


def test_trials_stay_in_the_box() -> None:
    problem = ProblemSpec.parse("zdt1").build(ProblemContext(4, dtype=torch.float64))
    point = problem.initial_parameters(range(4))
    found, _ = search(problem, point)
    jacobian, losses = problem.jacobian(point, None)
    direction, value = jacobian.mean(dim=1), losses.mean(dim=1)
    start = point.norm(dim=1) / direction.norm(dim=1)
    for p, alpha in enumerate(found.alpha):
        rungs = round(float(torch.log2(start[p] / alpha)))
        for k in range(rungs + 1):
            end = (point[p] - start[p] / 2**k * direction[p]).clamp(0.0, 1.0)
            fall = value[p] - problem.losses(end[None].expand(4, -1), None)[p].mean()
            assert bool(fall >= 0.5 * direction[p] @ (point[p] - end)) == (k == rungs)


def test_an_instance_finds_the_same_step_in_any_company() -> None:
    point = Bowls(range(4)).initial_parameters(range(4))
    together, _ = search(Bowls(range(4), noise=0.5), point)
    alone = torch.cat([search(Bowls([i], noise=0.5), point[i : i + 1])[0].alpha for i in range(4)])
    torch.testing.assert_close(together.alpha, alone, rtol=1e-12, atol=0)
    broken = point.clone()
    broken[1] = float("nan")
    mixed = search(Bowls(range(4), noise=0.5), broken)[0].alpha
    assert mixed[1] == 0.0
    assert torch.equal(mixed[[0, 2, 3]], together.alpha[[0, 2, 3]])

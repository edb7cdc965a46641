"""Criticality against distances to segments, dense grids, rational cases on bounds and its own certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ml2o_dist.evaluation.criticality import criticality, mean_jacobian, projected_min_norm
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.rules.min_norm import min_norm
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator


class Bowls(Problem):
    """f_i(z) = scale/2 |z - c_i|^2, free of noise: the gradients' hull is scale (z - hull of the centres)."""

    def __init__(self, centres: Tensor, instances: int, scale: float = 1.0) -> None:
        self.centres, self.scale = centres, scale
        self.instances, self.objectives, self.dimension = instances, *centres.shape
        self.device, self.dtype = centres.device, centres.dtype
        self.drawn = 0

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        return torch.zeros(self.instances, self.dimension, dtype=self.dtype)

    def sample_batch(self, generator: torch.Generator) -> None:
        self.drawn += 1

    def sample_losses(self, parameters: Tensor, batch: object) -> Tensor:
        return self.scale / 2 * (parameters[:, None] - self.centres).square().sum(dim=2)[:, None]


def build(text: str, instances: int, dtype: torch.dtype = torch.float64) -> Problem:
    return ProblemSpec.parse(text).build(ProblemContext(instances=instances, dtype=dtype))


def projection(v: Tensor, at_lower: Tensor, at_upper: Tensor) -> Tensor:
    """Return minus the projection of -v [.., n] onto the box's tangent cone, written as a clip."""
    low = torch.where(at_upper, 0.0, -math.inf).to(v)  # v < 0: the step -v would leave the box
    high = torch.where(at_lower, 0.0, math.inf).to(v)
    return torch.minimum(torch.maximum(v, low), high)


def simplex_grid(objectives: int, steps: int) -> Tensor:
    """Return all weights [k, m] that are multiples of 1 / steps."""
    if objectives == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    axes = torch.cartesian_prod(*[torch.arange(steps + 1)] * (objectives - 1)).reshape(-1, objectives - 1)
    axes = axes[axes.sum(dim=1) <= steps]
    return torch.cat([axes, steps - axes.sum(dim=1, keepdim=True)], dim=1).double() / steps


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_between_two_bowls_it_is_the_distance_to_the_segment(dtype: torch.dtype, scale: float) -> None:
    centres = torch.tensor([[-1.0, 2.0, 0.5], [3.0, 0.0, 1.5]], dtype=dtype)
    along = torch.tensor([-0.5, 0.0, 0.25, 0.5, 1.0, 1.75], dtype=torch.float64)
    aside = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64) / math.sqrt(5)  # orthogonal to the segment
    start, step = centres[0].double(), (centres[1] - centres[0]).double()
    for offset in (0.0, 0.25):
        points = start + along[:, None] * step + offset * aside
        problem = Bowls(centres, len(points), scale)
        measured = criticality(problem, points.to(dtype))
        beyond = (along - along.clamp(0.0, 1.0)).abs() * step.norm()
        distance = scale * (beyond.square() + offset**2).sqrt()
        rounding = scale * (2e-6 if dtype == torch.float32 else 1e-14)
        torch.testing.assert_close(
            measured.absolute, distance, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=rounding
        )
        norms = scale * (points[:, None] - centres.double()).norm(dim=2).mean(dim=1)
        torch.testing.assert_close(measured.relative, distance / norms, rtol=1e-5, atol=2e-6)
        expected = torch.stack([1 - along.clamp(0, 1), along.clamp(0, 1)], dim=1)
        torch.testing.assert_close(measured.weights, expected, rtol=1e-5, atol=1e-6)
        assert (measured.gap <= rounding * norms).all()
        assert measured.absolute.dtype == measured.losses.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["zdt1", "zdt2", "zdt3", "zdt1[n=2]"])
def test_on_fronts_that_lie_on_the_bound_only_the_projected_one_is_zero(name: str, dtype: torch.dtype) -> None:
    points = build(name, 1, dtype).pareto_set(21)
    problem = build(name, len(points), dtype)
    measured = criticality(problem, points)
    jacobian, _ = mean_jacobian(problem, points)
    unprojected = min_norm(jacobian).squared_norm.sqrt()
    within = slice(1, -1)  # ends: z_1 is on a bound as well, or the last piece of zdt3 ends
    assert (measured.relative <= (1e-6 if dtype == torch.float32 else 1e-9)).all()
    assert (unprojected[within] > 0.04).all()


def test_off_the_front_it_is_not_zero() -> None:
    """zdt1 at (1/4, 1/2, 0 ..): g_2 = (-sqrt(g / f_1) / 2, (1 - sqrt(f_1 / g) / 2) 9 / (n - 1) ..)."""
    problem = build("zdt1[n=3]", 1)
    z = torch.tensor([[0.25, 0.5, 0.0]], dtype=torch.float64)
    big = 1 + 9 / 2 * 0.5
    slope = -0.5 * math.sqrt(big / 0.25)
    rise = (1 - 0.5 * math.sqrt(0.25 / big)) * 9 / 2
    # coordinate 3 is at its lower bound and pushes outwards; so the gradients are (1, 0) and (slope, rise)
    first, second = torch.tensor([1.0, 0.0]).double(), torch.tensor([slope, rise]).double()
    weight = float(((second - first) @ second / (second - first).square().sum()).clamp(0, 1))
    expected = (weight * first + (1 - weight) * second).norm()
    measured = criticality(problem, z)
    torch.testing.assert_close(measured.absolute[0], expected)
    torch.testing.assert_close(measured.weights[0, 0], torch.tensor(weight).double())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("m", "n"), [(1, 5), (2, 1), (2, 4), (2, 60), (3, 6), (3, 30), (5, 12), (8, 20)])
def test_projected_against_a_grid_and_its_certificate(m: int, n: int, scale: float) -> None:
    stream = generator("projected", m, n)
    jacobian = scale * torch.randn(40, m, n, generator=stream, dtype=torch.float64)
    jacobian *= torch.exp(2 * torch.randn(40, m, 1, generator=stream, dtype=torch.float64))
    kinds = torch.randint(0, 4, (40, n), generator=stream)
    at_lower, at_upper = (kinds == 1) | (kinds == 3), (kinds == 2) | (kinds == 3)
    at_lower[:3], at_upper[:3] = True, False
    solved = projected_min_norm(jacobian, at_lower, at_upper)

    assert (solved.weights >= 0).all()
    torch.testing.assert_close(solved.weights.sum(dim=1), torch.ones(40, dtype=torch.float64))
    p = projection(torch.einsum("pm,pmn->pn", solved.weights, jacobian), at_lower, at_upper)
    torch.testing.assert_close(p.square().sum(dim=1), solved.squared_norm, rtol=1e-12, atol=0.0)
    # |p(v')| >= <v', p> / |p| for every v' of the hull, so this bounds the minimum from below.
    norm = solved.squared_norm.sqrt()
    least = torch.einsum("pmn,pn->pm", jacobian, p).amin(dim=1)
    size = jacobian.norm(dim=2).amax(dim=1)
    assert (norm.square() - least <= 1e-12 * size * norm + 1e-15 * size**2).all()
    if m <= 3:
        steps = 150 if m == 3 else 2000
        grid = simplex_grid(m, steps)
        values = projection(torch.einsum("km,pmn->pkn", grid, jacobian), at_lower[:, None], at_upper[:, None]).norm(
            dim=2
        )
        best = values.amin(dim=1)
        assert (norm <= best * (1 + 1e-12) + 1e-14 * size).all()
        assert (best - norm <= size * m / steps).all()


def test_without_bounds_reached_it_is_the_min_norm_point() -> None:
    jacobian = torch.randn(5, 3, 7, generator=generator("free"), dtype=torch.float64)
    nowhere = torch.zeros(5, 7, dtype=torch.bool)
    for mine, other in zip(projected_min_norm(jacobian, nowhere, nowhere), min_norm(jacobian), strict=True):
        assert torch.equal(mine, other)
    everywhere = ~nowhere
    assert torch.equal(projected_min_norm(jacobian, everywhere, everywhere).squared_norm, torch.zeros(5).double())


def test_an_instance_that_is_not_finite_is_nan_alone() -> None:
    jacobian = torch.randn(3, 2, 4, generator=generator("nan"), dtype=torch.float64)
    at_lower = torch.tensor([True, True, False, False]).expand(3, 4)
    none = torch.zeros(3, 4, dtype=torch.bool)
    expected = projected_min_norm(jacobian, at_lower, none)
    for value in (math.nan, math.inf):
        broken = jacobian.clone()
        broken[1, 0, 0] = value
        solved = projected_min_norm(broken, at_lower, none)
        assert solved.squared_norm[1].isnan()
        assert solved.weights[1].isnan().all()
        assert torch.equal(solved.squared_norm[[0, 2]], expected.squared_norm[[0, 2]])


@pytest.mark.parametrize("name", ["zdt1[n=3]", "quadratic[n=3]"])
def test_a_point_that_is_not_finite_is_nan_though_a_box_would_clip_it(name: str) -> None:
    problem = build(name, 3)
    points = problem.initial_parameters([0, 1, 2])
    expected = criticality(problem, points)
    points[1, 0] = math.nan
    measured = criticality(problem, points)
    for field in ("absolute", "relative", "gap"):
        values = getattr(measured, field)
        assert values[1].isnan()
        assert torch.equal(values[[0, 2]], getattr(expected, field)[[0, 2]])


def test_where_all_gradients_vanish_it_is_zero() -> None:
    problem = Bowls(torch.ones(2, 3, dtype=torch.float64), 1)
    measured = criticality(problem, torch.ones(1, 3, dtype=torch.float64))
    assert measured.absolute.tolist() == measured.relative.tolist() == measured.gap.tolist() == [0.0]
    assert measured.losses.tolist() == [[0.0, 0.0]]


def test_a_noise_free_problem_is_evaluated_once() -> None:
    problem = Bowls(torch.eye(2, dtype=torch.float64), 1)
    criticality(problem, torch.zeros(1, 2, dtype=torch.float64), batches=50)
    assert problem.drawn == 1


def test_the_batch_is_fixed_and_the_mean_is_taken_in_float64() -> None:
    problem = build("quadratic[noise=1.0,batch=2]", 3, torch.float32)
    z = problem.initial_parameters([0, 1, 2])
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    jacobian, losses = mean_jacobian(problem, z, batches=5, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    stream = generator("criticality", 7)
    drawn = [problem.jacobian(z, problem.sample_batch(stream)) for _ in range(5)]
    torch.testing.assert_close(
        jacobian, torch.stack([j.double() for j, _ in drawn]).mean(dim=0), rtol=1e-15, atol=1e-15
    )
    torch.testing.assert_close(losses, torch.stack([f.double() for _, f in drawn]).mean(dim=0), rtol=1e-15, atol=1e-15)
    assert torch.equal(mean_jacobian(problem, z, batches=5, seed=7)[0], jacobian)
    assert not torch.equal(mean_jacobian(problem, z, batches=5, seed=8)[0], jacobian)
    with pytest.raises(UserError, match="batches is 0"):
        criticality(problem, z, batches=0)


def test_more_batches_take_away_the_noise_that_lengthens_it() -> None:
    problem = build("quadratic[noise=1.0,batch=4,n=10]", 20)
    points = problem.pareto_set(1).expand(20, -1)
    quiet = build("quadratic[noise=0.0,n=10]", 20)
    assert criticality(quiet, points).absolute[0] < 1e-10  # instance 0 is at its Pareto point
    few, many = (criticality(problem, points, batches=b).absolute[0] for b in (1, 256))
    assert 8 < few / many < 32  # sqrt(256) = 16


def test_on_a_network() -> None:
    problem = build("multidigits[net=mlp,hidden=8]", 2, torch.float32)
    z = problem.initial_parameters([0, 1])
    measured = criticality(problem, z, batches=4)
    jacobian, losses = mean_jacobian(problem, z, batches=4)
    assert torch.equal(measured.losses, losses)
    assert ((measured.relative > 0) & (measured.relative < 1)).all()
    weighted = torch.einsum("pm,pmn->pn", measured.weights, jacobian).norm(dim=1)
    torch.testing.assert_close(weighted, measured.absolute)
    for lam in simplex_grid(2, 50):
        assert (torch.einsum("m,pmn->pn", lam, jacobian).norm(dim=1) >= measured.absolute * (1 - 1e-12)).all()

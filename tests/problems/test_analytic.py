"""Analytic problems against pymoo, closed forms written out again, and finite differences (by the contract)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pymoo.problems import get_problem
from pymoo.util.ref_dirs import get_reference_directions
from scipy.optimize import minimize
from torch import Tensor

from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec, problem_description, problem_names
from ml2o_dist.problems.analytic import ROOT_FLOOR, ZDT3
from ml2o_dist.runtime.errors import UserError
from tests.problems.contract import check_named_problem, dominated
from tests.problems.oracles import gap_between, min_norm

DOUBLE = torch.float64
NAMES = ["cagrad_toy", "dtlz2", "fonseca", "zdt1", "zdt2", "zdt3"]
VARIANTS = [
    *NAMES,
    "fonseca[n=1]",
    "fonseca[n=7]",
    "zdt1[n=2]",
    "zdt3[n=5]",
    "dtlz2[m=2]",
    "dtlz2[m=2,n=2]",
    "dtlz2[m=5]",
]


def build(text: str, instances: int = 1, dtype: torch.dtype = DOUBLE) -> Problem:
    return ProblemSpec.parse(text).build(ProblemContext(instances=instances, dtype=dtype))


def values(problem: Problem, points: Tensor) -> Tensor:
    """Return the objectives [k, m] at `points` [k, n], one at a time, through the public interface."""
    return torch.cat([problem.losses(point[None], None) for point in points])


def random_points(problem: Problem, count: int) -> Tensor:
    """Return `count` starting points, [count, n]."""
    return torch.cat([problem.initial_parameters([seed]) for seed in range(count)])


@pytest.mark.parametrize("text", VARIANTS)
def test_contract(text: str) -> None:
    check_named_problem(text)


def test_names_are_registered_with_a_formula_and_a_source() -> None:
    for name in NAMES:
        assert name in problem_names()
        assert "f_2(z) =" in problem_description(name) or "f_i(z) =" in problem_description(name)
        assert "Source: " in problem_description(name)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("zdt1", {"n_var": 30}),
        ("zdt1[n=2]", {"n_var": 2}),
        ("zdt2", {"n_var": 30}),
        ("zdt3", {"n_var": 30}),
        ("zdt3[n=5]", {"n_var": 5}),
        ("dtlz2", {"n_obj": 3, "n_var": 12}),
        ("dtlz2[m=2,n=2]", {"n_obj": 2, "n_var": 2}),
        ("dtlz2[m=5]", {"n_obj": 5, "n_var": 14}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
def test_values_are_pymoos(text: str, settings: dict[str, int], dtype: torch.dtype, tolerance: float) -> None:
    problem = build(text, dtype=dtype)
    points = torch.cat([random_points(problem, 20), problem.pareto_set(9), torch.stack(problem.bounds or ())])
    theirs = get_problem(text.split("[")[0], **settings).evaluate(points.double().numpy())
    np.testing.assert_allclose(values(problem, points).numpy(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "count"), [("zdt1", "n_pareto_points"), ("zdt2", "n_pareto_points"), ("zdt3", "n_points")]
)
def test_fronts_of_zdt_are_pymoos(name: str, count: str) -> None:
    front = build(name).pareto_front(2000).numpy()
    theirs = get_problem(name).pareto_front(**{count: 2000})
    assert front.shape == (2000, 2)
    assert gap_between(front, theirs) < 0.012  # the root is steep at 0, and zdt3's pieces are sampled differently
    assert not dominated(torch.tensor(front), torch.tensor(theirs)).any()


def test_pieces_of_zdt3_end_in_minima_and_begin_at_the_height_of_the_last_one() -> None:
    def height(first: float) -> float:
        return 1 - math.sqrt(first) - first * math.sin(10 * math.pi * first)

    ends = [end for _, end in ZDT3.PIECES]
    for end in ends:
        assert height(end) < min(height(end - 1e-6), height(end + 1e-6))
    for (start, _), before in zip(ZDT3.PIECES[1:], ends[:-1], strict=True):
        assert height(start) == pytest.approx(height(before), abs=1e-12)
        assert height(start - 1e-6) > height(before) > height(start + 1e-6)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_front_of_dtlz2_is_the_sphere(m: int) -> None:
    front = build(f"dtlz2[m={m}]").pareto_front(2000 if m == 3 else 50)
    torch.testing.assert_close(front.norm(dim=1), torch.ones(len(front), dtype=DOUBLE))
    assert (front >= 0).all()
    for axis in torch.eye(m, dtype=DOUBLE):
        assert (front - axis).norm(dim=1).min() < 1e-12
    if m == 3:
        theirs = get_problem("dtlz2").pareto_front(get_reference_directions("das-dennis", 3, n_partitions=20))
        assert gap_between(front.numpy(), theirs) < 0.15


@pytest.mark.parametrize("text", VARIANTS)
def test_minima_are_reached_and_not_undercut(text: str) -> None:
    problem = build(text)
    assert problem.minima is not None
    torch.testing.assert_close(problem.pareto_front(11).amin(dim=0), problem.minima[0])
    assert (values(problem, random_points(problem, 300)) >= problem.minima[0] - 1e-12).all()


@pytest.mark.parametrize("text", VARIANTS)
def test_no_feasible_point_dominates_the_front(text: str) -> None:
    """Random points, and points near the set, which are the ones that could."""
    problem = build(text)
    near = problem.pareto_set(200)
    near = problem.project(
        near + 0.02 * torch.randn(near.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    )
    tried = values(problem, torch.cat([random_points(problem, 200), near]))
    assert not dominated(problem.pareto_front(50), tried).any()


@pytest.mark.parametrize("text", ["fonseca[n=1]", "fonseca", "fonseca[n=7]", "cagrad_toy"])
def test_unconstrained_pareto_points_are_critical_and_points_beyond_the_ends_are_not(text: str) -> None:
    problem = build(text)
    points = problem.pareto_set(9)
    for point in points:
        assert min_norm(problem.jacobian(point[None], None)[0][0].numpy()) < 1e-8
    for beyond in (1.5 * points[:1], 1.5 * points[-1:]):
        assert min_norm(problem.jacobian(beyond, None)[0][0].numpy()) > 1e-3


@pytest.mark.parametrize("n", [1, 2, 7])
def test_fonseca_is_its_formula(n: int) -> None:
    problem = build(f"fonseca[n={n}]")
    for point in random_points(problem, 10):
        z = point.tolist()
        expected = [1 - math.exp(-sum((x - sign / math.sqrt(n)) ** 2 for x in z)) for sign in (1, -1)]
        assert problem.losses(point[None], None)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_front_of_fonseca_is_its_closed_form_and_concave() -> None:
    front = build("fonseca").pareto_front(101)
    first, second = front[:-1].unbind(dim=1)
    torch.testing.assert_close(second, 1 - torch.exp(-((2 - torch.sqrt(-torch.log1p(-first))) ** 2)))
    assert front[50].sum() > 1.2  # 2 (1 - 1/e), far above the chord's 1 - exp(-4)


@pytest.mark.parametrize("n", [1, 2, 20])
def test_fonseca_starts_where_there_is_a_gradient(n: int) -> None:
    """In a cube whose mean squared distance from 0 is that of [-2, 2]^2 for every n >= 2."""
    starts = random_points(build(f"fonseca[n={n}]"), 400)
    half_width = 2 * math.sqrt(2 / max(n, 2))
    assert starts.abs().max() <= half_width
    assert starts.min() < -0.98 * half_width
    assert starts.max() > 0.98 * half_width


@pytest.mark.parametrize("name", ["zdt1", "zdt2", "zdt3", "dtlz2"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_outside_the_box_losses_are_those_of_the_nearest_feasible_point(name: str, dtype: torch.dtype) -> None:
    problem = build(name, dtype=dtype)
    outside = problem.initial_parameters([0])
    outside[0, 0], outside[0, 1] = -0.5, 3.0
    jacobian, losses = problem.jacobian(outside, None)
    assert torch.equal(losses, problem.losses(problem.project(outside), None))
    assert jacobian.isfinite().all()
    assert (jacobian[0, :, :2] == 0).all()


@pytest.mark.parametrize("name", ["zdt1", "zdt3"])
def test_the_root_is_exact_down_to_its_floor_and_has_a_bounded_slope_at_zero(name: str) -> None:
    problem = build(name)

    def at(first: float) -> tuple[Tensor, Tensor]:
        point = torch.zeros(1, problem.dimension, dtype=DOUBLE)
        point[0, 0] = first
        return problem.jacobian(point, None)

    waves = 1.0 if name == "zdt3" else 0.0
    for first in (ROOT_FLOOR, 3e-7, 1e-3, 0.5):
        exact = 1 - math.sqrt(first) - waves * first * math.sin(10 * math.pi * first)
        assert at(first)[1][0, 1].item() == pytest.approx(exact, abs=1e-15)
    assert at(0.0)[1][0].tolist() == [0.0, 1.0]
    assert at(0.0)[0][0, 1, 0].item() == pytest.approx(-1 / math.sqrt(ROOT_FLOOR))
    for first in np.linspace(0.0, ROOT_FLOOR, 20):
        jacobian, losses = at(first)
        assert abs(losses[0, 1].item() - (1 - math.sqrt(first))) <= 2.6e-5
        assert jacobian.isfinite().all()


def toy_loss(i: int, first: float, second: float) -> float:
    """Objective i of the CAGrad toy, one number at a time, from the published code's formula."""
    side = 7 if i == 0 else -7
    bend = math.tanh(-second)
    valley = 0.5 * (-first - 7) - bend if i == 0 else 0.5 * (-first + 3) + bend + 2
    log = math.log(max(abs(valley), 0.000005)) + 6
    bowl = ((-first + side) ** 2 + 0.1 * (-second - 8) ** 2) / 10 - 20
    return max(math.tanh(0.5 * second), 0) * log + max(math.tanh(-0.5 * second), 0) * bowl


def test_cagrad_toy_is_the_published_codes_formula() -> None:
    problem = build("cagrad_toy")
    published_starts = torch.tensor([[-8.5, 7.5], [-8.5, -5.0], [9.0, 9.0]], dtype=DOUBLE)
    # the valleys tend to z_1 = -5 and z_1 = 5 as z_2 grows; on their floors the logarithm is cut off
    floors = torch.tensor([[-5.0, 30.0], [5.0, 30.0], [0.0, 0.0]], dtype=DOUBLE)
    for point in torch.cat([published_starts, floors, random_points(problem, 20)]):
        expected = [toy_loss(i, *point.tolist()) for i in (0, 1)]
        assert problem.losses(point[None], None)[0].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert problem.losses(floors[:1], None)[0, 0].item() == pytest.approx(math.log(5e-6) + 6)


def test_cagrad_toy_is_finite_on_the_floors_of_its_valleys() -> None:
    problem = build("cagrad_toy", dtype=torch.float32)
    for point in ([-5.0, 30.0], [5.0, 30.0], [0.0, 0.0], [1e4, -1e4]):
        jacobian, losses = problem.jacobian(torch.tensor([point]), None)
        assert jacobian.isfinite().all()
        assert losses.isfinite().all()


def test_pareto_set_of_cagrad_toy() -> None:
    """Its middle is the one that the published code marks; each point minimises a weighted sum; none is dominated."""
    problem = build("cagrad_toy")
    points = problem.pareto_set(15)
    assert points[7].tolist() == pytest.approx([0.0, -8.3552], abs=1e-4)
    assert points[:, 0].tolist() == pytest.approx(list(range(-7, 8)))
    for point in points:
        weight = (point[0].item() + 7) / 14

        def weighted(z: np.ndarray, weight: float = weight) -> float:
            return weight * toy_loss(0, *z) + (1 - weight) * toy_loss(1, *z)

        found = minimize(weighted, [0.0, -6.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
        assert point.tolist() == pytest.approx(found.x.tolist(), abs=1e-3)
    axis = torch.linspace(-11, 11, 221, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    everywhere = build("cagrad_toy", instances=len(grid)).losses(grid, None)
    assert not dominated(problem.pareto_front(50), everywhere).any()


def test_all_instances_are_one_function_and_dtypes_start_alike() -> None:
    for name in NAMES:
        many, single = build(name, instances=3), build(name, dtype=torch.float32)
        starts = many.initial_parameters([5, 6, 7])
        torch.testing.assert_close(many.losses(starts, None), values(build(name), starts))
        torch.testing.assert_close(starts[1:2].float(), single.initial_parameters([6]))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fonseca[n=0]", "fonseca: n is 0"),
        ("fonseca[n=two]", "fonseca.*n .*'two'"),
        ("zdt1[n=1]", "zdt1: n is 1;.*integers >= 2"),
        ("zdt2[n=2.5]", "zdt2: n is 2.5"),
        ("zdt3[n=-1]", "zdt3: n is -1"),
        ("dtlz2[m=1]", "dtlz2: m is 1;.*integers >= 2"),
        ("dtlz2[n=-1]", "dtlz2: n is -1"),
        ("dtlz2[m=4,n=3]", r"dtlz2: n is 3;.*>= m = 4.*0.*m \+ 9 = 13"),
    ],
)
def test_wrong_settings_are_named(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(text)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_calls_are_refused(name: str) -> None:
    problem = build(name, instances=2)
    with pytest.raises(UserError, match="points is 0"):
        problem.pareto_set(0)
    with pytest.raises(ValueError, match="3 seeds for 2 instances"):
        problem.initial_parameters([1, 2, 3])

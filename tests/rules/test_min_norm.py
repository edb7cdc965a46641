"""Min-norm weights and the projection onto the simplex, against exact arithmetic, quadratic programs and torchjd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import quadprog
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchjd.aggregation import MGDA

from ml2o_dist.rules.min_norm import min_norm, min_norm_weights, project_to_simplex

Matrix = NDArray[np.float64]
Sampler = Callable[[np.random.Generator, int], Matrix]


def generic(rng: np.random.Generator, m: int) -> Matrix:
    return rng.normal(size=(m, rng.integers(1, 9)))


def same_side(rng: np.random.Generator, m: int) -> Matrix:
    """Gradients with positive products: the min-norm point is not 0."""
    return np.abs(rng.normal(size=(m, 6)))


def parallel(rng: np.random.Generator, m: int) -> Matrix:
    return np.outer(rng.uniform(0.5, 2.0, m), rng.normal(size=5))


def opposite(rng: np.random.Generator, m: int) -> Matrix:
    return np.outer(rng.uniform(0.5, 2.0, m) * np.resize([1.0, -1.0], m), rng.normal(size=5))


def rank_two(rng: np.random.Generator, m: int) -> Matrix:
    return rng.normal(size=(m, 2)) @ rng.normal(size=(2, 7))


def twins(rng: np.random.Generator, m: int) -> Matrix:
    return rng.normal(size=(1, 6)) + 1e-7 * rng.normal(size=(m, 6))


def unlike(rng: np.random.Generator, m: int) -> Matrix:
    """Rows of very different length."""
    return generic(rng, m) * 10.0 ** rng.uniform(-8, 8, size=(m, 1))


def unlike_opposite(rng: np.random.Generator, m: int) -> Matrix:
    return opposite(rng, m) * 10.0 ** rng.uniform(-8, 8, size=(m, 1))


SAMPLERS = [generic, same_side, parallel, opposite, rank_two, twins, unlike, unlike_opposite]
SCALES = [1e-8, 1e-3, 1.0, 1e8]


def exact_squared_norm(jacobian: Matrix) -> float:
    """Return min over the simplex of |J^T w|^2 in rational arithmetic: the best stationary point of all faces."""
    rows = [[Fraction(float(x)) for x in row] for row in jacobian]
    gram = [[sum((a * b for a, b in zip(one, other, strict=True)), Fraction()) for other in rows] for one in rows]
    best = min(gram[i][i] for i in range(len(rows)))
    for size in range(2, len(rows) + 1):
        for face in itertools.combinations(range(len(rows)), size):
            system = [[gram[i][j] for j in face] + [Fraction(-1), Fraction()] for i in face]
            solution = solve([*system, [Fraction(1)] * size + [Fraction(), Fraction(1)]])
            if solution is not None and all(w >= 0 for w in solution[:-1]):
                best = min(best, solution[-1])  # G w = mu 1 on the face, so mu = w^T G w
    return float(best)


def solve(system: list[list[Fraction]]) -> list[Fraction] | None:
    """Gauss-Jordan on [A | b]; None where A is singular."""
    size = len(system)
    for column in range(size):
        pivot = next((i for i in range(column, size) if system[i][column] != 0), None)
        if pivot is None:
            return None
        system[column], system[pivot] = system[pivot], system[column]
        system[column] = [x / system[column][column] for x in system[column]]
        for i in range(size):
            if i != column and system[i][column] != 0:
                system[i] = [x - system[i][column] * y for x, y in zip(system[i], system[column], strict=True)]
    return [row[-1] for row in system]


def solved(jacobian: Matrix) -> tuple[Matrix, float, float]:
    weights, squared, gap = min_norm(torch.from_numpy(jacobian)[None])
    return weights[0].numpy(), squared.item(), gap.item()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_the_squared_norm_is_the_rational_one(m: int, sampler: Sampler, scale: float) -> None:
    rng = np.random.default_rng(m)
    for _ in range(6):
        jacobian = scale * sampler(rng, m)
        weights, squared, gap = solved(jacobian)
        lengths = np.linalg.norm(jacobian, axis=1)
        assert (weights >= 0).all()
        assert weights.sum() == pytest.approx(1.0, abs=1e-15)
        # a unit of rounding of the shortest gradient, which bounds the answer
        assert abs(squared - exact_squared_norm(jacobian)) <= 2e-15 * lengths.min() ** 2
        assert squared == pytest.approx(((jacobian.T @ weights) ** 2).sum(), rel=1e-9, abs=1e-15 * lengths.min() ** 2)
        assert 0.0 <= gap <= (1e-9 if sampler is unlike_opposite else 1e-12) * lengths.min() * lengths.max()


@pytest.mark.parametrize("sampler", [same_side, parallel, twins, lambda rng, m: 1e-8 * same_side(rng, m)])
@pytest.mark.parametrize("m", range(2, 9))
def test_the_point_is_the_quadratic_program_s(m: int, sampler: Sampler) -> None:
    """The v of least norm with <g_i, v> >= 1 for all i is v* / |v*|^2: a strictly convex program for any rank."""
    rng = np.random.default_rng(10 + m)
    for _ in range(5):
        jacobian = sampler(rng, m)
        unit = np.linalg.norm(jacobian, axis=1).min()
        n = jacobian.shape[1]
        v, *_ = quadprog.solve_qp(np.eye(n), np.zeros(n), jacobian.T / unit, np.ones(m))
        weights, squared, _ = solved(jacobian)
        np.testing.assert_allclose(jacobian.T @ weights / unit, v / (v @ v), rtol=0, atol=1e-7)
        assert squared / unit**2 == pytest.approx(1.0 / (v @ v), rel=1e-9)


@pytest.mark.parametrize("m", range(2, 9))
def test_the_weights_are_the_quadratic_program_s_where_they_are_unique(m: int) -> None:
    rng = np.random.default_rng(20 + m)
    for _ in range(10):
        jacobian = rng.normal(size=(m, m + 3)) + 0.3
        constraints = np.column_stack([np.ones(m), np.eye(m)])
        expected, *_ = quadprog.solve_qp(jacobian @ jacobian.T, np.zeros(m), constraints, np.eye(1, m + 1)[0], meq=1)
        np.testing.assert_allclose(solved(jacobian)[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("m", range(1, 9))
def test_zero_in_the_hull_is_found(m: int) -> None:
    """Gradients that cancel under known positive weights, and gradients that vanish."""
    rng = np.random.default_rng(30 + m)
    for scale in SCALES:
        jacobian = scale * rng.normal(size=(m, 12))
        known = rng.dirichlet(np.ones(m))
        jacobian[-1] = -(known[:-1] @ jacobian[:-1]) / known[-1]
        lengths = np.linalg.norm(jacobian, axis=1)
        weights, squared, _ = solved(jacobian)
        assert squared <= (1e-15 * lengths.max()) ** 2
        if m > 1:
            np.testing.assert_allclose(weights, known, atol=1e-10)
        jacobian = scale * rng.normal(size=(m, 12))
        jacobian[[0, -1]] = 0.0
        share = 1.0 / len({0, m - 1})
        assert solved(jacobian) == (pytest.approx([share if i in {0, m - 1} else 0.0 for i in range(m)]), 0.0, 0.0)


def test_two_gradients_have_a_closed_form() -> None:
    rng = np.random.default_rng(40)
    for first, second in rng.normal(size=(50, 2, 3)):
        free = (second - first) @ second / ((second - first) @ (second - first))
        expected = min(max(free, 0.0), 1.0)
        np.testing.assert_allclose(solved(np.stack([first, second]))[0], [expected, 1 - expected], atol=1e-13)


@pytest.mark.parametrize("m", [2, *(pytest.param(m, marks=pytest.mark.long) for m in (3, 4, 5, 6, 7, 8))])
def test_torchjd_s_frank_wolfe_comes_near_from_above(m: int) -> None:
    rng = np.random.default_rng(50 + m)
    for sampler in (generic, same_side, rank_two):
        jacobian = sampler(rng, m)
        theirs = MGDA(epsilon=1e-6, max_iters=10_000)(torch.from_numpy(jacobian)).square().sum().item()
        ours = solved(jacobian)[1]
        assert -1e-14 <= (theirs - ours) / (jacobian**2).sum(axis=1).mean() <= 5e-3


def test_the_gap_certifies_any_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the optimum it is rounding; so the solver is made to answer 1/m, and the claims are held against the truth."""
    jacobian = torch.from_numpy(np.random.default_rng(60).normal(size=(40, 5, 7)))
    best = min_norm(jacobian)
    optimum = torch.einsum("pm,pmn->pn", best.weights, jacobian)
    assert best.gap.max() <= 1e-14
    monkeypatch.setattr("ml2o_dist.rules.min_norm._simplex_weights", lambda cosines, lengths: np.full(5, 0.2))
    _, squared, gap = min_norm(jacobian)
    point = jacobian.mean(dim=1)
    products = torch.einsum("pmn,pn->pm", jacobian, point)
    torch.testing.assert_close(squared, point.square().sum(dim=1))
    torch.testing.assert_close(gap, squared - products.min(dim=1).values)
    assert (gap > 0.1).all()
    assert ((point - optimum).square().sum(dim=1) <= gap).all()
    assert ((squared - gap) / squared.sqrt() <= optimum.norm(dim=1)).all()


def test_instances_are_solved_alone_and_one_that_is_not_finite_is_nan() -> None:
    jacobian = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    reference = min_norm(jacobian)
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = jacobian.clone()
        broken[1, 0, 2] = value
        for part, expected in zip(min_norm(broken), reference, strict=True):
            assert part[1].isnan().all()
            assert torch.equal(part[[0, 2, 3]], expected[[0, 2, 3]])
    alone = torch.cat([min_norm(jacobian[i : i + 1]).weights for i in range(4)])
    torch.testing.assert_close(alone, reference.weights, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype: torch.dtype) -> None:
    jacobian = torch.randn(2, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    kept = jacobian.clone()
    assert min_norm_weights(jacobian).dtype == dtype
    assert {part.dtype for part in min_norm(jacobian)} == {torch.float64}
    torch.testing.assert_close(min_norm_weights(jacobian), min_norm(jacobian).weights.to(dtype))
    assert torch.equal(jacobian, kept)


def exact_projection(values: Matrix) -> list[float]:
    """Return the nearest point of the simplex in rational arithmetic: the one support that meets its own conditions."""
    exact = [Fraction(float(value)) for value in values]
    for size in range(1, len(exact) + 1):
        for face in itertools.combinations(range(len(exact)), size):
            threshold = (sum((exact[i] for i in face), Fraction()) - 1) / size
            if all((value > threshold) == (i in face) for i, value in enumerate(exact)):
                return [float(max(value - threshold, Fraction())) for value in exact]
    raise AssertionError("no support is right")


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("m", range(1, 9))
def test_the_projection_is_the_rational_one_and_the_quadratic_program_s(m: int, scale: float) -> None:
    rng = np.random.default_rng(70 + m)
    values = scale * rng.normal(size=(20, m)) + rng.normal(size=(20, 1))
    values[0] = values[0, 0]  # all alike
    values[1] = np.eye(1, m)[0]  # on the simplex already
    values[2, : m // 2] = values[2, 0]
    projected = project_to_simplex(torch.from_numpy(values)).numpy()
    constraints = np.column_stack([np.ones(m), np.eye(m)])
    for value, point in zip(values, projected, strict=True):
        np.testing.assert_allclose(point, exact_projection(value), rtol=0, atol=1e-15 * max(scale, 4.0))
        if scale <= 1.0:  # beyond, the program's own rounding shows
            expected, *_ = quadprog.solve_qp(np.eye(m), value, constraints, np.eye(1, m + 1)[0], meq=1)
            np.testing.assert_allclose(point, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("m", range(2, 9))
def test_a_large_common_offset_costs_no_accuracy(m: int) -> None:
    values = np.random.default_rng(80 + m).normal(size=(20, m)) + 1e8
    for value, point in zip(values, project_to_simplex(torch.from_numpy(values)).numpy(), strict=True):
        np.testing.assert_allclose(point, exact_projection(value), rtol=0, atol=1e-14)


def test_projections_known_by_hand() -> None:
    values = torch.tensor([[0.2, 0.3, 0.5], [1.0, 1.0, 0.0], [5.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [0.9, 0.5, -3.0]])
    expected = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.7, 0.3, 0.0]])
    torch.testing.assert_close(project_to_simplex(values), expected)
    assert torch.equal(project_to_simplex(torch.tensor([[7.0], [-7.0]])), torch.ones(2, 1))


def test_a_projection_keeps_precision_and_lets_nan_through() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    broken = values.clone()
    broken[1, 2] = float("nan")
    projected: Tensor = project_to_simplex(broken)
    assert projected.dtype == torch.float32
    assert projected[1].isnan().all()
    assert torch.equal(projected[[0, 2]], project_to_simplex(values)[[0, 2]])
    shifted = project_to_simplex(values + 1e3)  # 1e3: float32 keeps 6e-5 of the values
    torch.testing.assert_close(shifted, project_to_simplex(values), rtol=0, atol=2e-4)

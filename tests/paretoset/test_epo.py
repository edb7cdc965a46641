"""EPO's weights: against all vertices of its linear program, and on problems whose front is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from ml2o_dist.paretoset.epo import epo_weights, non_uniformity
from ml2o_dist.problems import ProblemContext, ProblemSpec
from tests.crossed import crossed

Array = NDArray[np.float64]


def program(r: Array, f: Array, gram: Array) -> tuple[Array, Array, Array]:
    """Return (gain, rows, bounds) of max gain.alpha over the simplex with rows alpha >= bounds: the paper's text."""
    m = len(r)
    share = r * f / (r * f).sum()
    mu = float((share * np.log(m * share)).sum())
    pull = gram @ (r * (np.log(m * share) - mu))
    if mu > 1e-4:
        rows, bounds = [], []
        for j in range(m):
            bound = None if pull[j] > 0 else pull[j]
            if not (pull > 0).any() or share[j] == share.max():
                bound = 0.0
            if bound is not None:
                rows.append(gram[j])
                bounds.append(bound)
        return pull, np.array(rows).reshape(-1, m), np.array(bounds)
    return gram.sum(axis=1), np.vstack([gram, pull]), np.array([0.0] * m + [-max(0.0, -pull.max())])


def best_vertex(gain: Array, rows: Array, bounds: Array) -> float | None:
    """Return the program's value by trying every vertex; None where none is feasible."""
    m = len(gain)
    faces, levels = np.vstack([np.eye(m), rows]), np.concatenate([np.zeros(m), bounds])
    chosen = np.array(list(itertools.combinations(range(len(faces)), m - 1)))
    systems = np.concatenate([faces[chosen], np.ones((len(chosen), 1, m))], axis=1)
    sides = np.concatenate([levels[chosen], np.ones((len(chosen), 1))], axis=1)
    regular = np.abs(np.linalg.det(systems)) > 1e-12
    vertices = np.linalg.solve(systems[regular], sides[regular][..., None])[..., 0]
    feasible = (vertices @ faces.T >= levels - 1e-9).all(axis=1)
    return float((vertices[feasible] @ gain).max()) if feasible.any() else None


def draw(m: int, seed: int, balanced: bool) -> tuple[Array, Array, Array]:
    """Draw r, f and J with |J J^T| about 1."""
    draws = np.random.default_rng([m, seed, balanced])
    jacobian = draws.normal(size=(m, int(draws.integers(2, m + 4)))) * np.exp(draws.normal(size=(m, 1)))
    jacobian /= np.sqrt(np.abs(jacobian @ jacobian.T).max())
    r = draws.dirichlet(np.ones(m)) * 0.9 + 0.1 / m
    f = np.exp(0.003 * draws.normal(size=m)) / r if balanced else np.exp(draws.normal(size=m))
    return r, f, jacobian


def weights(r: Array, f: Array, jacobian: Array) -> Tensor | None:
    return epo_weights(*(torch.from_numpy(each) for each in (r, f, jacobian)))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("m", "cases"), [(2, 60), (3, 60), (5, 30), (8, 4)])
def test_no_vertex_is_better(m: int, cases: int, balanced: bool) -> None:
    solved = 0
    for seed in range(cases):
        r, f, jacobian = draw(m, seed, balanced)
        gain, rows, bounds = program(r, f, jacobian @ jacobian.T)
        best, alpha = best_vertex(gain, rows, bounds), weights(r, f, jacobian)
        if best is None:
            assert alpha is None or (rows @ alpha.numpy() >= bounds - 1e-6).all()  # feasible up to the tolerance
            continue
        assert alpha is not None
        solved += 1
        assert alpha.dtype == torch.float64
        assert (alpha >= 0).all()
        assert float(alpha.sum()) == pytest.approx(1, abs=1e-12)
        assert (rows @ alpha.numpy() >= bounds - 1e-6).all()
        assert gain @ alpha.numpy() == pytest.approx(best, abs=1e-6)
    assert solved > cases / 2


def test_a_program_without_a_solution_gives_none() -> None:
    none = 0
    for seed in range(300):
        r, f, jacobian = draw(3, seed, balanced=True)
        if best_vertex(*program(r, f, jacobian @ jacobian.T)) is None and weights(r, f, jacobian) is None:
            none += 1
    assert none > 0


@crossed("m, factor", [2, 3, 5], [1e-10, 1e-5, 0.3, 1e5, 1e10])
def test_the_weights_do_not_depend_on_the_scale(m: int, factor: float) -> None:
    for seed in range(10):
        for balanced in (False, True):
            r, f, jacobian = draw(m, seed, balanced)
            alpha = weights(r, f, jacobian)
            for scaled in (weights(r, f, factor * jacobian), weights(r, factor * f, jacobian)):
                assert (alpha is None) == (scaled is None)
                if alpha is not None and scaled is not None:
                    torch.testing.assert_close(scaled, alpha, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_weights_gives_none(dtype: torch.dtype) -> None:
    r, f, jacobian = torch.tensor([0.5, 0.5]), torch.ones(2, dtype=dtype), torch.eye(2, 3, dtype=dtype)
    assert epo_weights(r, f, jacobian) is not None
    assert epo_weights(r, f, 0 * jacobian) is None
    for bad in (math.nan, math.inf):
        broken = jacobian.clone()
        broken[0, 0] = bad
        assert epo_weights(r, f, broken) is None
        assert epo_weights(r, torch.tensor([1.0, bad], dtype=dtype), jacobian) is None
    for loss in (0.0, -1.0):
        assert epo_weights(r, torch.tensor([1.0, loss], dtype=dtype), jacobian) is None


def test_non_uniformity_is_zero_on_the_ray_alone() -> None:
    r = np.array([0.2, 0.3, 0.5])
    assert non_uniformity(r, 7 / r) == pytest.approx(0, abs=1e-15)
    assert non_uniformity(r, np.array([1.0, 1.0, 1.0])) == pytest.approx(sum(r * np.log(3 * r)))  # by hand
    assert non_uniformity(np.array([1.0, 1e-12]), np.ones(2)) == pytest.approx(math.log(2), rel=1e-9)  # the most


Objectives = Callable[[Tensor], tuple[Tensor, Tensor]]
"""z [n] -> the losses [m] and their Jacobian [m, n]."""

CENTRES = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.5, 1.5]], dtype=torch.float64)
LEAST = 0.5


def quadratics(count: int, least: float = LEAST) -> Objectives:
    """|z - c_i|^2 + `least`; with 0 some runs are held at the minimum of one, where r f is 0 without a gradient."""
    return lambda z: ((z - CENTRES[:count]).square().sum(dim=1) + least, 2 * (z - CENTRES[:count]))


def descend(objectives: Objectives, start: list[float], preference: list[float], steps: int) -> Tensor:
    """Follow -J^T alpha, with steps that fall to nothing, and return the last point."""
    z, r = torch.tensor(start, dtype=torch.float64), torch.tensor(preference, dtype=torch.float64)
    for k in range(steps):
        losses, jacobian = objectives(z)
        alpha = epo_weights(r, losses, jacobian)
        if alpha is not None:
            z = z - 0.15 * (1 - k / steps) * jacobian.T @ alpha
    return z


@crossed(
    "preference, start",
    [[0.5, 0.5], [0.2, 0.8], [0.7, 0.3]],
    [[1.0, 0.0], [0.1, 0.0], [3.0, 2.0], [-1.0, -2.0]],
)
def test_two_quadratics_end_on_the_ray(preference: list[float], start: list[float]) -> None:
    z = descend(quadratics(2), start, preference, steps=120)
    first, second = (torch.tensor(preference) * quadratics(2)(z)[0]).tolist()
    assert first == pytest.approx(second, rel=0.05)
    assert abs(float(z[1])) < 0.01  # the set is the segment between the centres
    expected = brentq(lambda x: preference[0] * (x**2 + LEAST) - preference[1] * ((2 - x) ** 2 + LEAST), 0, 2)
    assert float(z[0]) == pytest.approx(expected, abs=0.02)


@crossed("preference, start", [[1 / 3] * 3, [0.5, 0.25, 0.25], [0.3, 0.3, 0.4]], [[0.8, 0.5], [3.0, 3.0]])
def test_three_quadratics_end_on_the_ray(preference: list[float], start: list[float]) -> None:
    z = descend(quadratics(3), start, preference, steps=150)
    weighted = torch.tensor(preference) * quadratics(3)(z)[0]
    assert float(weighted.max() / weighted.min()) < 1.05
    corners = torch.cat([CENTRES.T, torch.ones(1, 3, dtype=torch.float64)])
    barycentric = torch.linalg.solve(corners, torch.cat([z, torch.ones(1, dtype=torch.float64)]))
    assert (barycentric > -0.02).all()  # the set is the triangle of the centres


@pytest.mark.parametrize(
    "preference",
    [*(pytest.param(preference, marks=pytest.mark.long) for preference in ([0.5, 0.5], [0.4, 0.6])), [0.8, 0.2]],
)
def test_a_concave_front_is_reached_between_its_ends(preference: list[float]) -> None:
    fonseca = ProblemSpec.parse("fonseca[n=2]").build(ProblemContext(dtype=torch.float64))

    def objectives(z: Tensor) -> tuple[Tensor, Tensor]:
        jacobian, losses = fonseca.jacobian(z[None], None)
        return losses[0], jacobian[0]

    z = descend(objectives, [0.3, -0.4], preference, steps=200)
    first, second = (torch.tensor(preference) * objectives(z)[0]).tolist()
    assert first == pytest.approx(second, rel=0.05)
    assert float(z[0]) == pytest.approx(float(z[1]), abs=0.02)  # the set is z_1 = z_2 between the wells
    assert z.abs().max() < math.sqrt(0.5)


@pytest.mark.parametrize(
    "start", [[1.0, 0.0], *(pytest.param(start, marks=pytest.mark.long) for start in ([2.0, 2.0], [0.5, -1.0]))]
)
def test_a_corner_of_the_simplex_asks_for_one_objective(start: list[float]) -> None:
    first, second = quadratics(2, 0.0)(descend(quadratics(2, 0.0), start, [1.0, 0.0], steps=300))[0].tolist()
    assert 0.999 * first == pytest.approx(0.001 * second, abs=0.01)  # the preference is raised to 0.001
    assert second > 3.5

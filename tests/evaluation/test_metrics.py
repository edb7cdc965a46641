"""Indicators of fronts against staircases, brute force and hand-worked cases; conflict against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ml2o_dist.evaluation.metrics import additive_epsilon, gradient_conflict, hypervolume, igd_plus
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator

DTYPES = [torch.float32, torch.float64]
SCALES = [1e-6, 1.0, 1e6]


def volume_by_cells(points: Tensor, reference: Tensor) -> float:
    """Add up the cells of the grid through all coordinates that some point dominates."""
    m = points.shape[1]
    edges = [torch.cat([points[:, i].clamp(max=float(reference[i])), reference[i, None]]).unique() for i in range(m)]
    total = 0.0
    for cell in itertools.product(*(range(len(edge) - 1) for edge in edges)):
        low = torch.stack([edges[i][j] for i, j in enumerate(cell)])
        high = torch.stack([edges[i][j + 1] for i, j in enumerate(cell)])
        if (points <= low).all(dim=1).any():
            total += float((high - low).prod())
    return total


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hypervolume_of_staircases(dtype: torch.dtype, scale: float) -> None:
    def volume(points: list[list[float]], reference: list[float]) -> tuple[float, int]:
        found = hypervolume(scale * torch.tensor(points, dtype=dtype), scale * torch.tensor(reference, dtype=dtype))
        return found.value / scale ** len(reference), found.outside

    close = {"rel": 1e-6 if dtype == torch.float32 else 1e-12}
    assert volume([[1.0, 2.0], [2.0, 1.0]], [3.0, 3.0]) == (pytest.approx(3.0, **close), 0)
    assert volume([[2.0, 1.0], [1.0, 2.0], [2.0, 2.0], [1.0, 2.0]], [3.0, 3.0]) == (pytest.approx(3.0, **close), 0)
    assert volume([[0.0, 3.0], [1.0, 1.0], [3.0, 0.0]], [4.0, 4.0]) == (pytest.approx(9 + 1 + 1, **close), 0)
    assert volume([[-1.0, -2.0, -3.0]], [0.0, 0.0, 0.0]) == (pytest.approx(6.0, **close), 0)
    assert volume([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0]], [3.0, 3.0, 2.0]) == (pytest.approx(6.0, **close), 0)
    assert volume([[1.0], [0.5]], [3.0]) == (pytest.approx(2.5, **close), 0)
    assert volume([[1.0, 1.0], [0.0, 3.0], [2.9, 5.0]], [3.0, 3.0]) == (pytest.approx(4.0, **close), 2)
    assert volume([[4.0, 0.0], [3.0, 3.0]], [3.0, 3.0]) == (0.0, 2)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_hypervolume_is_the_volume_of_the_dominated_cells(m: int) -> None:
    for k in (1, 4, 7):
        points = torch.rand(k, m, generator=generator("hv", m, k), dtype=torch.float64)
        reference = torch.full((m,), 0.8, dtype=torch.float64)
        found = hypervolume(points, reference)
        assert found.value == pytest.approx(volume_by_cells(points, reference), rel=1e-12, abs=1e-15)
        assert found.outside == sum(any(value >= 0.8 for value in row) for row in points.tolist())


def test_hypervolume_counts_diverged_points_as_outside_and_none_as_empty() -> None:
    points = torch.tensor([[1.0, 1.0], [math.inf, 0.0]])
    assert hypervolume(points, torch.tensor([2.0, 2.0])) == (1.0, 1)
    assert hypervolume(torch.zeros(0, 2), torch.tensor([2.0, 2.0])) == (0.0, 0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_by_hand(dtype: torch.dtype, scale: float) -> None:
    front = scale * torch.tensor([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]], dtype=dtype)
    close = {"rel": 1e-6 if dtype == torch.float32 else 1e-12}

    def both(points: list[list[float]]) -> tuple[float, float]:
        moved = scale * torch.tensor(points, dtype=dtype)
        return igd_plus(moved, front) / scale, additive_epsilon(moved, front) / scale

    assert both([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]) == (0.0, 0.0)
    # (1, 1) lacks (1, 0) of the first, nothing of the second, (0, 1) of the third
    assert both([[1.0, 1.0]]) == (pytest.approx(2 / 3, **close), pytest.approx(1.0, **close))
    # (3, 4) lacks (3, 2), (2, 3) and (1, 4)
    away = (math.sqrt(13) + math.sqrt(13) + math.sqrt(17)) / 3
    assert both([[3.0, 4.0]]) == (pytest.approx(away, **close), pytest.approx(4.0, **close))
    # better than the front by 1/2 in everything: IGD+ cannot see it, epsilon does
    assert both([[-0.5, 1.5], [0.5, 0.5], [1.5, -0.5]]) == (0.0, pytest.approx(-0.5, **close))
    assert both([[1.0, 1.0], [math.inf, 0.0]]) == (pytest.approx(2 / 3, **close), pytest.approx(1.0, **close))


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_distances_are_their_definitions(m: int) -> None:
    points = torch.randn(9, m, generator=generator("points", m), dtype=torch.float64)
    front = torch.randn(5, m, generator=generator("front", m), dtype=torch.float64)
    excess = points[None] - front[:, None]
    assert igd_plus(points, front) == pytest.approx(float(excess.clamp(min=0).norm(dim=2).amin(dim=1).mean()))
    assert additive_epsilon(points, front) == pytest.approx(float(excess.amax(dim=2).amin(dim=1).max()))


def test_wrong_points_are_refused_with_what_is_wrong() -> None:
    good, corner = torch.ones(3, 2), torch.tensor([2.0, 2.0])
    nan = torch.tensor([[1.0, 1.0], [math.nan, 0.5]])
    for measure in (lambda p: hypervolume(p, corner), lambda p: igd_plus(p, good), lambda p: additive_epsilon(p, good)):
        with pytest.raises(UserError, match=r"points: row 1 is \[nan, 0.5\]"):
            measure(nan)
        with pytest.raises(UserError, match="row 0"):
            measure(torch.tensor([[-math.inf, 1.0]]))
        with pytest.raises(UserError, match=r"shape \[2\]; \[k, m\] is needed"):
            measure(torch.ones(2))
    with pytest.raises(UserError, match=r"reference point.*\[3\].*points.*\[3, 2\]"):
        hypervolume(good, torch.ones(3))
    with pytest.raises(UserError, match="not finite"):
        hypervolume(good, torch.tensor([2.0, math.nan]))
    for distance in (igd_plus, additive_epsilon):
        with pytest.raises(UserError, match="points is empty"):
            distance(torch.zeros(0, 2), good)
        with pytest.raises(UserError, match="front is empty"):
            distance(good, torch.zeros(0, 2))
        with pytest.raises(UserError, match="number of objectives"):
            distance(good, torch.ones(3, 3))
        with pytest.raises(UserError, match="front: row 0"):
            distance(good, torch.tensor([[math.nan, 1.0]]))
        with pytest.raises(UserError, match=r"front.*not finite"):
            distance(good, torch.tensor([[math.inf, 1.0]]))


def test_the_arguments_stay_as_they_were() -> None:
    points, front = torch.rand(4, 2), torch.rand(3, 2)
    kept = points.clone(), front.clone()
    hypervolume(points, torch.ones(2))
    igd_plus(points, front)
    additive_epsilon(points, front)
    assert torch.equal(points, kept[0])
    assert torch.equal(front, kept[1])


@pytest.mark.parametrize("scale", [1e-30, *SCALES, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conflict_by_hand(dtype: torch.dtype, scale: float) -> None:
    """(1, 0), (0, 2), (-1, 0): cosines 0, -1, 0; length ratios 2, 1, 2."""
    jacobian = scale * torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], dtype=dtype)
    found = gradient_conflict(jacobian)
    assert found.conflicting.dtype == torch.float64
    assert float(found.conflicting) == pytest.approx(1 / 3)
    assert float(found.mean_cosine) == pytest.approx(-1 / 3)
    assert float(found.min_cosine) == pytest.approx(-1.0)
    assert float(found.magnitude_similarity) == pytest.approx((4 / 5 + 1 + 4 / 5) / 3)


@pytest.mark.parametrize("shape", [(2, 3), (4, 5, 1), (2, 3, 4, 7)])
def test_conflict_is_its_definition(shape: tuple[int, ...]) -> None:
    jacobian = torch.randn(shape, generator=generator("conflict", *shape), dtype=torch.float64)
    found = gradient_conflict(jacobian)
    for index in itertools.product(*(range(size) for size in shape[:-2])):
        cosines, similar = [], []
        for a, b in itertools.combinations(jacobian[index], 2):
            cosines.append(float(a @ b / (a.norm() * b.norm())))
            similar.append(float(2 * a.norm() * b.norm() / (a.norm() ** 2 + b.norm() ** 2)))
        pairs = len(cosines)
        assert float(found.conflicting[index]) == pytest.approx(sum(c < 0 for c in cosines) / pairs)
        assert float(found.mean_cosine[index]) == pytest.approx(sum(cosines) / pairs)
        assert float(found.min_cosine[index]) == pytest.approx(min(cosines))
        assert float(found.magnitude_similarity[index]) == pytest.approx(sum(similar) / pairs)


def test_conflict_of_zeros_of_one_gradient_and_of_nan() -> None:
    rows = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [-2.0, 0.0]]])
    found = gradient_conflict(rows)
    assert found.conflicting.tolist() == [0.0, 0.0, 1.0]
    assert found.mean_cosine.tolist() == found.min_cosine.tolist() == [0.0, 0.0, -1.0]
    assert found.magnitude_similarity.tolist() == [0.0, 1.0, 0.8]
    for value in (math.nan, math.inf):
        broken = rows.clone()
        broken[0, 0, 0] = value
        for mine, other in zip(vars(gradient_conflict(broken)).values(), vars(found).values(), strict=True):
            assert mine[0].isnan()
            assert torch.equal(mine[1:], other[1:])
    alone = gradient_conflict(torch.ones(3, 1, 4))
    assert all(value.shape == (3,) and value.isnan().all() for value in vars(alone).values())
    with pytest.raises(UserError, match=r"\[4\] has no rows"):
        gradient_conflict(torch.ones(4))

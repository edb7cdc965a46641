"""What the closed forms share: weights on the simplex and the checks of settings."""

from __future__ import annotations

import math

import pytest
import torch

from ml2o_dist.problems.closed_form import at_least, at_least_real, simplex_points
from ml2o_dist.runtime.errors import UserError


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("points", [5, 40])
def test_simplex_points_are_convex_weights_with_the_vertices_among_them(m: int, points: int) -> None:
    weights = simplex_points(points, m)
    assert weights.shape == (1 if m == 1 else points, m)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights), dtype=torch.float64))
    for vertex in torch.eye(m, dtype=torch.float64):
        assert (weights == vertex).all(dim=1).any()
    assert len(weights.unique(dim=0)) == len(weights)
    assert torch.equal(weights, simplex_points(points, m))


def test_simplex_points_fill_the_simplex_evenly() -> None:
    """Dirichlet(1, 1, 1) has mean 1/3 and variance (1/3)(2/3)/4 in each coordinate."""
    inside = simplex_points(20_003, 3)[3:]
    torch.testing.assert_close(inside.mean(dim=0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0.02, atol=0)
    torch.testing.assert_close(inside.var(dim=0), torch.full((3,), 1 / 18, dtype=torch.float64), rtol=0.05, atol=0)


def test_two_objectives_get_a_grid() -> None:
    expected = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(simplex_points(5, 2), expected)


@pytest.mark.parametrize("value", [1, -3, 2.0, "4", True, None])
def test_an_integer_setting_names_owner_key_value_and_what_is_allowed(value: object) -> None:
    with pytest.raises(UserError, match=r"zdt1: n is .*integers >= 2") as caught:
        at_least("zdt1", "n", value, 2)
    assert repr(value) in str(caught.value)
    assert at_least("zdt1", "n", 2, 2) == 2


@pytest.mark.parametrize("value", [0.5, -1, math.nan, math.inf, "10", True])
def test_a_real_setting_names_owner_key_value_and_what_is_allowed(value: object) -> None:
    with pytest.raises(UserError, match=r"quadratic: condition is .*finite numbers >= 1") as caught:
        at_least_real("quadratic", "condition", value, 1.0)
    assert repr(value) in str(caught.value)
    assert at_least_real("quadratic", "condition", 1, 1.0) == 1.0

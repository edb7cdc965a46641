"""Points of the simplex: what is one, grids of them, and draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import kstest

from ml2o_dist.paretoset.preferences import checked_preference, draw_preferences, evaluation_rays, simplex_grid
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator


@pytest.mark.parametrize("given", [[0.1, 0.9], (1, 0), torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5]).half()])
def test_a_preference_is_taken_as_it_is(given: Any) -> None:
    checked = checked_preference(given, 2)
    assert checked.dtype == torch.float64
    assert checked.tolist() == [float(each) for each in given]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([0.5, 0.6], r"\[0.5, 0.6\].*sum to 1.*1.1"),
        ([0.5, 0.49], "sum to 1.*0.99"),
        ([-0.1, 1.1], r"\[-0.1, 1.1\].*below 0"),
        ([1.0], r"\[1.0\].*2 numbers"),
        ([0.5, 0.25, 0.25], "2 numbers"),
        ([[0.5, 0.5]], "2 numbers"),
        (1.0, "2 numbers"),
        ([math.nan, 1.0], "finite"),
        ([math.inf, 0.0], "finite"),
    ],
)
def test_what_is_no_preference_is_refused_in_one_line(given: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        checked_preference(given, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tasks", "divisions"), [(2, 10), (3, 10), (4, 3), (1, 5)])
def test_the_grid_has_every_multiple_once(tasks: int, divisions: int) -> None:
    grid = simplex_grid(tasks, divisions)
    assert len(grid) == math.comb(divisions + tasks - 1, tasks - 1)
    counts = [tuple(round(each * divisions) for each in row) for row in grid.tolist()]
    assert len(set(counts)) == len(counts)
    assert all(sum(row) == divisions and min(row) >= 0 for row in counts)
    assert counts == sorted(counts, reverse=True)
    torch.testing.assert_close(grid * divisions, torch.tensor(counts, dtype=torch.float64))


def test_a_front_is_evaluated_on_the_grid_or_at_the_corners() -> None:
    assert evaluation_rays(2).shape == (11, 2)
    assert evaluation_rays(3).shape == (66, 3)
    eight = evaluation_rays(8)
    assert torch.equal(eight[:8], torch.eye(8, dtype=torch.float64))
    assert eight[8].tolist() == [1 / 8] * 8
    for ray in (*evaluation_rays(3), *eight):
        checked_preference(ray, len(ray))


def test_draws_are_uniform_on_the_simplex() -> None:
    drawn = draw_preferences(4000, 3, generator("draws"))
    assert drawn.dtype == torch.float64
    assert (drawn >= 0).all()
    torch.testing.assert_close(drawn.sum(dim=1), torch.ones(4000, dtype=torch.float64))
    assert torch.equal(drawn, draw_preferences(4000, 3, generator("draws")))
    # Dirichlet(1, 1, 1): each coordinate is Beta(1, 2), and r_1 / (r_1 + r_2) is uniform
    for column in drawn.T:
        assert kstest(column.numpy(), "beta", args=(1, 2)).pvalue > 0.01
    assert kstest((drawn[:, 0] / (drawn[:, 0] + drawn[:, 1])).numpy(), "uniform").pvalue > 0.01

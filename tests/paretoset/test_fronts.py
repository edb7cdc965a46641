"""Fronts: hypervolume and monotonicity against numbers worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch

from ml2o_dist.paretoset.fronts import Front, front_from_json


def front(rays: list[list[float]], losses: list[list[float]]) -> Front:
    values = torch.tensor(losses, dtype=torch.float64)
    return Front(torch.tensor(rays, dtype=torch.float64), values, 1 - values / 4)


THREE = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("losses", "volume"),
    [
        ([[0.5, 1.5], [1.0, 1.0], [1.5, 0.5]], 1.5 * 0.5 + 1.0 * 0.5 + 0.5 * 0.5),  # three steps of a staircase
        ([[0.5, 2.5], [1.0, 1.0], [3.0, 0.1]], 1.0),  # two lie beyond (2, 2)
        ([[2.0, 0.0], [0.0, 2.0], [2.5, 2.5]], 0.0),
        ([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], 4.0),
    ],
)
def test_hypervolume_up_to_two(losses: list[list[float]], volume: float) -> None:
    assert front(THREE, losses).hypervolume == pytest.approx(volume)


def test_hypervolume_of_three_tasks() -> None:
    # two boxes of 1.5 * 1 * 1 and 1 * 1.5 * 1 that have 1 * 1 * 1 in common
    assert front([[1.0, 0, 0], [0, 1.0, 0]], [[0.5, 1.0, 1.0], [1.0, 0.5, 1.0]]).hypervolume == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ([[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]], 1.0),
        ([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]], 0.0),  # the dial is the wrong way round
        ([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], 0.5),
        ([[0.1, 0.9], [0.5, 0.5], [0.9, 0.6]], 5 / 6),  # of 3 pairs a task, (2, 3) of the second is wrong
        ([[0.1, 0.5], [0.5, 0.5], [0.9, 0.1]], 5.5 / 6),  # and here (1, 2) of the second is level
    ],
)
def test_monotonicity_is_the_share_of_pairs_that_are_in_order(losses: list[list[float]], share: float) -> None:
    assert front(THREE, losses).monotonicity == pytest.approx(share)


def test_pairs_that_ask_for_the_same_do_not_count() -> None:
    rays = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]  # no difference in the third task
    assert front(rays, [[0.1, 0.9, 0.0], [0.9, 0.1, 5.0]]).monotonicity == 1.0


def test_json_has_everything() -> None:
    measured = front(THREE, [[0.5, 1.5], [1.0, 1.0], [1.5, 0.5]])
    read = json.loads(json.dumps(measured.to_json()))
    assert read["rays"] == THREE
    assert read["losses"][0] == [0.5, 1.5]
    assert read["accuracies"][2] == [1 - 1.5 / 4, 1 - 0.5 / 4]
    assert read["hypervolume"] == pytest.approx(1.5)
    assert read["monotonicity"] == 1.0
    again = front_from_json(read)
    assert all(torch.equal(getattr(again, key), getattr(measured, key)) for key in ("rays", "losses", "accuracies"))


def test_a_single_point_has_no_monotonicity() -> None:
    assert front([[0.5, 0.5]], [[1.0, 1.0]]).monotonicity is None

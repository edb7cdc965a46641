"""Merging without training, against numpy written from the papers' text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from ml2o_dist.paretoset.merging import rewarded_soup, simple_average, task_arithmetic, ties
from ml2o_dist.paretoset.task_vectors import TaskVectors
from ml2o_dist.runtime.errors import UserError
from tests.paretoset.small import Heads, Normed, RootParameters, State, Tied, built, start_and_experts

Arrays = dict[str, NDArray[np.float64]]
KINDS = [Heads, RootParameters, Tied, Normed]


def prepared(kind: type[nn.Module], count: int = 3) -> tuple[TaskVectors, Arrays, list[Arrays], list[str]]:
    """Return the task vectors, and start, experts and the parameters' names for numpy."""
    network = built(kind).double()
    start, experts = start_and_experts(network, count)
    names = [name for name, _ in network.named_parameters()]
    vectors = TaskVectors.of(network, start, experts)
    return vectors, numpys(start), [numpys(state) for state in experts], names


def numpys(state: State) -> Arrays:
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def assert_merged(merged: State, expected: Arrays) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name].numpy(), array, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_simple_average_is_the_mean(kind: type[nn.Module]) -> None:
    vectors, _, experts, names = prepared(kind)
    assert_merged(simple_average(vectors), {name: np.mean([e[name] for e in experts], axis=0) for name in names})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_task_arithmetic_adds_the_task_vectors(kind: type[nn.Module], scale: float) -> None:
    vectors, start, experts, names = prepared(kind)
    expected = {name: start[name] + scale * sum(e[name] - start[name] for e in experts) for name in names}
    assert_merged(task_arithmetic(vectors, scale), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preference", [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [1 / 3] * 3])
def test_rewarded_soup_is_the_weighted_mean(kind: type[nn.Module], preference: list[float]) -> None:
    vectors, _, experts, names = prepared(kind)
    soup = rewarded_soup(vectors, preference)
    buffers = [name for name in soup if "running" in name]
    expected = {name: sum(r * e[name] for r, e in zip(preference, experts, strict=True)) for name in (*names, *buffers)}
    assert_merged(soup, expected)


def ties_of_the_paper(vectors: list[NDArray[np.float64]], keep: float, scale: float) -> NDArray[np.float64]:
    """TIES-Merging, Algorithm 1 of Yadav et al. 2023, coordinate by coordinate."""
    trimmed = []
    for tau in vectors:
        order = sorted(range(len(tau)), key=lambda p: -abs(tau[p]))
        kept = np.zeros_like(tau)
        for p in order[: max(1, round(keep * len(tau)))]:
            kept[p] = tau[p]
        trimmed.append(kept)
    merged = np.zeros_like(vectors[0])
    for p in range(len(merged)):
        positive = sum(tau[p] for tau in trimmed if tau[p] > 0)
        negative = -sum(tau[p] for tau in trimmed if tau[p] < 0)
        elected = 1.0 if positive > negative else -1.0
        agreeing = [tau[p] for tau in trimmed if tau[p] * elected > 0]
        merged[p] = np.mean(agreeing) if agreeing else 0.0
    return scale * merged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "scale"), [(0.2, 1.0), (0.5, 0.4), (1.0, 1.0), (1e-9, 1.0)])
def test_ties_is_that_of_the_paper(kind: type[nn.Module], keep: float, scale: float) -> None:
    vectors, start, experts, names = prepared(kind)
    flat = [np.concatenate([(e[name] - start[name]).reshape(-1) for name in names]) for e in experts]
    merged, begin, expected = ties_of_the_paper(flat, keep, scale), 0, {}
    for name in names:
        size = math.prod(start[name].shape)
        expected[name] = start[name] + merged[begin : begin + size].reshape(start[name].shape)
        begin += size
    assert_merged(ties(vectors, scale, keep), expected)


def test_ties_on_a_case_done_by_hand() -> None:
    network = nn.Linear(4, 1, bias=False)
    start = {"weight": torch.zeros(1, 4)}
    experts = [{"weight": torch.tensor([row])} for row in ([4.0, -3.0, 0.1, 2.0], [2.0, 5.0, 0.2, -2.0])]
    vectors = TaskVectors.of(network, start, experts)
    # half of each is kept: (4, -3, 0, 0) and (2, 5, 0, 0), or -2 as 2: both, for the third is level with the second
    assert ties(vectors, keep=0.5)["weight"].tolist() == [[3.0, 5.0, 0.0, -2.0]]
    # all of each: opposite entries of one size elect no sign
    torch.testing.assert_close(ties(vectors, keep=1.0)["weight"], torch.tensor([[3.0, 5.0, 0.15, 0.0]]))


@pytest.mark.parametrize("keep", [0.0, -0.2, 1.1, math.nan, math.inf])
def test_ties_wants_a_share(keep: float) -> None:
    vectors, *_ = prepared(Heads)
    with pytest.raises(UserError, match=r"keep .*TIES.*above 0.*at most 1"):
        ties(vectors, keep=keep)


def test_the_soup_wants_a_preference() -> None:
    vectors, *_ = prepared(Heads)
    with pytest.raises(UserError, match="must sum to 1"):
        rewarded_soup(vectors, [0.5, 0.5, 0.5])


@pytest.mark.parametrize("kind", KINDS)
def test_every_merge_is_a_state_dict_of_the_network_with_the_mean_of_the_moments(kind: type[nn.Module]) -> None:
    vectors, start, experts, _ = prepared(kind)
    for merged in (
        simple_average(vectors),
        task_arithmetic(vectors),
        ties(vectors),
        rewarded_soup(vectors, [1 / 3] * 3),
    ):
        network = built(kind, seed=1).double()
        network.load_state_dict(merged)
        for name in (name for name in start if "running" in name):
            np.testing.assert_allclose(merged[name].numpy(), np.mean([e[name] for e in experts], axis=0))
        for name in (name for name in start if "tracked" in name):
            assert merged[name] == start[name]


def test_heads_are_each_their_experts() -> None:
    network = built(Heads)
    start, experts = start_and_experts(network, 2)
    vectors = TaskVectors.of(network, start, experts, ("heads.0", "heads.1"))
    for merged in (
        simple_average(vectors),
        task_arithmetic(vectors),
        ties(vectors),
        rewarded_soup(vectors, [0.5, 0.5]),
    ):
        for t in range(2):
            assert torch.equal(merged[f"heads.{t}.weight"], experts[t][f"heads.{t}.weight"])

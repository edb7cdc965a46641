"""Task vectors: what is taken from which expert, and what is refused, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist.paretoset.task_vectors import TaskVectors, combined
from ml2o_dist.runtime.errors import UserError
from tests.paretoset.small import Heads, Normed, RootParameters, State, Tied, built, start_and_experts

HEADS = ("heads.0", "heads.1")


def test_every_tensor_has_one_place() -> None:
    network = built(Heads)
    start, experts = start_and_experts(network, 2)
    vectors = TaskVectors.of(network, start, experts, HEADS)
    shared = {name for name in start if not name.startswith("heads")}
    assert vectors.tasks == 2
    assert vectors.start.keys() == vectors.vectors.keys() == shared
    for name in shared:
        assert torch.equal(vectors.start[name], start[name])
        for t in range(2):
            assert torch.equal(vectors.vectors[name][t], experts[t][name] - start[name])
    assert vectors.heads.keys() == start.keys() - shared
    for name, head in vectors.heads.items():
        assert torch.equal(head, experts[int(name[6])][name])
    without = TaskVectors.of(network, start, experts)
    assert without.start.keys() == start.keys()
    assert not without.heads


def test_the_state_dicts_stay_their_owners() -> None:
    network = built(Heads)
    start, experts = start_and_experts(network, 2)
    vectors = TaskVectors.of(network, start, experts, HEADS)
    before = {name: tensor.clone() for name, tensor in (vectors.start | vectors.vectors | vectors.heads).items()}
    for state in (start, *experts):
        for tensor in state.values():
            tensor.zero_()
    for name, tensor in (vectors.start | vectors.vectors | vectors.heads).items():
        assert torch.equal(tensor, before[name])


def test_buffers_are_averaged_counters_kept_and_heads_left_alone() -> None:
    network = nn.ModuleDict({"trunk": built(Normed), "a": built(Normed), "b": built(Normed)})
    start, experts = start_and_experts(network, 2)
    vectors = TaskVectors.of(network, start, experts, ("a", "b"))
    buffers = vectors.averaged_buffers(torch.tensor([0.25, 0.75]))
    for name in ("running_mean", "running_var"):
        expected = 0.25 * experts[0][f"trunk.norm.{name}"] + 0.75 * experts[1][f"trunk.norm.{name}"]
        torch.testing.assert_close(buffers[f"trunk.norm.{name}"], expected)
        assert torch.equal(buffers[f"a.norm.{name}"], experts[0][f"a.norm.{name}"])
        assert torch.equal(buffers[f"b.norm.{name}"], experts[1][f"b.norm.{name}"])
    assert buffers["trunk.norm.num_batches_tracked"] == start["trunk.norm.num_batches_tracked"]
    assert buffers["trunk.norm.num_batches_tracked"].dtype == torch.int64
    assert buffers["b.norm.num_batches_tracked"] == experts[1]["b.norm.num_batches_tracked"]
    assert not any("offset" in name for name in buffers)


@pytest.mark.parametrize("kind", [Heads, Normed, RootParameters, Tied])
def test_a_whole_state_fits_the_network(kind: type[nn.Module]) -> None:
    network = built(kind)
    start, experts = start_and_experts(network, 2)
    vectors = TaskVectors.of(network, start, experts)
    weights = torch.tensor([0.0, 1.0])
    network.load_state_dict(vectors.whole_state(vectors.moved(weights), weights))
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, experts[1][name])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 1, 2), (0,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_combined_is_the_weighted_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = torch.randn(3, *shape).to(dtype)
    weights = torch.tensor([0.5, -1.25, 2.0], dtype=torch.float64)
    sums = combined(weights, tensors)
    assert sums.dtype == dtype
    assert sums.shape == shape
    expected = sum(float(w) * tensor.double() for w, tensor in zip(weights, tensors, strict=True))
    torch.testing.assert_close(sums.double(), expected, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-2)


def with_change(change: Callable[[State], Any]) -> State:
    state = {name: tensor.clone() for name, tensor in built(Heads).state_dict().items()}
    change(state)
    return state


def set_to(name: str, tensor: Tensor) -> Callable[[State], Any]:
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize("who", ["the common start", "expert 1", "expert 2"])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("first.bias"), "lacks first.bias$"),
        (lambda state: [state.pop(name) for name in list(state)[:5]], "lacks first.bias.*and 2 more"),
        (set_to("extra", torch.zeros(1)), "besides extra$"),
        (set_to("first.weight", torch.zeros(4, 5)), r"first.weight.*\[4, 5\].*\[5, 4\]"),
        (set_to("first.bias", torch.zeros(5, dtype=torch.int64)), "first.bias.*torch.int64.*torch.float32"),
        (set_to("first.bias", torch.full((5,), math.nan)), "first.bias.*not finite"),
        (set_to("first.bias", torch.full((5,), math.inf)), "first.bias.*not finite"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_named(who: str, change: Callable[[State], Any], complaint: str) -> None:
    network, wrong = built(Heads), with_change(change)
    states = [network.state_dict() for _ in range(3)]
    states[["the common start", "expert 1", "expert 2"].index(who)] = wrong
    with pytest.raises(UserError, match=complaint) as caught:
        TaskVectors.of(network, states[0], states[1:])
    assert f"{who} " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_counts_and_wrong_heads_are_refused() -> None:
    network = nn.ModuleDict({"trunk": nn.Linear(2, 2), "empty": nn.ReLU(), "a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    network["deep"] = nn.Sequential(nn.Linear(2, 1))
    start, experts = start_and_experts(network, 2)
    for count in (0, 1):
        with pytest.raises(UserError, match=f"at least 2 experts.* {count}"):
            TaskVectors.of(network, start, experts[:count])
    for heads, complaint in (
        (("a",), "module of its own.*2 tasks"),
        (("a", "a"), "module of its own"),
        (("deep", "deep.0"), "head of task 1.*'deep'.*head 'deep.0'"),
        (("a", "c"), "head of task 2.*'c'.*missing"),
        (("", "a"), "head of task 1.*''.*missing"),
        (("a", "empty"), "head of task 2.*'empty'.*no parameter"),
    ):
        with pytest.raises(UserError, match=complaint) as caught:
            TaskVectors.of(network, start, experts, heads)
        assert "\n" not in str(caught.value)

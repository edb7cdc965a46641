"""Tied tensors, state dicts with and without aliases, and entries of every kind: merged right or refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ml2o_dist.paretoset.conditioned import ConditionedInput
from ml2o_dist.paretoset.fitted_states import TensorNames
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.merging import rewarded_soup, simple_average, task_arithmetic, ties
from ml2o_dist.paretoset.networks import MultiHead
from ml2o_dist.paretoset.states import read_state
from ml2o_dist.paretoset.task_vectors import TaskVectors
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator

TOKENS = torch.tensor([[1, 2, 3]])
PREFERENCE = torch.tensor([0.25, 0.75], dtype=torch.float64)


class Language(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.e.weight

    def forward(self, tokens: Tensor) -> Tensor:
        answer: Tensor = self.head(torch.tanh(self.e(tokens)))
        return answer


class InOneMemory(Language):
    """The same with two parameters in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.e.weight.data)


class Twice(nn.Module):
    """A module that is registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.one = nn.Embedding(7, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.two = self.one

    def forward(self, tokens: Tensor) -> Tensor:
        answer: Tensor = self.two(torch.tanh(self.one(self.e(tokens).flatten(0, 1))))
        return answer


class Holding(nn.Module):
    """A linear layer and one more tensor."""

    def __init__(self, tensor: Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("held", tensor, persistent=persistent)


TIED = [(Language, ["e.weight", "head.weight"]), (InOneMemory, ["e.weight", "head.weight"]),
        (Twice, ["one.0.weight", "two.0.weight"])]  # fmt: skip
State = dict[str, Tensor]


def built(kind: Callable[..., nn.Module], *arguments: Any, **settings: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind(*arguments, **settings).eval()


def trained(network: nn.Module, *key: int) -> State:
    """Return the state dict of a copy whose parameters and running moments have moved, ties kept."""
    moved, draws = copy.deepcopy(network), generator("moved", *key)
    with torch.no_grad():
        for tensor in (*moved.parameters(), *moved.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=draws, dtype=tensor.dtype))
    if isinstance(network, InOneMemory):  # deepcopy gives each parameter memory of its own
        moved.get_parameter("head.weight").data = moved.get_parameter("e.weight").data
    return {name: tensor.clone() for name, tensor in moved.state_dict().items()}


def without(state: State, names: list[str], kept: str) -> State:
    prefix = kept.partition(".")[0]
    others = {name.partition(".")[0] for name in names} - {prefix}
    return {name: tensor for name, tensor in state.items() if name == kept or name.partition(".")[0] not in others}


def refused(*words: str, call: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(("kind", "names"), TIED)
@pytest.mark.parametrize("kept", [0, 1])
def test_a_missing_alias_is_filled_in_from_the_name_that_is_there(
    kind: type[nn.Module], names: list[str], kept: int
) -> None:
    network = built(kind)
    start, experts = network.state_dict(), [trained(network, t) for t in range(2)]
    cut = [without(state, names, names[kept]) for state in (start, *experts)]
    assert all(len(part) < len(start) and names[kept] in part for part in cut)
    whole, short = Fusion(network, start, experts).eval(), Fusion(network, cut[0], cut[1:]).eval()
    assert whole.upscaled == short.upscaled
    with torch.no_grad():
        assert torch.equal(whole(PREFERENCE, TOKENS), short(PREFERENCE, TOKENS))
    mixed = Fusion(network, cut[0], [experts[0], cut[2]])  # and each state dict by itself
    exported = [fusion.export(PREFERENCE).state_dict() for fusion in (whole, short, mixed)]
    expected = 0.25 * experts[0][names[0]] + 0.75 * experts[1][names[0]]
    for state in exported:
        assert state.keys() == start.keys()
        assert all(torch.equal(state[name], exported[0][name]) for name in state)
        for name in names:
            torch.testing.assert_close(state[name], expected)


@pytest.mark.parametrize(("kind", "names"), TIED)
@pytest.mark.parametrize("who", ["the common start", "expert 1", "expert 2"])
def test_aliases_that_differ_are_refused_by_both_names_and_whose_they_are(
    kind: type[nn.Module], names: list[str], who: str
) -> None:
    network = built(kind)
    states = [network.state_dict(), *(trained(network, t) for t in range(2))]
    wrong = states[["the common start", "expert 1", "expert 2"].index(who)]
    wrong[names[1]] = wrong[names[1]].clone()
    wrong[names[1]][0, 0] += 1e-6
    for entrance in (Fusion, TaskVectors.of):
        refused(who, *names, "one tensor in the network", call=partial(entrance, network, states[0], states[1:]))


@pytest.mark.parametrize(("kind", "names"), TIED)
def test_tied_stays_tied_and_live_and_exported_agree(kind: type[nn.Module], names: list[str]) -> None:
    network = built(kind)
    fusion = Fusion(network, network.state_dict(), [trained(network, t) for t in range(2)]).eval()
    with torch.no_grad():
        for parameter in fusion.routers.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator("routers")))
        plain = fusion.export(PREFERENCE)
        torch.testing.assert_close(plain(TOKENS), fusion(PREFERENCE, TOKENS))
        one, two = (plain.get_parameter(name) for name in names)
        one.add_(1.0)
    assert torch.equal(one, two)


@pytest.mark.parametrize(("kind", "names"), TIED)
@pytest.mark.parametrize("merge", [simple_average, task_arithmetic, ties, lambda v: rewarded_soup(v, PREFERENCE)])
def test_merged_state_dicts_have_every_name_and_load(
    kind: type[nn.Module], names: list[str], merge: Callable[[TaskVectors], State]
) -> None:
    network = built(kind)
    cut = [without(state, names, names[1]) for state in (network.state_dict(), *(trained(network, t) for t in (0, 1)))]
    merged = merge(TaskVectors.of(network, cut[0], cut[1:]))
    assert list(merged) == list(network.state_dict())
    assert torch.equal(merged[names[0]], merged[names[1]])
    network.load_state_dict(merged)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_without_aliases_are_read_as_they_are_written(suffix: str, tmp_path: Path) -> None:
    network = built(Language)
    files = [tmp_path / f"{t}{suffix}" for t in range(3)]
    for t, file in enumerate(files):
        moved = copy.deepcopy(network)
        moved.load_state_dict(trained(network, t))
        if suffix == ".pt":
            torch.save({"e.weight": moved.state_dict()["e.weight"]}, file)
        else:
            safetensors.torch.save_model(moved, str(file))
    start, *experts = [read_state(file) for file in files]
    assert len(start) == 1
    plain = Fusion(network, start, experts).export([0.5, 0.5])
    expected = (trained(network, 1)["e.weight"] + trained(network, 2)["e.weight"]) / 2
    torch.testing.assert_close(plain.state_dict()["head.weight"], expected)


def test_a_pattern_finds_a_tied_parameter_by_each_of_its_modules() -> None:
    network = built(Language)
    states = network.state_dict(), [trained(network, t) for t in range(2)]
    assert Fusion(network, *states, modules="head").upscaled == {"head": ["e.weight"]}
    assert Fusion(network, *states, modules="e").upscaled == {"e": ["e.weight"]}
    assert Fusion(network, *states).upscaled == {"e": ["e.weight"]}
    network = built(Twice)
    states = network.state_dict(), [trained(network, t) for t in range(2)]
    assert Fusion(network, *states, modules="two.0").upscaled == {"two.0": ["one.0.weight", "one.0.bias"]}


def test_untied_experts_of_an_untied_network_may_start_tied() -> None:
    network = built(Language)
    start = network.state_dict()
    network.get_submodule("head").weight = nn.Parameter(start["e.weight"].clone())
    experts = [trained(network, t) for t in range(2)]
    assert not torch.equal(experts[0]["e.weight"], experts[0]["head.weight"])
    state = Fusion(network, start, experts).export(PREFERENCE).state_dict()
    for name in state:
        torch.testing.assert_close(state[name], 0.25 * experts[0][name] + 0.75 * experts[1][name])


@pytest.mark.parametrize("other", ["two", "trunk"])
def test_a_head_that_shares_a_tensor_with_the_rest_is_refused(other: str) -> None:
    network = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("trunk", "one", "two")})
    network["one"].weight = network[other].weight
    state = network.state_dict()
    refused(
        "one.weight", f"{other}.weight", "head of task 1",
        call=lambda: TaskVectors.of(network, state, [state, state], ("one", "two")),
    )  # fmt: skip


def columns() -> nn.Module:
    """Two layers whose weights are columns of one matrix: apart, though one lies between the rows of the other."""
    both, network = torch.arange(12.0).view(3, 4), nn.ModuleList([nn.Linear(2, 3, bias=False) for _ in range(2)])
    for k in range(2):
        network[k].weight = nn.Parameter(both[:, 2 * k : 2 * k + 2])
    return network


def test_parts_of_one_memory_are_told_from_parts_that_overlap() -> None:
    network = columns()
    experts = [{name: tensor + t for name, tensor in network.state_dict().items()} for t in (1, 2)]
    plain = Fusion(network, network.state_dict(), experts).export([0.5, 0.5])
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor + 1.5)
    whole = torch.zeros(4, 4)
    for one, other in [(whole[:3], whole[2:]), (whole, whole.t()), (whole[:, 1:], whole[:, :2]), (whole, whole[1])]:
        pair = nn.ParameterList([nn.Parameter(one), nn.Parameter(other)])
        state = pair.state_dict()
        refused("0 and 1 share", "memory", call=partial(TaskVectors.of, pair, state, [state] * 2))
    recurrent = nn.LSTM(2, 3)
    assert len(TensorNames.of(recurrent).tensors) == 4


def with_held(held: Tensor, own: Tensor | None = None, persistent: bool = True) -> tuple[nn.Module, list[State]]:
    """Return a network with the buffer `held` and states of it; `own` is the buffer's value in expert 2."""
    network = built(Holding, held, persistent)
    states = [network.state_dict(), trained(network, 1) | {"held": held.clone()}, trained(network, 2)]
    states[2] |= {"held": held.clone() if own is None else own}
    if not persistent:
        for state in states[1:]:
            state.pop("held")
    return network, states


@pytest.mark.parametrize(
    ("held", "other"),
    [
        (torch.arange(4), torch.arange(4) + 1),  # codebook indices
        (torch.tensor([True, False]), torch.tensor([True, True])),  # a pruning mask
        (torch.tensor(0, dtype=torch.uint8), torch.tensor(1, dtype=torch.uint8)),
    ],
)
def test_integers_that_differ_between_experts_are_refused(held: Tensor, other: Tensor) -> None:
    network, (start, *experts) = with_held(held, other)
    for entrance in (Fusion, TaskVectors.of):
        refused("buffer held", str(held.dtype), "expert 2", call=partial(entrance, network, start, experts))
    equal = [state | {"held": other.clone()} for state in experts]
    assert torch.equal(Fusion(network, start, equal).export([0.5, 0.5]).get_buffer("held"), other)


def test_counters_of_batches_may_differ() -> None:
    network = built(nn.BatchNorm1d, 3)
    states = [network.state_dict() | {"num_batches_tracked": torch.tensor(count)} for count in (5, 8, 9)]
    plain = Fusion(network, states[0], states[1:]).export([0.5, 0.5])
    assert plain.get_buffer("num_batches_tracked") == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex64])
def test_buffers_that_differ_are_averaged_in_their_own_precision(dtype: torch.dtype) -> None:
    one, two = (torch.randn(3, generator=generator("held", t), dtype=torch.float64).to(dtype) for t in range(2))
    network, (start, *experts) = with_held(one, two)
    held = Fusion(network, start, experts).export(PREFERENCE).get_buffer("held")
    assert held.dtype == dtype
    torch.testing.assert_close(held, (0.25 * one + 0.75 * two).to(dtype), rtol=2e-3, atol=1e-3)


def test_a_mask_with_infinities_is_kept_and_one_that_differs_is_refused() -> None:
    mask = torch.full((3, 3), -torch.inf).triu(1)
    network, (start, *experts) = with_held(mask)
    for preference in ([0.5, 0.5], [1.0, 0.0]):
        assert torch.equal(Fusion(network, start, experts).export(preference).get_buffer("held"), mask)
    network, (start, *experts) = with_held(mask, mask.t())
    refused("expert 1", "held", "not finite", call=lambda: Fusion(network, start, experts))


def test_a_buffer_that_no_state_dict_has_is_the_networks() -> None:
    network, (start, *experts) = with_held(torch.arange(3.0), persistent=False)
    plain = Fusion(network, start, experts).export([0.5, 0.5])
    assert torch.equal(plain.get_buffer("held"), torch.arange(3.0))
    assert "held" not in plain.state_dict()


def test_a_buffer_with_one_persistent_name_comes_from_the_state_dicts() -> None:
    network = nn.ModuleDict({"a": Holding(torch.zeros(3), persistent=False), "b": nn.Linear(2, 2)})
    network["b"].register_buffer("also", network["a"].held)
    states = [trained(network, t) | {"b.also": torch.full((3,), float(t))} for t in range(3)]
    plain = Fusion(network, states[0], states[1:]).export(PREFERENCE)
    for name in ("a.held", "b.also"):
        torch.testing.assert_close(plain.get_buffer(name), torch.full((3,), 1.75))
    assert rewarded_soup(TaskVectors.of(network, states[0], states[1:]), PREFERENCE).keys() == states[0].keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_another_precision_are_taken_in_the_networks(dtype: torch.dtype) -> None:
    network = built(Language)
    experts = [trained(network, t) for t in range(2)]
    cast = [{name: tensor.to(dtype) for name, tensor in experts[0].items()}, experts[1]]
    plain = Fusion(network, network.state_dict(), cast).export(PREFERENCE)
    weight = plain.get_parameter("e.weight")
    assert weight.dtype == torch.float32
    expected = 0.25 * cast[0]["e.weight"].float() + 0.75 * experts[1]["e.weight"]
    torch.testing.assert_close(weight.detach(), expected)
    huge = {name: torch.full_like(tensor.double(), 1e300) for name, tensor in experts[0].items()}
    refused("expert 1", "not finite", call=lambda: Fusion(network, network.state_dict(), [huge, experts[1]]))


def test_complex_parameters_are_merged() -> None:
    network = nn.ParameterDict({"z": nn.Parameter(torch.tensor([1 + 2j, -1j]))})
    states = [{"z": network["z"].detach() * (t + 1) * 1j} for t in range(3)]
    plain = Fusion(network, states[0], states[1:]).export(PREFERENCE)
    torch.testing.assert_close(plain.state_dict()["z"], 0.25 * states[1]["z"] + 0.75 * states[2]["z"])
    refused("TIES", "z", "complex64", call=lambda: ties(TaskVectors.of(network, states[0], states[1:])))


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop them
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: nn.ParameterDict({"w": nn.Parameter(torch.ones(2, dtype=torch.int8), False)}), ["w", "torch.int8"]),
        (lambda: Holding(quantized()), ["held", "torch.qint8"]),
        (lambda: Holding(torch.eye(2).to_sparse()), ["held", "sparse"]),
        (lambda: Holding(torch.ones(2).to(torch.float8_e5m2)), ["held", "float8"]),
        (lambda: nn.LazyLinear(2), ["weight", "no shape yet"]),
        (lambda: nn.Linear(2, 2, device="meta"), ["weight", "meta"]),
        (lambda: {"w": torch.ones(2)}, ["network", "Module", "dict"]),
    ],
)
def test_networks_that_cannot_be_merged_are_refused_by_name(network: Callable[[], Any], words: list[str]) -> None:
    refused(*words, call=lambda: Fusion(network(), {}, [{}, {}]))


class WithMore(nn.Linear):
    def get_extra_state(self) -> object:
        return {"calls": 3}


LINEAR = nn.Linear(2, 2)
GOOD = LINEAR.state_dict()


@pytest.mark.parametrize(
    ("start", "experts", "words"),
    [
        (LINEAR, [GOOD, GOOD], ["the common start", "module (Linear)", ".state_dict()"]),
        (GOOD, [GOOD, LINEAR], ["expert 2", "module (Linear)", ".state_dict()"]),
        (GOOD, [GOOD, None], ["expert 2", "state dict", "NoneType"]),
        (GOOD, [GOOD, [1, 2]], ["expert 2", "state dict", "list"]),
        (GOOD, [GOOD | {"bias": np.zeros(2)}, GOOD], ["expert 1", "ndarray", "'bias'", "tensor"]),
        (GOOD, [GOOD | {"bias": quantized()}, GOOD], ["expert 1", "bias is torch.qint8", "torch.float32"]),
        (GOOD, [GOOD | {"bias": torch.ones(2) * 1j}, GOOD], ["expert 1", "bias is torch.complex64"]),
        (GOOD, [GOOD, GOOD | {"bias": torch.ones(2, device="meta")}], ["expert 2", "bias", "meta"]),
        (GOOD, [GOOD, GOOD | {"more": torch.ones(2)}], ["expert 2", "has besides more"]),
        (GOOD, {"a": GOOD, "b": GOOD}, ["experts", "list of state dicts", "dict"]),
        (GOOD, (GOOD for _ in range(2)), ["experts", "list of state dicts", "generator"]),
    ],
)
def test_what_is_no_state_dict_of_the_network_is_one_line(start: Any, experts: Any, words: list[str]) -> None:
    refused(*words, call=lambda: Fusion(LINEAR, start, experts))


def test_a_state_dict_with_more_than_tensors_is_one_line() -> None:
    network = WithMore(2, 2)
    refused("_extra_state", call=lambda: Fusion(network, network.state_dict(), [network.state_dict()] * 2))


def test_cosmos_does_not_widen_a_layer_that_is_tied() -> None:
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    trunk[3].weight = trunk[1].weight
    network = MultiHead(trunk, 16, (3, 3))
    refused("trunk.1.weight", "trunk.3.weight", "cosmos", call=lambda: ConditionedInput(network, 2, 0))

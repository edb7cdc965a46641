"""What a fusion gives away: a plain network of its own for one preference; and a fusion moved, copied, cast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import build_multi_head
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.paretoset.small import Heads, Normed, RootParameters, Tied, built, start_and_experts

KINDS = [Heads, RootParameters, Tied, Normed]
PREFERENCE = torch.tensor([0.3, 0.7])


def trained(kind: type[nn.Module], dtype: torch.dtype = torch.float32, **settings: Any) -> Fusion:
    """Return a fusion whose routers are far from their start, in evaluation mode."""
    network = built(kind).to(dtype)
    fusion = Fusion(network, *start_and_experts(network, 2), **settings).to(dtype).eval()
    with torch.no_grad():
        for parameter in fusion.routers.parameters():
            parameter.add_(
                0.4 * torch.randn(parameter.shape, generator=generator("trained", *parameter.shape)).to(dtype)
            )
    return fusion


def first(answer: Any) -> torch.Tensor:
    return torch.cat(answer, dim=1) if isinstance(answer, list) else answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_live_and_exported_agree(kind: type[nn.Module], dtype: torch.dtype) -> None:
    fusion, x = trained(kind, dtype), torch.randn(6, 4).to(dtype)
    seen = []
    for first_share in (0.0, 0.3, 1.0):
        r = torch.tensor([first_share, 1 - first_share], dtype=torch.float64)
        plain = fusion.export(r)
        assert type(plain) is kind
        assert not plain.training
        assert all(p.requires_grad and p.is_leaf and p.dtype == dtype for p in plain.parameters())
        with torch.no_grad():
            live, exported = first(fusion(r, x)), first(plain(x))
        assert live.dtype == exported.dtype == dtype
        torch.testing.assert_close(live, exported, rtol=1e-6, atol=1e-7)
        seen.append(exported)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)  # the dial does something
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_of_the_original_size_and_loads_into_the_original(kind: type[nn.Module]) -> None:
    plain, network, x = trained(kind).export([0.5, 0.5]), built(kind), torch.randn(3, 4)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in network.parameters())
    network.load_state_dict(plain.state_dict())
    assert torch.equal(first(network(x)), first(plain(x)))


def test_tied_parameters_stay_tied() -> None:
    plain = trained(Tied).export(PREFERENCE)
    assert isinstance(plain, Tied)
    assert plain.one.weight is plain.two.weight


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in KINDS), (Heads, {"modules": "mlp", "heads": ("heads.0", "heads.1")})],
)
def test_export_and_fusion_know_nothing_of_each_other(kind: type[nn.Module], settings: dict[str, Any]) -> None:
    fusion, x = trained(kind, **settings), torch.randn(3, 4)
    plain = fusion.export(PREFERENCE)
    with torch.no_grad():
        live, exported = first(fusion(PREFERENCE, x)), first(plain(x))
        for tensor in plain.state_dict().values():
            tensor.zero_()
        assert torch.equal(first(fusion(PREFERENCE, x)), live)
        plain = fusion.export(PREFERENCE)
        for tensor in fusion.state_dict().values():
            tensor.zero_()
        assert torch.equal(first(plain(x)), exported)
    assert not any(p.requires_grad for p in fusion.network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_torch_export_gives_the_same(kind: type[nn.Module]) -> None:
    plain, x = trained(kind).export(PREFERENCE), torch.randn(6, 4)
    program = torch.export.export(plain, (x,))
    torch.testing.assert_close(
        first(list(program.module()(x))) if kind is Heads else program.module()(x), first(plain(x))
    )


@pytest.mark.parametrize("net", ["lenet5", "vit", "cnn"])
def test_torch_export_of_the_networks_of_this_package(net: str) -> None:
    network = build_multi_head(net, side=24, classes=(3, 4), seed=0, width=8, depth=2).eval()
    fusion = Fusion(network, *start_and_experts(network, 2, size=0.05), heads=network.head_names).eval()
    plain, x = fusion.export(PREFERENCE), torch.randn(2, 1, 24, 24)
    program = torch.export.export(plain, (x,))
    for live, own, exported in zip(fusion(PREFERENCE, x), plain(x), program.module()(x), strict=True):
        torch.testing.assert_close(own, exported)
        torch.testing.assert_close(live, own)


def test_an_export_can_be_trained_on() -> None:
    plain = trained(Heads).export(PREFERENCE)
    sum(each.square().sum() for each in plain(torch.randn(3, 4))).backward()
    assert all(p.grad is not None and p.grad.any() for p in plain.parameters())


@pytest.mark.parametrize("preference", [[0.5, 0.6], [-0.5, 1.5], [1.0], [0.2, 0.3, 0.5], [float("nan"), 1.0]])
def test_no_export_without_a_preference(preference: list[float]) -> None:
    with pytest.raises(UserError, match="preference"):
        trained(Heads).export(preference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_independent(kind: type[nn.Module]) -> None:
    fusion, x = trained(kind), torch.randn(3, 4)
    twin = copy.deepcopy(fusion)
    with torch.no_grad():
        live = first(fusion(PREFERENCE, x))
        assert torch.equal(first(twin(PREFERENCE, x)), live)
        for tensor in twin.state_dict().values():
            tensor.zero_()
        assert torch.equal(first(fusion(PREFERENCE, x)), live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fusion_can_be_cast(kind: type[nn.Module]) -> None:
    fusion, x = trained(kind), torch.randn(3, 4)
    with torch.no_grad():
        live = first(fusion(PREFERENCE, x))
        double = copy.deepcopy(fusion).to(torch.float64)
        answer = first(double(PREFERENCE, x.double()))
        assert answer.dtype == torch.float64
        torch.testing.assert_close(answer.float(), live, rtol=1e-5, atol=1e-6)
        plain = double.export(PREFERENCE)
        assert all(t.dtype == torch.float64 for t in plain.buffers() if t.is_floating_point())
        torch.testing.assert_close(first(plain(x.double())), answer)


def test_only_routers_are_parameters_and_a_state_dict_has_everything() -> None:
    fusion = trained(Normed)
    assert all(name.startswith("routers.") for name, _ in fusion.named_parameters())
    network = built(Normed)
    other = Fusion(network, *start_and_experts(network, 2, size=3.0), seed=9).eval()
    other.load_state_dict(fusion.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(other(PREFERENCE, x), fusion(PREFERENCE, x))


def test_the_network_that_was_given_is_left_alone() -> None:
    network = built(Heads)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fusion = Fusion(network, *start_and_experts(network, 2))
    fusion.train()
    fusion(PREFERENCE, torch.randn(3, 4))
    assert not network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

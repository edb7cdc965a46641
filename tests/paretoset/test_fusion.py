"""Fusion: what certain weights of the routers must give, which modules are upscaled, buffers, and the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.merging import rewarded_soup, task_arithmetic
from ml2o_dist.paretoset.networks import build_multi_head
from ml2o_dist.paretoset.task_vectors import TaskVectors
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.paretoset.small import Heads, Normed, RootParameters, State, Tied, built, start_and_experts

KINDS = [Heads, RootParameters, Tied, Normed]
PREFERENCE = torch.tensor([0.3, 0.7])


def answer_with(fusion: Fusion, weights: Sequence[float]) -> None:
    """Make every router give `weights`, whatever the preference."""
    with torch.no_grad():
        fusion.routers.weight.zero_()
        fusion.routers.bias.copy_(torch.tensor(weights).expand_as(fusion.routers.bias))


def assert_state(state: State, expected: dict[str, Tensor]) -> None:
    """Compare what both have: a merged state dict has tied tensors twice, a fusion has buffers of no state dict."""
    common = state.keys() & expected.keys()
    assert len(common) >= 3
    for name in common:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.3, 0.7])
def test_without_last_weights_it_is_task_arithmetic(kind: type[nn.Module], scale: float) -> None:
    network = built(kind)
    start, experts = start_and_experts(network, 2)
    fusion = Fusion(network, start, experts, scale=scale, begin="arithmetic")
    with torch.no_grad():
        fusion.routers.weight.zero_()
    expected = task_arithmetic(TaskVectors.of(network, start, experts), scale)
    for name, _ in network.named_parameters():
        by_hand = start[name] + scale * sum(expert[name] - start[name] for expert in experts)
        torch.testing.assert_close(fusion.state(PREFERENCE)[name], by_hand)
        torch.testing.assert_close(expected[name], by_hand)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0, 1, 2])
def test_a_unit_weight_is_an_expert(kind: type[nn.Module], t: int) -> None:
    network = built(kind)
    start, experts = start_and_experts(network, 3)
    fusion = Fusion(network, start, experts).eval()
    unit = torch.eye(3)[t]
    answer_with(fusion, unit.tolist())
    x = torch.randn(6, 4)
    network.load_state_dict(experts[t])
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(fusion(unit, x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fusion.export(unit)(x), expected, rtol=1e-4, atol=1e-5)


def test_with_heads_a_unit_weight_is_the_expert_on_its_task() -> None:
    network, heads = built(Heads), ("heads.0", "heads.1")
    start, experts = start_and_experts(network, 2)
    fusion = Fusion(network, start, experts, heads=heads).eval()
    x = torch.randn(6, 4)
    for t in range(2):
        answer_with(fusion, torch.eye(2)[t].tolist())
        with torch.no_grad():
            expected = functional_call(network, experts[t], (x,))[t]
            torch.testing.assert_close(fusion(torch.eye(2)[t], x)[t], expected, rtol=1e-5, atol=1e-6)
    state = fusion.state(PREFERENCE)
    for t, head in enumerate(heads):
        assert torch.equal(state[f"{head}.weight"], experts[t][f"{head}.weight"])
    assert not any(name.startswith("heads") for names in fusion.upscaled.values() for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_preference_as_weights_it_is_the_rewarded_soup(kind: type[nn.Module]) -> None:
    network = built(kind)
    start, experts = start_and_experts(network, 2)
    fusion = Fusion(network, start, experts)
    answer_with(fusion, PREFERENCE.tolist())
    soup = rewarded_soup(TaskVectors.of(network, start, experts), PREFERENCE)
    assert_state(fusion.state(PREFERENCE), soup)
    for name in dict(network.named_parameters()):
        torch.testing.assert_close(soup[name], 0.3 * experts[0][name] + 0.7 * experts[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("all", {"first": 2, "mlp.0": 2, "mlp.2": 2, "heads.0": 2, "heads.1": 2}),
        ("mlp", {"mlp": 4}),
        ("mlp*", {"mlp": 4}),  # the outer module has the router
        ("mlp.*", {"mlp.0": 2, "mlp.2": 2}),
        ("*", {"first": 2, "mlp": 4, "heads": 4}),
        ("heads.1", {"heads.1": 2}),
    ],
)
def test_patterns_pick_modules(pattern: str, expected: dict[str, int]) -> None:
    network = built(Heads)
    start, experts = start_and_experts(network, 2)
    fusion = Fusion(network, start, experts, modules=pattern)
    assert {name: len(names) for name, names in fusion.upscaled.items()} == expected
    assert sum(p.numel() for p in fusion.parameters()) == 22 * len(expected)
    arithmetic = task_arithmetic(TaskVectors.of(network, start, experts), 0.3)
    answer_with(fusion, [5.0, -5.0])
    state, routed = fusion.state(PREFERENCE), {name for names in fusion.upscaled.values() for name in names}
    for name, tensor in state.items():
        as_frozen = torch.allclose(tensor, arithmetic[name], rtol=1e-5, atol=1e-6)
        assert as_frozen == (name not in routed), name


@pytest.mark.parametrize(
    ("preference", "part"),
    [
        (torch.tensor([-0.2, 1.2]), "below 0"),
        (torch.tensor([0.5, 0.4]), "sum to 1.*0.9"),
        (torch.tensor([0.2, 0.3, 0.5]), "2 numbers"),
        (torch.full((4, 2), 0.5), "2 numbers"),
        ([0.5, float("nan")], "below 0.*finite"),
    ],
)
def test_a_preference_that_is_none_is_refused_live_and_exported(preference, part) -> None:
    network = built(Heads)
    start, experts = start_and_experts(network, 2)
    fusion = Fusion(network, start, experts)
    for use in (lambda: fusion(preference, torch.zeros(3, 4)), lambda: fusion.export(preference)):
        with pytest.raises(UserError, match=part):
            use()


def test_mlp_is_offered_only_where_a_module_is_called_so() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    with pytest.raises(UserError, match=r"'mlp' fits no module .*allowed: all.*0, 1"):
        Fusion(network, network.state_dict(), [network.state_dict()] * 2, modules="mlp")


def test_several_patterns_are_refused() -> None:
    network = built(Heads)
    with pytest.raises(UserError, match=r"one pattern, not \['trunk', 'heads'\]"):
        Fusion(network, *start_and_experts(network, 2), modules=["trunk", "heads"])


@pytest.mark.parametrize(("pattern", "heads"), [("layers.*", ()), ("", ()), ("MLP", ()), ("heads.*", (0, 1))])
def test_a_pattern_that_fits_nothing_is_refused(pattern: str, heads: tuple[int, ...]) -> None:
    network = built(Heads)
    start, experts = start_and_experts(network, 2)
    with pytest.raises(UserError, match=r"fits no module.*allowed: all, mlp") as caught:
        Fusion(network, start, experts, modules=pattern, heads=[f"heads.{t}" for t in heads])
    assert "\n" not in str(caught.value)


def test_the_mlp_of_every_block_of_a_transformer_is_upscaled() -> None:
    network = build_multi_head("vit", side=8, classes=(3, 3), seed=0, patch=4, width=8, depth=3)
    start, experts = start_and_experts(network, 2)
    fusion = Fusion(network, start, experts, modules="mlp", heads=network.head_names)
    assert list(fusion.upscaled) == [f"trunk.blocks.{i}.mlp" for i in range(3)]
    nested = Fusion(network, start, experts, modules="trunk.blocks*", heads=network.head_names)
    assert list(nested.upscaled) == ["trunk.blocks"]


def test_moments_are_averaged_by_the_preference_and_never_extrapolated() -> None:
    network = built(Normed)
    start, experts = start_and_experts(network, 2)
    experts[0]["norm.running_var"], experts[1]["norm.running_var"] = torch.full((3,), 0.1), torch.full((3,), 9.0)
    fusion = Fusion(network, start, experts)
    answer_with(fusion, [3.0, -4.0])
    for first in (0.0, 0.25, 1.0):
        state = fusion.state(torch.tensor([first, 1 - first]))
        torch.testing.assert_close(state["norm.running_var"], torch.full((3,), first * 0.1 + (1 - first) * 9.0))
        assert state["norm.num_batches_tracked"] == start["norm.num_batches_tracked"]


def test_a_forward_in_training_mode_leaves_the_fusion_as_it_was() -> None:
    network = built(Normed)
    fusion = Fusion(network, *start_and_experts(network, 2)).train()
    before = {name: tensor.clone() for name, tensor in fusion.state_dict().items()}
    for _ in range(3):
        fusion(PREFERENCE, torch.randn(8, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fusion.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_in_w_is_that_of_the_loss_along_the_task_vector(kind: type[nn.Module]) -> None:
    network = built(kind).double()
    start, experts = start_and_experts(network, 3)
    fusion = Fusion(network, start, experts).double().eval()
    vectors, x = TaskVectors.of(network, start, experts), torch.randn(5, 4, dtype=torch.float64)
    preference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def loss(answer: Any) -> Tensor:
        return sum(each.square().sum() for each in answer) if isinstance(answer, list) else answer.square().sum()

    with torch.no_grad():
        fusion.routers.weight.zero_()  # so that w is the bias, for every preference
        fusion.routers.bias.copy_(0.5 * torch.randn(fusion.routers.bias.shape, generator=generator("w")))
    (gradient,) = torch.autograd.grad(loss(fusion(preference, x)), fusion.routers.bias)
    state = {name: tensor.detach() for name, tensor in fusion.state(preference).items()}
    attached = {name: state[name].requires_grad_() for name, _ in network.named_parameters()}
    rows = torch.autograd.grad(loss(functional_call(network, state, (x,))), list(attached.values()))
    slopes = dict(zip(attached, rows, strict=True))
    for g, owned in enumerate(fusion.upscaled.values()):
        for t in range(3):
            along = sum(float((slopes[name] * vectors.vectors[name][t]).sum()) for name in owned)
            assert float(gradient[g, t]) == pytest.approx(along, rel=1e-9, abs=1e-12)
            ends = []
            for step in (1e-6, -1e-6):
                moved = fusion.routers.bias.detach().clone()
                moved[g, t] += step
                ends.append(float(loss(functional_call(fusion, {"routers.bias": moved}, (preference, x))).detach()))
            assert float(gradient[g, t]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-6)

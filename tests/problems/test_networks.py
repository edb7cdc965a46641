"""Networks as pure functions: sizes, agreement with torch's modules, initialisation, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist.problems.networks import Network, build_network
from ml2o_dist.runtime.errors import UserError

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def build(net: str, side: int = 36, tasks: int = 2, **settings: str | int) -> Network:
    return build_network(net, side=side, classes=10, tasks=tasks, **settings)  # type: ignore[arg-type]


def module(net: str, activation: str) -> nn.Sequential:
    """Return the trunk written with torch's modules, for 36x36 images."""
    act = ACTIVATIONS[activation]
    if net == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(1296, 40), act(), nn.Linear(40, 30), act())
    if net == "cnn":
        first = (nn.Conv2d(1, 8, 5, padding=2), nn.MaxPool2d(2), act())
        return nn.Sequential(*first, nn.Conv2d(8, 16, 5, padding=2), nn.MaxPool2d(2), act(), nn.Flatten())
    if net == "lenet5":
        first = (nn.Conv2d(1, 10, 9), nn.MaxPool2d(2), act())
        second = (nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), act())
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(500, 50), act())
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 4), (4, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), act()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.MaxPool2d(2), act()]
    return nn.Sequential(*layers, nn.Flatten())


SETTINGS: dict[str, dict[str, str | int]] = {
    "mlp": {"hidden": "40-30"},
    "cnn": {"channels": "8-16", "kernel": 5},
    "lenet5": {"variant": "paretomtl"},
    "vgg": {"channels": "4-8"},
}


@pytest.mark.parametrize(("variant", "count"), [("paretomtl", 31_910), ("cosmos", 42_350)])
def test_lenet5_has_the_published_number_of_parameters(variant: str, count: int) -> None:
    assert build("lenet5", variant=variant).dimension == count


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("net", SETTINGS)
def test_logits_are_those_of_torch_modules(net: str, activation: str) -> None:
    network, trunk = build(net, activation=activation, **SETTINGS[net]), module(net, activation)
    heads = [nn.Linear(network.head.inputs, 10) for _ in range(2)]
    tensors = [tensor.detach().flatten() for part in (trunk, *heads) for tensor in part.parameters()]
    flat = torch.cat(tensors)
    assert flat.shape == (network.dimension,)
    assert sum(p.numel() for p in trunk.parameters()) == network.trunk_dimension
    images = torch.rand(5, 1, 36, 36, generator=torch.Generator().manual_seed(0))
    parameters = network.split(flat)
    features = network.features(parameters.trunk, images)
    torch.testing.assert_close(features, trunk(images), rtol=1e-4, atol=1e-6)
    expected = torch.stack([head(features) for head in heads])
    torch.testing.assert_close(network.logits(parameters, features), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", SETTINGS)
def test_split_keeps_leading_dimensions_and_covers_every_parameter_once(net: str) -> None:
    network = build(net, **SETTINGS[net])
    flat = torch.arange(3.0 * network.dimension, dtype=torch.float64).view(3, network.dimension)
    parts = network.split(flat)
    pieces = [*parts.trunk, parts.head_weight, parts.head_bias]
    assert all(piece.shape[0] == 3 for piece in pieces)
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]).sort().values, flat.view(-1))
    assert all(piece.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for piece in pieces)


def test_a_dense_network_takes_several_instances_at_once() -> None:
    network = build("mlp", side=6, hidden="7-5")
    flat = torch.stack([network.initial_parameters(seed) for seed in range(3)])
    images = torch.rand(3, 4, 1, 6, 6, dtype=torch.float64)
    together = network.features(network.split(flat).trunk, images)
    apart = torch.stack([network.features(network.split(flat[p]).trunk, images[p]) for p in range(3)])
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("net", SETTINGS)
def test_initialisation_is_that_of_torch_modules(net: str) -> None:
    network, trunk = build(net, **SETTINGS[net]), module(net, "relu")
    ours = network.split(network.initial_parameters(3)).trunk

    def spread(tensor: Tensor) -> float:
        return float(tensor.detach().double().abs().max())

    for mine, theirs in zip(ours, trunk.parameters(), strict=True):
        assert mine.shape == theirs.shape
        if mine.numel() >= 200:  # the largest of 200 uniform draws is within 5 % of the bound
            assert spread(mine) == pytest.approx(spread(theirs), rel=0.05)
            assert float(mine.mean()) == pytest.approx(0, abs=4 * spread(mine) / math.sqrt(3 * mine.numel()))


def test_initialisation_is_a_function_of_seed_and_scale() -> None:
    network = build("cnn", side=18)
    start = network.initial_parameters(5)
    assert torch.equal(start, network.initial_parameters(5))
    assert not torch.equal(start, network.initial_parameters(6))
    torch.testing.assert_close(network.initial_parameters(5, 0.5), start / 2)


def test_one_task_has_one_head() -> None:
    two, one = build("mlp", tasks=2), build("mlp", tasks=1)
    assert two.dimension - one.dimension == one.head_dimension == 10 * 25


@pytest.mark.parametrize(
    ("net", "settings", "message"),
    [
        ("mpl", {}, "did you mean 'mlp'"),
        ("mlp", {"activation": "rellu"}, "did you mean 'relu'"),
        ("lenet5", {"variant": "cosmo"}, "did you mean 'cosmos'"),
        ("mlp", {"hidden": "24-x"}, "hidden '24-x'"),
        ("mlp", {"hidden": 0}, "hidden 0"),
        ("cnn", {"channels": ""}, "channels ''"),
        ("cnn", {"kernel": 4}, "kernel 4"),
        ("lenet5", {"side": 12}, "12x12.*too small.*lenet5"),
        ("vgg", {"side": 6, "channels": "4-4-4"}, "6x6.*too small.*vgg"),
    ],
)
def test_wrong_settings_are_named(net: str, settings: dict[str, str | int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(net, **settings)  # type: ignore[arg-type]

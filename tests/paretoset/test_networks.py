"""Networks with a head for each task: sizes, seeds, and the same function as problems/networks.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ml2o_dist.paretoset.networks import Block, VisionTransformer, build_multi_head
from ml2o_dist.problems.networks import build_network
from ml2o_dist.runtime.errors import UserError

SETTINGS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": "12-8"},
    "cnn": {"channels": "3-4", "activation": "gelu"},
    "lenet5": {},
    "vgg": {"channels": "2-3", "activation": "tanh"},
    "vit": {"patch": 6, "width": 8, "depth": 2},
}


@pytest.mark.parametrize("net", SETTINGS)
def test_the_logits_of_every_head(net: str) -> None:
    network = build_multi_head(net, side=24, classes=(3, 4, 2), seed=0, **SETTINGS[net])
    answers = network(torch.randn(5, 1, 24, 24))
    assert [tuple(each.shape) for each in answers] == [(5, 3), (5, 4), (5, 2)]
    assert network.head_names == ("heads.0", "heads.1", "heads.2")
    for t, name in enumerate(network.head_names):
        others = [each for i, each in enumerate(network.heads) if i != t]
        assert network.get_submodule(name) not in others
    sum(each.square().sum() for each in answers).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("net", SETTINGS)
def test_the_first_values_are_of_the_seed_alone(net: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (
        build_multi_head(net, side=24, classes=(3, 3), seed=seed, **SETTINGS[net]) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    for (name, a), b in zip(one.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("net", ["mlp", "cnn", "lenet5", "vgg"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_a_network_is_that_of_the_problems(net: str, activation: str) -> None:
    settings = SETTINGS[net] | {"activation": activation}
    ours = build_multi_head(net, side=24, classes=(4, 4), seed=0, **settings).double()
    theirs = build_network(net, side=24, classes=4, tasks=2, **settings)
    flat = torch.cat([p.detach().reshape(-1) for p in ours.parameters()])
    assert len(flat) == theirs.dimension
    parameters, images = theirs.split(flat), torch.randn(3, 1, 24, 24, dtype=torch.float64)
    expected = theirs.logits(parameters, theirs.features(parameters.trunk, images))
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(ours(images)), expected)


def test_lenet_has_the_published_size() -> None:
    def size(**settings: Any) -> int:
        network = build_multi_head("lenet5", side=36, classes=(10, 10), seed=0, **settings)
        return sum(p.numel() for p in network.parameters())

    assert size() == 42_350
    assert size(variant="paretomtl") == 31_910


def test_a_transformer_looks_at_every_patch_and_its_mlp_is_called_so() -> None:
    network = build_multi_head("vit", side=12, classes=(3,), seed=0, patch=4, width=8, depth=2)
    trunk = network.trunk
    assert isinstance(trunk, VisionTransformer)
    assert trunk.positions.shape == (1, 10, 8)
    assert [name for name, _ in network.named_modules() if name.endswith("mlp")] == [
        "trunk.blocks.0.mlp",
        "trunk.blocks.1.mlp",
    ]
    images = torch.randn(1, 1, 12, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(images)[0].sum(), images)
    assert (gradient != 0).all()


def test_a_block_is_torchs_pre_norm_encoder_layer() -> None:
    torch.manual_seed(0)
    block = Block(8, attention_heads=2).eval()
    theirs = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    theirs.self_attn.load_state_dict(block.attention.state_dict())
    pairs = ((block.norm1, theirs.norm1), (block.norm2, theirs.norm2))
    for ours, other in (*pairs, (block.mlp[0], theirs.linear1), (block.mlp[2], theirs.linear2)):
        other.load_state_dict(ours.state_dict())
    tokens = torch.randn(3, 5, 8)
    torch.testing.assert_close(block(tokens), theirs(tokens))


@pytest.mark.parametrize(
    ("net", "settings", "complaint"),
    [
        ("lenet", {}, "unknown network 'lenet'.*'lenet5'"),
        ("vit", {"patch": 5}, "patch 5 of vit.*24"),
        ("vit", {"patch": 0}, "patch 0 of vit"),
        ("vit", {"width": 0}, "width 0.*depth 4 of vit.*at least 1"),
        ("vit", {"depth": -1}, "depth -1 of vit.*at least 1"),
        ("mlp", {"hidden": "a"}, "hidden"),
        ("mlp", {"activation": "selu"}, "unknown activation 'selu'"),
        ("tim/resnet", {}, "library.*'tim'.*'timm'"),
    ],
)
def test_what_does_not_fit_is_told(net: str, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        build_multi_head(net, side=24, classes=(3, 3), seed=0, **settings)
    assert "\n" not in str(caught.value)

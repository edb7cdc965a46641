"""Networks that take a preference: what each answers, and how its parameters become a vector and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ml2o_dist.paretoset.conditioned import (
    Conditioned,
    ConditionedInput,
    Fused,
    Hypernetwork,
    Plain,
    WeightLine,
    flat_parameters,
    named_views,
    trainable,
)
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.library_trunks import GreyImages
from ml2o_dist.paretoset.networks import MultiHead, build_multi_head
from ml2o_dist.runtime.errors import UserError
from tests.paretoset.small import start_and_experts

SIDE, TASKS = 12, 3
IMAGES = [torch.randn(4, 1, SIDE, SIDE), torch.randn(2, 1, SIDE, SIDE)]
NETS = {
    "mlp": {"hidden": "6-5"},
    "cnn": {"channels": "2-3"},
    "vit": {"patch": 6, "width": 8, "depth": 1},
}


def network(net: str, seed: int = 0) -> MultiHead:
    return build_multi_head(net, side=SIDE, classes=(2, 3, 4), seed=seed, **NETS[net])


def fused(net: str) -> Fused:
    base = network(net)
    model = Fused(Fusion(base, *start_and_experts(base, TASKS), heads=base.head_names))
    with torch.no_grad():
        model.fusion.routers.weight.add_(1.0)
        model.fusion.routers.hidden_bias.add_(0.5)
        model.fusion.routers.hidden_weight.mul_(30)
    return model


MODELS: dict[str, Callable[[str], Conditioned]] = {
    "plain": lambda net: Plain(network(net)),
    "fused": fused,
    "line": lambda net: WeightLine(network(net), [network(net, seed) for seed in range(TASKS)]),
    "hypernetwork": lambda net: Hypernetwork(network(net), TASKS, seed=0),
    "input": lambda net: ConditionedInput(network(net), TASKS, seed=0),
}


def corner(t: int) -> Tensor:
    return torch.eye(TASKS)[t]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_model_answers_every_batch_for_every_task(kind: str, net: str) -> None:
    model = MODELS[kind](net)
    answers = model(torch.tensor([0.2, 0.3, 0.5]), IMAGES)
    assert [[tuple(each.shape) for each in logits] for logits in answers] == [
        [(len(images), classes) for classes in (2, 3, 4)] for images in IMAGES
    ]
    loss = sum(each.square().sum() for logits in answers for each in logits)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", MODELS)
def test_all_but_the_plain_one_depend_on_the_preference(kind: str, net: str) -> None:
    model = MODELS[kind](net).eval()
    with torch.no_grad():
        one, other = (model(corner(t), IMAGES)[0][0] for t in (0, 1))
    assert torch.equal(one, other) == (kind == "plain")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", MODELS)
def test_parameters_become_a_vector_and_back(kind: str, net: str) -> None:
    model = MODELS[kind](net)
    flat = flat_parameters(model)
    assert flat.shape == (trainable(model),)
    assert not flat.requires_grad
    views = named_views(model, flat)
    for name, parameter in model.named_parameters():
        assert torch.equal(views[name], parameter), name
        assert views[name].data_ptr() >= flat.data_ptr()  # views, not copies
    moved = torch.randn_like(flat)
    with torch.no_grad():
        r = torch.tensor([0.2, 0.3, 0.5])
        called = functional_call(model, named_views(model, moved), (r, IMAGES))
        nn.utils.vector_to_parameters(moved, model.parameters())
        expected = model(r, IMAGES)
    for logits, others in zip(called, expected, strict=True):
        for one, other in zip(logits, others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("net", NETS)
def test_the_ends_of_the_line_are_its_ends(net: str) -> None:
    base, ends = network(net), [network(net, seed) for seed in (5, 6, 7)]
    line = WeightLine(base, ends)
    assert trainable(line) == 3 * trainable(base.trunk) + trainable(base.heads)
    for t, end in enumerate(ends):
        with torch.no_grad():
            expected = [head(end.trunk(IMAGES[0])) for head in base.heads]
            for one, other in zip(line(corner(t), IMAGES)[0], expected, strict=True):
                torch.testing.assert_close(one, other)
    with torch.no_grad():  # and between them the weights are mixed, not the answers
        for name, parameter in base.trunk.named_parameters():
            parameter.copy_(
                sum(r * dict(e.trunk.named_parameters())[name] for r, e in zip((0.2, 0.3, 0.5), ends, strict=True))
            )
        for one, other in zip(line(torch.tensor([0.2, 0.3, 0.5]), IMAGES)[0], base(IMAGES[0]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_is_independent_of_what_it_was_built_from() -> None:
    base, ends = network("mlp"), [network("mlp", seed) for seed in range(TASKS)]
    models = [Plain(base), WeightLine(base, ends), Hypernetwork(base, TASKS, 0), ConditionedInput(base, TASKS, 0)]
    before = [flat_parameters(model) for model in models]
    for module in (base, *ends):
        for parameter in module.parameters():
            parameter.data.zero_()
    assert all(torch.equal(flat_parameters(m), flat) for m, flat in zip(models, before, strict=True))
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_the_hypernetwork_makes_all_parameters_from_the_encoded_preference() -> None:
    base = network("mlp")
    model = Hypernetwork(base, TASKS, seed=0)
    encoder = TASKS * 100 + 100 + 2 * (100 * 100 + 100)
    assert trainable(model) == encoder + 101 * trainable(base)
    r = torch.tensor([0.2, 0.3, 0.5])
    with torch.no_grad():
        hidden = r
        for i in (0, 2, 4):
            layer = model.encoder[i]
            assert isinstance(layer, nn.Linear)
            hidden = layer.weight @ hidden + layer.bias
            hidden = hidden.clamp(min=0) if i < 4 else hidden
        for (_, parameter), maker in zip(base.named_parameters(), model.makers, strict=True):
            parameter.copy_(maker(hidden).view(parameter.shape))
        for one, other in zip(model(r, IMAGES)[1], base(IMAGES[1]), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("net", NETS)
def test_cosmos_sees_the_preference_as_channels(net: str) -> None:
    model = ConditionedInput(network(net), TASKS, seed=0)
    r, image = torch.tensor([0.2, 0.3, 0.5]), IMAGES[1]
    planes = torch.stack([torch.full((2, SIDE, SIDE), float(each)) for each in r], dim=1)
    for one, other in zip(model(r, [image])[0], model.network(torch.cat([image, planes], dim=1)), strict=True):
        assert torch.equal(one, other)


def test_cosmos_refuses_what_wants_coloured_images() -> None:
    coloured = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    base = MultiHead(GreyImages(coloured, SIDE), 2, (3, 3))
    with pytest.raises(UserError, match=r"trunk\.trunk\.0 .*3 channels.*`cosmos`"):
        ConditionedInput(base, 2, seed=0)


@pytest.mark.parametrize("kind", ["hypernetwork", "input"])
def test_first_values_are_of_the_seed_alone(kind: str) -> None:
    before = torch.get_rng_state()
    build = Hypernetwork if kind == "hypernetwork" else ConditionedInput
    one, same, other = (flat_parameters(build(network("mlp"), TASKS, seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_fused_model_trains_its_routers_alone_and_stays_in_evaluation_mode() -> None:
    model = fused("mlp")
    assert trainable(model) == 2 * (4 * 9 + 3 * 3)  # two dense layers in the trunk, 45 each
    for mode in (True, False):
        assert not model.train(mode).training
        assert not any(module.training for module in (*model.modules(), *model.fusion.network.modules()))
    r = torch.tensor([0.2, 0.3, 0.5])
    for one, other in zip(model(r, IMAGES)[0], model.fusion.export(r)(IMAGES[0]), strict=True):
        torch.testing.assert_close(one, other)


def test_running_moments_are_refused_where_they_would_be_of_no_preference() -> None:
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5))
    base = MultiHead(trunk, 5, (3, 3))
    with pytest.raises(UserError, match=r"running moments.* trunk\.2\.running_mean"):
        WeightLine(base, [base, base])
    with pytest.raises(UserError, match=r"running moments.* trunk\.2\.running_mean"):
        Hypernetwork(base, 2, seed=0)


def test_the_mode_reaches_the_architecture() -> None:
    base = MultiHead(nn.Sequential(nn.Flatten(), nn.Linear(16, 50), nn.Dropout(0.5)), 50, (3, 3))
    image = torch.randn(2, 1, 4, 4)
    for model in (WeightLine(base, [base, base]), Hypernetwork(base, 2, seed=0), Plain(base)):
        model.eval()
        one, other = (model(torch.tensor([0.5, 0.5]), [image])[0][0] for _ in range(2))
        assert torch.equal(one, other)
        model.train()
        assert not torch.equal(one, model(torch.tensor([0.5, 0.5]), [image])[0][0])

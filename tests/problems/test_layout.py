"""The tensors behind the flat parameters of problems and of models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ml2o_dist import GML2O, ML2O
from ml2o_dist.problems import ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.coordinatewise.rule import ML2ORule

NETWORKS = [
    "multidigits[hidden=7-5]",
    "multidigits[net=cnn,channels=4-6,tasks=3]",
    "multidigits[net=vgg,channels=4,tasks=1]",
    "tabular[data=wine,tasks=3,hidden=6-4]",
]


def test_shapes_say_the_kind_and_the_place() -> None:
    shapes = {"a": (), "b": (3,), "c": (2, 4), "d": (2, 1, 3), "e": (2, 1, 3, 3)}
    layout = ParameterLayout.of([*shapes.items(), ("f", (5, 2), "embedding")])
    assert [t.kind for t in layout.tensors] == ["scalar", "vector", "matrix", "convolution", "convolution", "embedding"]
    assert [t.start for t in layout.tensors] == [0, 1, 4, 12, 18, 36]
    assert layout.dimension == 46
    flat = torch.arange(2 * 46).view(2, 46)
    for tensor, part in zip(layout.tensors, layout.split(flat), strict=True):
        assert part.shape == (2, *tensor.shape)
        assert torch.equal(part.reshape(2, -1), flat[:, tensor.place])


def test_edges() -> None:
    assert ParameterLayout.of([]).dimension == 0
    assert ParameterLayout.of([("none", (0, 4)), ("one", (1,))]).dimension == 1
    (only,) = ParameterLayout.vector(5).tensors
    assert (only.shape, only.kind, only.place) == ((5,), "vector", slice(0, 5))
    behind = ParameterLayout.vector(5).grown(ParameterLayout.of([("more", (2, 2))]))
    assert [t.place for t in behind.tensors] == [slice(0, 5), slice(5, 9)]
    with pytest.raises(ValueError, match="'more' starts at 5, not at 0"):
        ParameterLayout(behind.tensors[1:])


@pytest.mark.parametrize("text", NETWORKS)
def test_a_network_is_laid_out_as_its_layers_are_drawn(text: str) -> None:
    """torch draws weight and bias of a layer within 1 / sqrt(fan in): the bounds show where a layer begins."""
    problem = ProblemSpec.parse(text).build(ProblemContext(instances=3))
    layout = problem.layout
    assert layout.dimension == problem.dimension
    assert len({tensor.name for tensor in layout.tensors}) == len(layout.tensors)
    parts = layout.split(problem.initial_parameters([0, 1, 2]))
    assert sum(tensor.name.startswith("heads.") for tensor in layout.tensors) == 2 * problem.objectives
    for weight, bias, at in zip(parts[0::2], parts[1::2], layout.tensors[0::2], strict=True):
        bound = math.prod(at.shape[1:]) ** -0.5
        assert bias.shape[1] == at.shape[0]
        assert weight.abs().max() <= bound
        assert bias.abs().max() <= bound
        if weight[0].numel() > 30:
            assert weight.abs().max() > 0.9 * bound
    assert Rescaled(problem, 3.0).layout == layout


@pytest.mark.parametrize("text", NETWORKS)
def test_only_the_own_head_moves_an_objective(text: str) -> None:
    problem = ProblemSpec.parse(text).build(ProblemContext())
    batch = problem.sample_batch(torch.Generator().manual_seed(0))
    jacobian, _ = problem.jacobian(problem.initial_parameters([0]), batch)
    for tensor, part in zip(problem.layout.tensors, problem.layout.split(jacobian), strict=True):
        moved = part.flatten(2).ne(0).any(dim=2)[0].tolist()
        own = tensor.name.split(".")
        wanted = [True] * problem.objectives if own[0] == "trunk" else [i == int(own[1]) for i in range(len(moved))]
        assert moved == wanted, tensor


def test_a_formula_is_one_vector() -> None:
    problem = ProblemSpec.parse("quadratic[n=4]").build(ProblemContext())
    assert problem.layout == ParameterLayout.vector(4)


class Model(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.mixed = nn.Linear(4, 3)
        self.image = nn.Conv2d(1, 2, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))


KINDS = ["scalar", "embedding", "matrix", "vector", "convolution", "vector"]


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_a_rule_gets_the_names_shapes_and_kinds_of_a_model(kind: type[ML2O], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ParameterLayout] = []
    model = Model()
    more = nn.Linear(2, 1)
    optimizer = kind(model.named_parameters())

    def losses() -> list[torch.Tensor]:
        total = sum(p.square().sum() for p in [*model.parameters(), *more.parameters()])
        return [total, (total - 1).square()]

    first, grown = ML2ORule.initial_state, ML2ORule.grown
    monkeypatch.setattr(ML2ORule, "initial_state", lambda s, p, m, at: (seen.append(at), first(s, p, m, at))[1])
    monkeypatch.setattr(ML2ORule, "grown", lambda s, state, at: (seen.append(at), grown(s, state, at))[1])
    optimizer.step(losses)
    optimizer.add_param_group({"params": [(f"more.{name}", each) for name, each in more.named_parameters()]})
    optimizer.step(losses)
    assert [(t.name, t.shape) for t in seen[0].tensors] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert [tensor.kind for tensor in seen[0].tensors] == KINDS
    assert [(t.name, t.shape, t.start) for t in seen[1].tensors] == [("more.weight", (1, 2), 0), ("more.bias", (1,), 2)]

"""A torch module as a problem: the contract, against plain torch, over kinds of modules and data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ml2o_dist import ModuleProblem, ProblemContext, UserError
from ml2o_dist.metatrain.estimators.exact import exact
from ml2o_dist.rules.learned import learned_rule
from ml2o_dist.runtime.seeding import generator
from tests.problems.contract import check_problem


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Words(nn.Module):
    """An embedding whose table is the output's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.table.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(words).mean(dim=1)) * self.frozen)


class Pictures(nn.Module):
    """Convolution, BatchNorm with running statistics, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


def squares(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    return list((model(x) - y).square().unbind(1))


def crossed(model: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    return torch.stack([F.cross_entropy(logits, label, reduction="none") for label in y.unbind(1)], dim=1)


def data_of(kind: str, count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = generator("data", kind, seed)
    if kind == "words":
        return torch.randint(5, (count, 6), generator=draws), torch.randint(5, (count, 2), generator=draws)
    shape = (count, 3) if kind == "dense" else (count, 1, 4, 4)
    return torch.randn(shape, generator=draws), torch.randn((count, 2), generator=draws)


KINDS: dict[str, tuple[type[nn.Module], Any]] = {
    "dense": (Dense, squares),
    "words": (Words, crossed),
    "pictures": (Pictures, squares),
}


def built(kind: str, instances: int = 2, dtype: torch.dtype = torch.float64, **more: Any) -> ModuleProblem:
    make, losses = KINDS[kind]
    context = ProblemContext(instances, dtype=dtype)
    return ModuleProblem(
        context, make, losses, data_of(kind), test=data_of(kind, 10, 1), batch=5, positive=True, **more
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_the_contract(kind: str, instances: int, dtype: torch.dtype) -> None:
    check_problem(built(kind, instances, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_module(kind: str) -> None:
    problem = built(kind)
    point, batch = problem.initial_parameters([4, 5]), problem.sample_batch(torch.Generator().manual_seed(0))
    jacobian, losses = problem.jacobian(point, batch)
    make, of = KINDS[kind]
    for p in range(2):
        module = make().double()
        for name, value in zip(problem.layout.tensors, problem.layout.split(point[p]), strict=True):
            dict(module.named_parameters())[name.name].data.copy_(value)
        torch.manual_seed(batch.seed + p)
        found = of(module, *(tensor[p] for tensor in batch.tensors))
        values = (found if isinstance(found, Tensor) else torch.stack(found, dim=1)).mean(dim=0)
        torch.testing.assert_close(losses[p], values.detach())
        trained = [each for each in module.parameters() if each.requires_grad]
        for i, value in enumerate(values):
            parts = torch.autograd.grad(value, trained, retain_graph=True)
            torch.testing.assert_close(jacobian[p, i], torch.cat([part.flatten() for part in parts]))


def test_starts_are_the_modules_own_initialisation() -> None:
    problem = built("dense")
    one, two = problem.initial_parameters([1, 2])
    assert not torch.equal(one, two)
    for tensor, part in zip(problem.layout.tensors, problem.layout.split(one), strict=True):
        assert part.abs().max() <= (3 if tensor.name.startswith("first") else 4) ** -0.5


def test_the_layout_has_names_and_knows_embeddings_and_frozen_parts() -> None:
    assert [(t.name, t.kind) for t in built("words").layout.tensors] == [("table.weight", "embedding")]
    kinds = [t.kind for t in built("pictures").layout.tensors]
    assert kinds == ["convolution", "vector", "vector", "vector", "matrix", "vector"]


def test_what_is_unseen_is_measured_without_dropout() -> None:
    def shares(model: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"test_share": (model(x) > y).double().mean(dim=0)}

    problem = built("pictures", metrics=shares)
    points = problem.initial_parameters([0, 1])
    figures = problem.test_metrics(points)
    assert figures.keys() == {"test_loss", "test_share"}
    assert all(value.shape == (2, 2) for value in figures.values())
    assert all(torch.equal(value, problem.test_metrics(points)[name]) for name, value in figures.items())
    assert all(module.training for module in problem._module.modules())
    x, y = (tensor.double() if tensor.is_floating_point() else tensor for tensor in data_of("pictures", 10, 1))
    module = Pictures().double()
    module.body[4].eval()
    nn.utils.vector_to_parameters(points[0], module.parameters())
    expected = torch.stack(squares(module, x, y), dim=1).mean(dim=0)
    torch.testing.assert_close(figures["test_loss"][0], expected.detach())


def test_a_data_loader_is_read_once_in_its_order() -> None:
    x, y = data_of("dense")
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    context = ProblemContext(2)
    one, other = (ModuleProblem(context, Dense, squares, data, batch=5) for data in (loader, (x, y)))
    assert one.data_hashes(test=True) == other.data_hashes(test=True)
    assert one.test_metrics(one.initial_parameters([0, 1])) == {}
    changed = ModuleProblem(context, Dense, squares, (x, y + 1), batch=5)
    assert changed.data_hashes(test=False) != other.data_hashes(test=False)


def test_it_is_differentiated_twice_by_the_exact_estimator() -> None:
    from ml2o_dist.config import EstimatorSettings, RuleSettings

    problem = built("dense", instances=1)
    rule = learned_rule(RuleSettings(hidden=2, lr=0.1), None, dtype=torch.float64)
    batches = [problem.sample_batch(torch.Generator().manual_seed(k)) for k in range(4)]
    loss, gradient, _ = exact(rule, problem, problem.initial_parameters([0]), batches, EstimatorSettings(kind="exact"))
    assert loss.isfinite()
    assert gradient["head.bias"].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": lambda model, x, y: (model(x) - y).square().mean()}, "reduction='none'"),
        ({"losses": lambda model, x, y: [(model(x) - y).square().mean(dim=0)[0]] * 2}, "reduction='none'"),
        ({"data": (torch.zeros(3, 3), torch.zeros(4, 2))}, "tensors of one length"),
        ({"data": (torch.zeros(0, 3), torch.zeros(0, 2))}, "at least 1"),
        ({"data": [["a", "b"]]}, "tensors, or a data loader"),
        ({"batch": 0}, "batch >= 1"),
        ({"make": nn.Identity}, "no parameter"),
        ({"metrics": lambda model, x, y: {"share": torch.zeros(3)}}, "'share' must have 2 values"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    words: dict[str, Any] = {
        "make": Dense,
        "losses": squares,
        "data": data_of("dense"),
        "test": data_of("dense"),
        "batch": 4,
    }

    def measured() -> None:
        problem = ModuleProblem(ProblemContext(), **{**words, **change})
        problem.test_metrics(problem.initial_parameters([0]))

    with pytest.raises(UserError, match=said):
        measured()

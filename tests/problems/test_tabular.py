"""Tables: the contract, losses against torch's own layers, what is predicted from what, and wrong settings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.problems.tabular import TABLES, _tables
from ml2o_dist.runtime.errors import UserError
from tests.problems.contract import check_named_problem


@pytest.mark.parametrize(
    "text",
    [
        "tabular",
        "tabular[data=iris,tasks=1,hidden=4]",
        "tabular[data=diabetes,tasks=4,hidden=5-3,activation=tanh,batch=7]",
        "tabular[data=breast_cancer,tasks=3,hidden=6,activation=gelu,columns=2,init=2.0]",
    ],
)
def test_it_keeps_the_contract(text: str) -> None:
    check_named_problem(text)


@pytest.mark.parametrize("data", TABLES)
def test_the_losses_are_those_of_torchs_layers(data: str) -> None:
    problem = ProblemSpec.parse(f"tabular[data={data},tasks=3,hidden=5-4,activation=tanh]").build(
        ProblemContext(instances=2, dtype=torch.float64)
    )
    start = problem.initial_parameters([3, 4])
    batch = problem.sample_batch(torch.Generator().manual_seed(0))
    found = problem.sample_losses(start, batch)
    train, _ = _tables(data, 3, 0)
    width, outputs = train.inputs.shape[1], max(1, TABLES[data])
    layers = [nn.Linear(width, 5), nn.Linear(5, 4), nn.Linear(4, outputs), nn.Linear(4, 1), nn.Linear(4, 1)]
    for p in range(2):
        nn.utils.vector_to_parameters(
            start[p], [each.double().requires_grad_(False) for layer in layers for each in layer.double().parameters()]
        )
        features = torch.tanh(layers[1](torch.tanh(layers[0](train.inputs[batch[p]]))))
        own, *others = (target[batch[p]] for target in train.targets)
        answer = layers[2](features)
        first = F.cross_entropy(answer, own, reduction="none") if TABLES[data] else (answer[:, 0] - own).square()
        rest = [(head(features)[:, 0] - y).square() for head, y in zip(layers[3:], others, strict=True)]
        torch.testing.assert_close(found[p], torch.stack([first, *rest], dim=1))


@pytest.mark.parametrize("data", TABLES)
def test_what_is_predicted_is_not_among_the_inputs_and_rows_are_kept_apart(data: str) -> None:
    train, test = _tables(data, 3, 1)
    whole, kept = _tables(data, 1, 1)
    assert train.inputs.shape[1] == whole.inputs.shape[1] - 2
    for target in train.targets[1:]:
        assert not any(torch.equal(column, target) for column in train.inputs.T)
        assert any(torch.equal(column, target) for column in whole.inputs.T)
        assert abs(float(target.mean())) < 1e-9
        assert float(target.std()) == pytest.approx(1)
    rows = {tuple(row) for row in whole.inputs.tolist()}
    assert len(test.inputs) == len(kept.inputs) == pytest.approx(len(train.inputs) / 4, abs=1)
    assert sum(tuple(row) in rows for row in kept.inputs.tolist()) <= 1  # iris has two equal flowers
    other, _ = _tables(data, 3, 2)
    assert not torch.equal(other.targets[1], train.targets[1]) or not torch.equal(other.targets[2], train.targets[2])


def test_it_can_be_learned() -> None:
    problem = ProblemSpec.parse("tabular[data=wine,tasks=3]").build(ProblemContext(instances=1))
    point = problem.initial_parameters([0])
    draws = torch.Generator().manual_seed(0)
    before = problem.test_metrics(point)["test_loss"]
    for _ in range(300):
        jacobian, _ = problem.jacobian(point, problem.sample_batch(draws))
        point = point - 0.05 * jacobian.sum(dim=1)
    after = problem.test_metrics(point)["test_loss"]
    assert after.shape == (1, 3)
    assert float(after[0, 0]) < 0.3 * float(before[0, 0])
    assert (after < before).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data=wines", "'wines'.*wine"),
        ("tasks=5", "tasks 5 of tabular.*1 to 4"),
        ("batch=0", "batch 0 of tabular.*integer >= 1"),
        ("columns=-1", "columns -1"),
        ("activation=sigmoid", "'sigmoid'"),
        ("hidden=x", "hidden 'x'"),
        ("init=0", "init 0"),
    ],
)
def test_wrong_settings_get_one_line(settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProblemSpec.parse(f"tabular[{settings}]").build(ProblemContext())

"""What an optimizer remembers: state dicts, copies, and the precision and parameters that they are of."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist import GML2O, ML2O, UserError
from tests.crossed import crossed
from tests.torch_optim.small import KINDS, TwoTasks, drawn, flat, losses, makers, take


def saved_and_read(state: dict) -> dict:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    read: dict = torch.load(stream, weights_only=True)
    return read


@crossed("kind, dtype", KINDS, [torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_training_is_equal_step_by_step(kind: str, dtype: torch.dtype, place: Path) -> None:
    model = TwoTasks().to(dtype)
    make = makers(place)[kind]
    cast = lambda step: (drawn(step)[0].to(dtype), *drawn(step)[1:])  # noqa: E731

    def go(optimizer: ML2O, net: nn.Module, steps: range) -> list[Tensor]:
        points = []
        for step in steps:
            batch, other = cast(step), cast(f"guard {step}")
            closures = [lambda batch=batch: losses(net, batch, "none"), lambda other=other: losses(net, other, "none")]
            optimizer.step(*closures[: 2 if isinstance(optimizer, GML2O) else 1])
            points.append(flat(net))
        return points

    whole = TwoTasks().to(dtype)
    uninterrupted = make(whole)
    expected = go(uninterrupted, whole, range(12))
    optimizer = make(model)
    go(optimizer, model, range(6))
    state, weights = saved_and_read(optimizer.state_dict()), saved_and_read(model.state_dict())
    other = TwoTasks(seed=5).to(dtype)
    other.load_state_dict(weights)
    resumed = make(other)
    resumed.load_state_dict(state)
    assert resumed.steps == 6
    for one, point in zip(go(resumed, other, range(6, 12)), expected[6:], strict=True):
        assert torch.equal(one, point)
    assert resumed.steps == 12
    if isinstance(resumed, GML2O) and isinstance(uninterrupted, GML2O):
        assert resumed.accepted_steps == uninterrupted.accepted_steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_its_own_way(kind: str, place: Path) -> None:
    model = TwoTasks()
    optimizer = makers(place)[kind](model)
    for step in range(3):
        take(optimizer, model, step)
    twin, copied = copy.deepcopy((model, optimizer))
    for step in range(3, 6):
        take(optimizer, model, step)
    assert not torch.equal(flat(model), flat(twin))
    assert copied.steps == 3
    for step in range(3, 6):
        take(copied, twin, step)
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_group_may_come_before_and_after_a_checkpoint(kind: str, place: Path) -> None:
    def begun(model: TwoTasks) -> ML2O:
        half = nn.ModuleList([model.trunk])
        optimizer = makers(place)[kind](half)
        for step in range(2):
            take(optimizer, model, step)
        optimizer.add_param_group({"params": model.heads.parameters(), "lr": 0.5})
        return optimizer

    model = TwoTasks()
    optimizer = begun(model)
    for step in range(2, 4):
        take(optimizer, model, step)
    state = saved_and_read(optimizer.state_dict())
    twin = copy.deepcopy(model)
    resumed = makers(place)[kind](nn.ModuleList([twin.trunk]))
    resumed.add_param_group({"params": twin.heads.parameters()})
    resumed.load_state_dict(state)
    assert resumed.param_groups[1]["lr"] == 0.5
    for step in range(4, 6):
        take(optimizer, model, step)
        take(resumed, twin, step)
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("kind", KINDS)
def test_another_precision_than_the_first_steps_gets_one_line_again_and_again(kind: str, place: Path) -> None:
    model, new = TwoTasks(), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = makers(place)[kind](model)
    take(optimizer, model, 0)
    saved = optimizer.state_dict()
    optimizer.add_param_group({"params": [new]})
    for _ in range(2):
        with pytest.raises(UserError, match="a float64 parameter was added"):
            take(optimizer, model, 1)
    model = TwoTasks()
    optimizer = makers(place)[kind](model)
    take(optimizer, model, 0)
    model.double()
    for _ in range(2):
        with pytest.raises(UserError, match=r"cpu.*torch\.float64.*cpu.*torch\.float32"):
            take(optimizer, model, 1)
    with pytest.raises(UserError, match=r"state dict.*torch\.float32.*parameters.*torch\.float64"):
        makers(place)[kind](model).load_state_dict(saved)
    makers(place)[kind](model).load_state_dict(makers(place)[kind](TwoTasks()).state_dict())  # of no step yet


DAMAGES: dict[str, Any] = {
    "steps": ["zzz", -5, None],
    "accepted_steps": ["zzz", -1],
    "objectives": ["two", -1],
    "order": ["abc", [0, "one"], [-1, 0], None],
    "shapes": ["abc", None],
    "precision": [32],
    "weights_sha256": [None],
    "exact": ["no tensor"],
    "tree": ["{", "[" * 100_000, 7],
    "tensors": [[], {"a": "no tensor"}, {"a": torch.tensor(torch.nan)}],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_dict_is_one_line_and_changes_nothing(name: str) -> None:
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), "initial")
    for step in range(2):
        optimizer.step(lambda step=step: losses(model, drawn(step)))
    whole = optimizer.state_dict()
    for value in DAMAGES[name]:
        damaged = {**whole, "ml2o": {**whole["ml2o"], name: value}}
        with pytest.raises(UserError, match="state dict"):
            optimizer.load_state_dict(damaged)
    lacking = {key: value for key, value in whole["ml2o"].items() if key != name}
    with pytest.raises(UserError, match="state dict"):
        optimizer.load_state_dict({**whole, "ml2o": lacking})
    optimizer.load_state_dict(whole)
    optimizer.step(lambda: losses(model, drawn(3)))
    assert optimizer.steps == 3

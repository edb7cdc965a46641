"""What the optimizers say once of a training that goes wrong without an error."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist import GML2O, ML2O
from tests.torch_optim.small import TwoTasks, drawn, flat, losses, weights_file
from tests.wording import says


@contextmanager
def said() -> Iterator[list[str]]:
    """Collect the warnings, which must point at this file."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    lines += [str(each.message) for each in caught]
    assert {each.filename for each in caught} <= {__file__}


class BackwardInside(torch.autograd.Function):
    """Differentiates a module inside its own backward, as reversible networks do: autograd.grad sees no parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.module(x).backward(gradient)
        assert x.grad is not None
        return x.grad, None


@pytest.mark.parametrize("kind", [ML2O, GML2O])
@pytest.mark.parametrize("named", [True, False])
def test_a_hidden_parameter_is_named_once(named: bool, kind: type[ML2O]) -> None:
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "hidden": nn.Linear(6, 6), "last": nn.Linear(6, 2)})
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    x = torch.randn(8, 6)

    def closure() -> list[Tensor]:
        features = BackwardInside.apply(model["first"](x), model["hidden"])
        return list((model["last"](features) - 1).square().unbind(1))

    names = [*model.named_parameters(), ("frozen", frozen)]
    optimizer = kind(names if named else [parameter for _, parameter in names])
    with said() as lines:
        for _ in range(3):
            optimizer.step(closure)
    hidden = ["hidden.weight [6, 6]", "hidden.bias [6]"]
    if not named:
        hidden = ["param_groups[0]['params'][2] [6, 6]", "param_groups[0]['params'][3] [6]"]
    (line,) = lines
    assert says(line, "no loss reached 2 trainable parameters", f": {', '.join(hidden)}. ")


def test_parameters_that_come_later_are_named_in_their_first_step() -> None:
    model = TwoTasks()
    optimizer = ML2O(model.named_parameters())
    closure = lambda: losses(model, drawn(0))  # noqa: E731
    with said() as lines:
        optimizer.step(closure)
    assert not lines
    extra = nn.Linear(4, 4)
    optimizer.add_param_group({"params": [(f"extra.{name}", each) for name, each in extra.named_parameters()]})
    with said() as lines:
        optimizer.step(closure)
        optimizer.step(closure)
    (line,) = lines
    assert "extra.weight [4, 4], extra.bias [4]" in line
    many = nn.ModuleList([nn.Linear(1, 1) for _ in range(10)])
    optimizer.add_param_group({"params": [(f"many.{name}", each) for name, each in many.named_parameters()]})
    with said() as lines:
        optimizer.step(closure)
    assert "no loss reached 20 trainable parameters" in lines[0]
    assert "and 12 more" in lines[0]


def test_a_learning_rate_from_habit_is_told() -> None:
    model = TwoTasks()
    for kind in (ML2O, GML2O):
        with said() as lines:
            optimizer = kind(model.parameters(), lr=1e-3)
            optimizer.step(lambda: losses(model, drawn(0)))
        (line,) = lines
        assert line.startswith("lr=0.001 ")
        assert says(line, kind.__name__, "1,000 times", " 1")
        with said() as lines:
            kind([{"params": model.trunk.parameters(), "lr": 0.01}, {"params": model.heads.parameters()}])
        assert len(lines) == 1
        with said() as lines:
            optimizer = kind(model.parameters(), lr=0.05)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
            for step in range(4):
                optimizer.step(lambda step=step: losses(model, drawn(step)))
                schedule.step()
            kind(model.parameters(), lr=0.0)
        assert not lines
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_steps_that_move_nothing_are_told_once(kind: type[ML2O], tmp_path: Path) -> None:
    place = weights_file(tmp_path, output="scaled", scale=1e-30)
    model = TwoTasks()
    guard = {"guard": {"every": 1000}} if kind is GML2O else {}  # a guard that looks takes the fallback's steps
    optimizer = kind(model.parameters(), place, **guard)
    with said() as lines:
        optimizer.step(lambda: losses(model, drawn(0)))
        before = flat(model)
        for _ in range(25):
            optimizer.step(lambda: losses(model, drawn(0)))
    assert torch.equal(flat(model), before)
    (line,) = lines
    assert says(line, "last 10 steps", kind.__name__, "moved no parameter")


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_steps_that_should_not_move_are_not_told(kind: type[ML2O]) -> None:
    model = TwoTasks()
    point = nn.Parameter(torch.zeros(3))
    with said() as lines:
        still = kind(model.parameters(), lr=0.0)
        flat_losses = kind([point])
        for _ in range(15):
            still.step(lambda: losses(model, drawn(0)))
            flat_losses.step(lambda: [0 * point.square().sum(), (0 * point).square().sum()])
    assert not lines


def test_a_guard_that_refuses_nearly_all_steps_is_told_once(tmp_path: Path) -> None:
    """Random weights of a scaled rule go far off, and a guard without a budget takes none of their steps."""
    place = weights_file(tmp_path, output="scaled", scale=30.0)
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), place, guard={"budget": 0})
    batch = drawn(0)
    taken = []
    with said() as lines:
        for _ in range(70):
            optimizer.step(lambda: [losses(model, batch)[0], 1e3 * losses(model, batch)[1]])
            taken.append(optimizer.accepted_steps)
    assert taken[49] < 3
    (line,) = lines
    assert says(line, "guard of GML2O", f"refused {50 - taken[49]} of the last 50 ", "loss ")
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), "initial")
    with said() as lines:
        for step in range(52):
            optimizer.step(lambda step=step: losses(model, drawn(step)))
    assert not lines
    assert optimizer.accepted_steps > 10


def test_a_copy_does_not_say_it_again() -> None:
    model = TwoTasks()
    model.unused = nn.Linear(3, 3)
    optimizer = ML2O(model.parameters())
    with said() as lines:
        optimizer.step(lambda: losses(model, drawn(0)))
    assert len(lines) == 1
    twin, other = copy.deepcopy((model, optimizer))
    with said() as lines:
        other.step(lambda: losses(twin, drawn(0)))
    assert not lines

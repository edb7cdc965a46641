"""Calls of closures within a step: repeated ones, those that write parameters, and those that differentiate."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ml2o_dist import GML2O, ML2O, UserError
from tests.crossed import crossed
from tests.torch_optim.small import TwoTasks, drawn, flat, losses

CALLED_AGAIN = "gave other losses.*again.*same batch"


class Table(nn.Module):
    """An embedding whose forward writes rows that are too long."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Embedding(20, 4, max_norm=1.0), nn.Linear(4, 2)

    def forward(self, indices: Tensor) -> list[Tensor]:
        return list((self.head(self.rows(indices)) - 1).square().unbind(1))


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_a_step_starts_from_what_the_forward_wrote(kind: type[ML2O]) -> None:
    """The twin's rows are shortened by hand before each step, so that its forward writes nothing."""
    torch.manual_seed(0)
    model = Table()
    twin = copy.deepcopy(model)
    optimizer, other = kind(model.parameters()), kind(twin.parameters())
    for step in range(30):
        indices = torch.arange(step % 3, 20, 2)
        twin(indices)
        optimizer.step(lambda indices=indices: model(indices))
        other.step(lambda indices=indices: twin(indices))
        assert torch.equal(model.rows.weight, twin.rows.weight), step
    model(torch.arange(20))
    assert float(model.rows.weight.norm(dim=1).max()) <= 1 + 1e-6


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_rows_that_are_clamped_by_data_and_never_move_are_short_afterwards(kind: type[ML2O]) -> None:
    point, other = nn.Parameter(torch.full((4,), 3.0)), nn.Parameter(torch.zeros(4))
    optimizer = kind([point, other], lr=0.5)

    def closure() -> list[Tensor]:
        point.data.clamp_(-1, 1)
        return [(other - 1).square() + 0 * point.sum(), (other - 2).square() + 0 * point.sum()]

    optimizer.step(closure)
    assert float((point - 1).abs().max()) < 0.1  # not 3, where it was before the first call
    with pytest.raises(KeyError):
        optimizer.step(lambda: closure() and {}["stop"])
    half = nn.Parameter(torch.full((4,), 3.0, dtype=torch.bfloat16))
    kind([half, other]).step(lambda: [half.data.clamp_(-1, 1).sum() * 0 + each for each in [other[0], -other[1]]])
    assert half.tolist() == [1.0] * 4


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_a_step_that_fails_undoes_what_the_forward_wrote(kind: type[ML2O]) -> None:
    torch.manual_seed(0)
    model = Table()
    with torch.no_grad():
        model.rows.weight.mul_(5)
    before = flat(model)
    with pytest.raises(UserError, match="not finite"):
        kind(model.parameters()).step(lambda: [each * torch.nan for each in model(torch.arange(20))])
    assert torch.equal(flat(model), before)


def test_a_model_that_sets_its_scale_in_its_first_forward_is_taken() -> None:
    class Scaled(nn.Module):
        """As ActNorm: the first batch gives the scale, and a plain attribute says that it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.net, self.given = nn.Parameter(torch.ones(5)), TwoTasks(), False

        def forward(self, x: Tensor) -> list[Tensor]:
            if not self.given:
                self.scale.data.copy_(1 / x.std(dim=0))
                self.given = True
            return self.net(x * self.scale)

    model = Scaled()
    x = drawn(0)[0] * 100
    optimizer = GML2O(model.parameters(), "initial")
    optimizer.step(lambda: losses(model, (x, *drawn(0)[1:])))
    torch.testing.assert_close(model.scale.detach(), 1 / x.std(dim=0), atol=0.011, rtol=0)  # Adam's first step is 0.01


def noises() -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Return random changes of an input that torch's own generator does not draw."""

    def own() -> Callable[[Tensor], Tensor]:
        draws = torch.Generator().manual_seed(0)
        return lambda x: x + 0.01 * torch.randn(x.shape, generator=draws)

    def numpy() -> Callable[[Tensor], Tensor]:
        draws = np.random.default_rng(0)
        return lambda x: x + 0.01 * torch.from_numpy(draws.standard_normal(x.shape)).float()

    def counted() -> Callable[[Tensor], Tensor]:
        count = itertools.count()
        return lambda x: x * (1 + 0.001 * next(count))

    def batches() -> Callable[[Tensor], Tensor]:
        loader = iter(drawn(i)[0] for i in range(1000))
        return lambda x: next(loader)

    return {
        "generator": own,
        "numpy": numpy,
        "python": lambda: lambda x: x * (1 + random.random()),
        "count": counted,
        "batches": batches,
    }


@crossed("name, where, reduction", noises(), ["closure", "guard closure"], ["mean", "none"])
def test_a_closure_that_gives_other_losses_is_refused(name: str, where: str, reduction: str) -> None:
    model, noise = TwoTasks(), noises()[name]()
    steady = lambda: losses(model, drawn(1), reduction)  # noqa: E731
    noisy = lambda: losses(model, (noise(drawn(0)[0]), *drawn(0)[1:]), reduction)  # noqa: E731
    closures = (noisy, steady) if where == "closure" else (steady, noisy)
    optimizer = GML2O(model.parameters(), "initial")
    before = flat(model)
    for _ in range(2):
        with pytest.raises(UserError, match=f"^the {where} {CALLED_AGAIN}"):
            optimizer.step(*closures)
    assert torch.equal(flat(model), before)
    optimizer.step(steady, steady)
    if where == "closure":  # ML2O calls it once
        assert ML2O(model.parameters(), "initial").step(noisy).isfinite().all()


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_a_closure_may_differentiate_by_itself(kind: type[ML2O]) -> None:
    """A physics-informed network for u' = cos x, u(0) = 0, whose first loss has a derivative in it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.linspace(-1, 1, 32).unsqueeze(1)

    def closure() -> list[Tensor]:
        places = x.clone().requires_grad_()
        u = network(places)
        (slope,) = torch.autograd.grad(u.sum(), places, create_graph=True)
        return [(slope - places.cos()).square().mean(), network(torch.zeros(1, 1)).square().mean()]

    optimizer = kind(network.parameters())
    first = optimizer.step(closure)
    for _ in range(150):
        last = optimizer.step(closure)
    assert float(last.sum()) < 0.02 * float(first.sum())
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():
        optimizer.step(closure)


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_autocast_around_the_steps_keeps_no_copies_of_old_parameters(kind: type[ML2O]) -> None:
    """Autocast keeps copies of the parameters until it ends: copies of another point once a step has moved them."""
    ends = []
    for kept in (False, True):
        model = TwoTasks()
        optimizer = kind(model.parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=kept):
            for _ in range(5):
                optimizer.step(lambda model=model: losses(model, drawn(0, 32), "none"))
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_zeroing_gradients_in_the_closure_is_no_backward(kind: type[ML2O]) -> None:
    for to_none in (True, False):
        model = TwoTasks()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

        def closure(model: nn.Module = model, to_none: bool = to_none) -> list[Tensor]:
            model.zero_grad(set_to_none=to_none)
            return losses(model, drawn(0))

        assert kind(model.parameters()).step(closure).isfinite().all()


@pytest.fixture
def masked() -> Callable[[nn.Module, bool], list[Tensor]]:
    """Give the losses of two heads, of which the second may have no label."""
    x, first, second = drawn(0)

    def found(model: nn.Module, labels: bool) -> list[Tensor]:
        one, two = model(x)
        absent = (two * 0).sum()
        return [
            nn.functional.cross_entropy(one, first),
            nn.functional.cross_entropy(two, second) if labels else absent,
        ]

    return found


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_a_task_without_labels_may_be_zero_with_a_graph(
    kind: type[ML2O], masked: Callable[[nn.Module, bool], list[Tensor]]
) -> None:
    model = TwoTasks()
    optimizer = kind(model.parameters(), "initial")
    first = torch.stack(masked(model, True)).detach()
    for step in range(60):
        optimizer.step(lambda step=step: masked(model, step % 2 == 0))
    assert bool((torch.stack(masked(model, True)) < first).all())
